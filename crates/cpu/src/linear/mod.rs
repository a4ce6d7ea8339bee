//! The linear op on packed weights: `out = x · weightᵀ + bias`.
//!
//! Work is cut into tasks of one group of panels by some rows, which rayon spreads; inside a task the weights go by in
//! blocks that stay in cache while all rows pass over them. Results do not depend on the cut: see [`kernel`].
#![allow(unsafe_code)]

mod kernel;
mod owned;
mod round;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

use longhaul_backend::{DType, Error, Result};
use rayon::prelude::*;

use crate::matrix::{Matrix, PANEL};
use crate::simd::{Isa, Simd, SimdOp, UnknownIsa};
pub(crate) use round::{pair, round};
use kernel::{Block, DotBf16, GROUP, GROUP_COLS, Kind, PlainF32, TILE_ROWS, WideBf16, WideF16};

/// What the products are computed in. Sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Weights widened exactly, activations f32, fused multiply-add.
    #[default]
    F32,
    /// Activations rounded to bf16 once, products exact: bf16 dot products where the CPU has them (twice the speed),
    /// else the same products by f32 multiply-adds. Weights that are not bf16 fall back to [`Precision::F32`].
    Bf16,
}

/// Bytes of weights that the rows of a task pass over before the next: fits L2 beside the activations. Measured: 16 KiB
/// costs 3 % (the sums are loaded and stored more often), more gains nothing.
const BLOCK_BYTES: usize = 64 << 10;
/// Rows of a task at most: bounds its scratch.
const TASK_ROWS: usize = 256;
/// Multiply-adds below which waking another thread costs more than it saves.
const SERIAL_WORK: usize = 1 << 17;

/// The linear op for one ISA and precision. Uses the current rayon pool; cheapest when called from inside it.
///
/// The result of a row is the same bits whatever the other rows, their number, and the number of threads. It may differ
/// between ISAs and precisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gemm {
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Precision of the products.
    pub precision: Precision,
}

impl Gemm {
    /// The op on this process's ISA ([`Isa::active`]).
    ///
    /// # Errors
    /// The environment names an ISA that this CPU lacks.
    pub fn new(precision: Precision) -> std::result::Result<Self, UnknownIsa> {
        Ok(Self { isa: Isa::active()?, precision })
    }

    /// `out = x · weightᵀ + bias` for `x` `[m, in]`, `weight` `[out, in]`, `bias` `[out]`, `out` `[m, out]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when a length does not fit.
    pub fn linear(
        &self,
        x: &[f32],
        m: usize,
        weight: &Matrix,
        bias: Option<&[f32]>,
        out: &mut [f32],
    ) -> Result<()> {
        self.linear_uninit(x, m, weight, bias, as_uninit(out))
    }

    /// [`Gemm::linear`] into memory that need not be initialised; all of it is on success.
    ///
    /// # Errors
    /// As [`Gemm::linear`].
    pub fn linear_uninit(
        &self,
        x: &[f32],
        m: usize,
        weight: &Matrix,
        bias: Option<&[f32]>,
        out: &mut [MaybeUninit<f32>],
    ) -> Result<()> {
        let (rows, cols) = (weight.rows(), weight.cols());
        check("linear", [("x", x.len(), m, cols), ("out", out.len(), m, rows)])?;
        if let Some(bias) = bias {
            check("linear", [("bias", bias.len(), 1, rows)])?;
        }
        self.run(x, m, weight, bias, out, false);
        Ok(())
    }

    /// The gated half of an MLP: `out = silu(x · gateᵀ) * (x · upᵀ)` for `weight` = gate rows stacked on up rows
    /// (`[2 n, in]`) and `out` `[m, n]`, without the `[m, 2 n]` in between.
    ///
    /// # Errors
    /// [`Error::Shape`] when a length does not fit or the weight has an odd number of rows.
    pub fn linear_silu_mul(&self, x: &[f32], m: usize, weight: &Matrix, out: &mut [f32]) -> Result<()> {
        self.linear_silu_mul_uninit(x, m, weight, as_uninit(out))
    }

    /// [`Gemm::linear_silu_mul`] into memory that need not be initialised; all of it is on success.
    ///
    /// # Errors
    /// As [`Gemm::linear_silu_mul`].
    pub fn linear_silu_mul_uninit(
        &self,
        x: &[f32],
        m: usize,
        weight: &Matrix,
        out: &mut [MaybeUninit<f32>],
    ) -> Result<()> {
        let (rows, cols) = (weight.rows(), weight.cols());
        if rows % 2 != 0 {
            return Err(Error::shape("linear_silu_mul", format!("{weight:?}: gate and up need an even number of rows")));
        }
        check("linear_silu_mul", [("x", x.len(), m, cols), ("out", out.len(), m, rows / 2)])?;
        if (rows / 2).is_multiple_of(PANEL) {
            self.run(x, m, weight, None, out, true);
            return Ok(());
        }
        // The halves do not begin at a panel: compute them side by side first.
        let mut both = vec![MaybeUninit::uninit(); m * rows];
        self.run(x, m, weight, None, &mut both, false);
        let n = rows / 2;
        for (both, out) in both.chunks(rows).zip(out.chunks_mut(n)) {
            // SAFETY: `run` has written all of `both`; `out` holds the `n` values of a row.
            self.isa.dispatch(unsafe { SiluMul::new(both.as_ptr().cast(), n, out.as_mut_ptr().cast()) });
        }
        Ok(())
    }

    fn run(
        &self,
        x: &[f32],
        m: usize,
        weight: &Matrix,
        bias: Option<&[f32]>,
        out: &mut [MaybeUninit<f32>],
        gated: bool,
    ) {
        if m == 0 {
            return;
        }
        let cols = weight.cols();
        let parallel = m * cols * weight.rows() >= SERIAL_WORK && rayon::current_num_threads() > 1;
        let job = Job { isa: self.isa, weight, bias, rows: m, gated, parallel };
        let out = Shared(out.as_mut_ptr().cast());
        match (weight.dtype(), self.precision) {
            (DType::BF16, Precision::Bf16) if self.isa == Isa::Avx512Bf16 => {
                let stride = spread(cols.div_ceil(2));
                let pairs = round::round_rows(self.isa, x, cols, stride, parallel);
                job.run::<DotBf16>((pairs.as_ptr().cast(), stride), (weight.steps(), false), out);
            }
            (DType::BF16, Precision::Bf16) => {
                // Products of bf16 values are exact in f32, so rounding the activations is all there is to do.
                let x = round::round_values(self.isa, x, parallel);
                job.run::<WideBf16>((x.as_ptr().cast(), cols), (cols / 2, cols % 2 == 1), out);
            }
            (DType::BF16, Precision::F32) => job.run::<WideBf16>((x.as_ptr(), cols), (cols / 2, cols % 2 == 1), out),
            (DType::F16, _) => job.run::<WideF16>((x.as_ptr(), cols), (cols, false), out),
            (DType::F32, _) => job.run::<PlainF32>((x.as_ptr(), cols), (cols, false), out),
        }
    }
}

/// A row stride of at least `words` whose rows do not fall on the same L1 sets.
fn spread(words: usize) -> usize {
    let words = words.next_multiple_of(16);
    if words.is_multiple_of(256) { words + 16 } else { words }
}

fn check<const N: usize>(op: &'static str, lengths: [(&str, usize, usize, usize); N]) -> Result<()> {
    for (name, found, rows, cols) in lengths {
        if rows.checked_mul(cols) != Some(found) {
            return Err(Error::shape(op, format!("{name} holds {found} values, expected [{rows}, {cols}]")));
        }
    }
    Ok(())
}

fn as_uninit(values: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: same layout; private, and every caller only writes initialised values through it.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
}

/// A pointer that tasks share; each touches its own part.
#[derive(Clone, Copy)]
struct Shared<T>(T);

// SAFETY: tasks read the activations, and write disjoint rows and columns of the output.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

/// One call, before it is cut into tasks.
#[derive(Clone, Copy)]
struct Job<'a> {
    isa: Isa,
    weight: &'a Matrix,
    bias: Option<&'a [f32]>,
    rows: usize,
    gated: bool,
    parallel: bool,
}

impl Job<'_> {
    /// Panels that make output columns: half of them when gate and up meet.
    fn out_panels(&self) -> usize {
        if self.gated { self.weight.panels() / 2 } else { self.weight.panels() }
    }

    fn out_cols(&self) -> usize {
        if self.gated { self.weight.rows() / 2 } else { self.weight.rows() }
    }

    /// Runs all tasks. `act`: first activation, stride of a row; `steps`: whole and half steps of a row.
    fn run<K: Kind>(self, act: (*const K::Act, usize), steps: (usize, bool), out: Shared<*mut f32>) {
        let width = if self.gated { GROUP / 2 } else { GROUP };
        let groups = self.out_panels().div_ceil(width);
        // Few groups: cut the rows as well, in whole tiles, until every thread has some tasks.
        let threads = if self.parallel { rayon::current_num_threads() } else { 1 };
        let cuts = (4 * threads).div_ceil(groups).max(self.rows.div_ceil(TASK_ROWS));
        let rows = self.rows.div_ceil(cuts).next_multiple_of(TILE_ROWS).max(4 * TILE_ROWS).min(TASK_ROWS);
        let cuts = self.rows.div_ceil(rows);
        let act = Shared(act);
        let task = |t: usize| {
            let (act, out) = (act, out);
            let first = t % cuts * rows;
            let rows = rows.min(self.rows - first);
            // Row cuts of a group follow each other, so that its weights are still in L2 for the next.
            self.isa.dispatch(Task::<K> { job: self, group: t / cuts, width, first, rows, act: act.0, steps, out: out.0 });
        };
        if self.parallel {
            (0..groups * cuts).into_par_iter().for_each(task);
        } else {
            (0..groups * cuts).for_each(task);
        }
    }
}

/// One group of output panels for the rows `first .. first + rows`.
struct Task<'a, K: Kind> {
    job: Job<'a>,
    group: usize,
    width: usize,
    first: usize,
    rows: usize,
    act: (*const K::Act, usize),
    steps: (usize, bool),
    out: *mut f32,
}

impl<K: Kind> SimdOp for Task<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Task { job, rows, steps: (steps, half), .. } = self;
        let out_panel = self.group * self.width;
        let width = self.width.min(job.out_panels() - out_panel);
        let panels = if job.gated { 2 * width } else { width };
        let panel_of = |p: usize| if p < width { out_panel + p } else { job.out_panels() + out_panel + p - width };

        // The sums start from the bias.
        let mut init = [0.0_f32; GROUP_COLS];
        let mut w = [job.weight.panel(0).as_ptr(); GROUP];
        for p in 0..panels {
            w[p] = job.weight.panel(panel_of(p)).as_ptr();
            if let Some(bias) = job.bias {
                let bias = &bias[panel_of(p) * PANEL..];
                let n = bias.len().min(PANEL);
                init[p * PANEL..][..n].copy_from_slice(&bias[..n]);
            }
        }

        let out_cols = job.out_cols();
        let cols = (width * PANEL).min(out_cols - out_panel * PANEL);
        // SAFETY: `first` and `out_panel` lie inside `out` (`[job.rows, out_cols]`).
        let out = unsafe { self.out.add(self.first * out_cols + out_panel * PANEL) };
        let mut scratch = [const { MaybeUninit::<f32>::uninit() }; TASK_ROWS * GROUP_COLS];
        let direct = !job.gated && cols == width * PANEL;
        let sums: (*mut f32, usize) = (scratch.as_mut_ptr().cast(), GROUP_COLS);

        // A single tile reads every weight once: nothing to keep, so no blocks.
        let block =
            if rows <= TILE_ROWS { steps.max(1) } else { (BLOCK_BYTES / (K::STEP_BYTES * panels)).max(1) };
        let mut step = 0;
        loop {
            let now = block.min(steps - step);
            let last = step + now == steps;
            // SAFETY: steps `step .. step + now` of rows `first .. first + rows`, and of the group's panels; `from` is
            // the 64 values of `init`, then the sums of the block before in `scratch`; `to` holds `16 * panels` columns
            // for every row, either in `scratch` or, at last, in `out`, where all of them are columns of the matrix.
            unsafe {
                let a = self.act.0.add(self.first * self.act.1 + step * K::STEP_ACTS);
                Block::<K> {
                    a: (a, self.act.1),
                    w: w.map(|w| w.add(step * K::STEP_BYTES)),
                    panels,
                    steps: now,
                    half: half && last,
                    from: if step == 0 { (init.as_ptr(), 0) } else { (sums.0.cast_const(), sums.1) },
                    to: if direct && last { (out, out_cols) } else { sums },
                    rows,
                }
                .run(s);
            }
            step += now;
            if last {
                break;
            }
        }

        if direct {
            return;
        }
        for r in 0..rows {
            // SAFETY: the blocks have written `16 * panels` values of each of `rows` rows of `scratch`; `cols` columns
            // of row `first + r` of `out` belong to this task.
            unsafe {
                let sums = sums.0.add(r * GROUP_COLS).cast_const();
                let out = out.add(r * out_cols);
                if job.gated {
                    SiluMul::new(sums, width * PANEL, out).run(s);
                } else {
                    std::ptr::copy_nonoverlapping(sums, out, cols);
                }
            }
        }
    }
}

/// `out[i] = silu(both[i]) * both[n + i]`.
struct SiluMul {
    both: *const f32,
    n: usize,
    out: *mut f32,
}

impl SiluMul {
    /// # Safety
    /// `both` is readable for `2 n` values until the op has run, `out` writable for `n`, and they do not overlap.
    #[inline(always)]
    unsafe fn new(both: *const f32, n: usize, out: *mut f32) -> Self {
        Self { both, n, out }
    }
}

impl SimdOp for SiluMul {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i + S::LANES <= self.n {
            // SAFETY: `i + LANES <= n`, and `new` was granted `2 n` and `n` values.
            unsafe {
                let (gate, up) = (s.load_ptr(self.both.add(i)), s.load_ptr(self.both.add(self.n + i)));
                s.store_ptr(s.mul(s.silu(gate), up), self.out.add(i));
            }
            i += S::LANES;
        }
        if i < self.n {
            let n = self.n - i;
            // SAFETY: the last `n` values of gate, up and out. The output may be uninitialised: it is written through a
            // pointer, never viewed as a slice.
            unsafe {
                let gate = s.load_partial(std::slice::from_raw_parts(self.both.add(i), n), 0.0);
                let up = s.load_partial(std::slice::from_raw_parts(self.both.add(self.n + i), n), 0.0);
                let mut lanes = [0.0; 16];
                s.store(s.mul(s.silu(gate), up), &mut lanes);
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), self.out.add(i), n);
            }
        }
    }
}

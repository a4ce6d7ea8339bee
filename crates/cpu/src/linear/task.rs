//! A call cut into tasks: one group of panels by some rows each.
use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::gate::SiluMul;
use super::kernel::{Block, GROUP, GROUP_COLS, Kind, TILE_ROWS};
use crate::matrix::{Matrix, PANEL};
use crate::simd::Isa;

/// Bytes of weights that the rows of a task pass over before the next: fits L2 beside the activations. Measured: 16 KiB
/// costs 3 % (the sums are loaded and stored more often), more gains nothing.
const BLOCK_BYTES: usize = 64 << 10;
/// Rows of a task at most: bounds its scratch.
pub(super) const TASK_ROWS: usize = 256;

/// A pointer that tasks share; each touches its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) T);

// SAFETY: tasks read the activations, and write disjoint rows and columns of the output.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

/// One call, before it is cut into tasks.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) isa: Isa,
    pub(super) weight: &'a Matrix,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) rows: usize,
    pub(super) gated: bool,
    pub(super) parallel: bool,
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
    pub(super) fn run<K: Kind>(
        self,
        act: (*const K::Act, usize),
        steps: (usize, bool),
        out: Shared<*mut f32>,
    ) {
        let width = if self.gated { GROUP / 2 } else { GROUP };
        let groups = self.out_panels().div_ceil(width);
        // Few groups: cut the rows as well, in whole tiles, until every thread has some tasks.
        let threads = if self.parallel { rayon::current_num_threads() } else { 1 };
        let cuts = (4 * threads).div_ceil(groups).max(self.rows.div_ceil(TASK_ROWS));
        let rows = self.rows.div_ceil(cuts).next_multiple_of(TILE_ROWS).clamp(4 * TILE_ROWS, TASK_ROWS);
        let cuts = self.rows.div_ceil(rows);
        let act = Shared(act);
        let task = |t: usize| {
            let (act, out) = (act, out);
            let first = t % cuts * rows;
            let rows = rows.min(self.rows - first);
            // Row cuts of a group follow each other, so that its weights are still in L2 for the next.
            Task::<K> { job: self, group: t / cuts, width, first, rows, act: act.0, steps, out: out.0 }.run();
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

impl<K: Kind> Task<'_, K> {
    fn run(self) {
        let Task { job, rows, steps: (steps, half), .. } = self;
        let out_panel = self.group * self.width;
        let width = self.width.min(job.out_panels() - out_panel);
        let panels = if job.gated { 2 * width } else { width };
        let panel_of =
            |p: usize| if p < width { out_panel + p } else { job.out_panels() + out_panel + p - width };

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
                .run(job.isa);
            }
            step += now;
            if last {
                break;
            }
        }

        if job.gated {
            let (gates, ups) = (sums.0.cast_const(), sums.0.wrapping_add(cols).cast_const());
            let op = SiluMul { gates, ups, stride: sums.1, rows, cols, out, out_stride: out_cols };
            // SAFETY: the blocks have written `cols` gates, then `cols` ups (whole panels both) of every row of
            // `scratch`; `cols` columns of the rows from `first` in `out` belong to this task.
            unsafe { op.run(job.isa) };
        } else if !direct {
            for r in 0..rows {
                // SAFETY: as above, with `16 * panels >= cols` sums.
                unsafe { std::ptr::copy_nonoverlapping(sums.0.add(r * sums.1), out.add(r * out_cols), cols) };
            }
        }
    }
}

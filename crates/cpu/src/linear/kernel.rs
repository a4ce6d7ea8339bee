//! The register-blocked tile: `MR` rows by `NV` vectors of outputs, all of whose sums live in registers.
//!
//! Every output is one chain of multiply-adds over `in` in ascending order, whatever `MR`, `NV` or the blocking above:
//! that alone makes a row's result independent of the batch it is computed in.
//!
//! No closures here (see [`SimdOp`](crate::simd::SimdOp)).
use half::f16;

use crate::matrix::PANEL;
use crate::simd::{Isa, Simd, SimdOp};

/// Panels of a full group; the widest tile covers them all.
pub(super) const GROUP: usize = 4;
/// Outputs of a full group.
pub(super) const GROUP_COLS: usize = GROUP * PANEL;
/// Rows of the tallest tile. 6 rows by 4 vectors fill 24 of 32 registers (6 by 2 of 16 with AVX2).
pub(super) const TILE_ROWS: usize = 6;

/// How one step of weights meets the activations.
pub(super) trait Kind {
    /// An activation as the kernel broadcasts it.
    type Act: Copy + Send + Sync;
    /// Bytes of one step of one panel.
    const STEP_BYTES: usize;
    /// Activations that one step consumes.
    const STEP_ACTS: usize;

    /// `acc[r][v] += a[r] * w[v]` for one step.
    ///
    /// # Safety
    /// `a + r * lda` is readable for `STEP_ACTS` elements (`HALF`: the first of two) for every row, and `w[p] + offset`
    /// for `STEP_BYTES` for every panel of the tile.
    unsafe fn step<S: Simd, const MR: usize, const NV: usize, const HALF: bool>(
        s: S,
        acc: &mut [[S::F32; NV]; MR],
        a: *const Self::Act,
        lda: usize,
        w: &[*const u8; GROUP],
        offset: usize,
    );
}

/// bf16 weights widened in registers, f32 activations.
pub(super) struct WideBf16;
/// bf16 weights times pairs of bf16 activations.
pub(super) struct DotBf16;
/// f16 weights widened in registers, f32 activations.
pub(super) struct WideF16;
/// f32 weights and activations.
pub(super) struct PlainF32;

/// Where vector `v` of a tile lies: its panel, and its first lane in the panel.
#[inline(always)]
const fn place<S: Simd>(v: usize) -> (usize, usize) {
    (v * S::LANES / PANEL, v * S::LANES % PANEL)
}

/// `acc[r][v] += x[r] * w[v]`, `x[r]` broadcast from `a + r * lda`.
///
/// # Safety
/// `a + r * lda` is readable for every `r < MR`.
#[inline(always)]
unsafe fn multiply<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    acc: &mut [[S::F32; NV]; MR],
    a: *const f32,
    lda: usize,
    w: [S::F32; NV],
) {
    for (r, acc) in acc.iter_mut().enumerate() {
        // SAFETY: granted by the caller.
        let x = s.splat(unsafe { *a.add(r * lda) });
        for (acc, w) in acc.iter_mut().zip(w) {
            *acc = s.mul_add(x, w, *acc);
        }
    }
}

impl Kind for WideBf16 {
    type Act = f32;
    const STEP_BYTES: usize = 4 * PANEL;
    const STEP_ACTS: usize = 2;

    #[inline(always)]
    unsafe fn step<S: Simd, const MR: usize, const NV: usize, const HALF: bool>(
        s: S,
        acc: &mut [[S::F32; NV]; MR],
        a: *const f32,
        lda: usize,
        w: &[*const u8; GROUP],
        offset: usize,
    ) {
        let mut pairs = [s.splat_pair(0); NV];
        for (v, pairs) in pairs.iter_mut().enumerate() {
            let (panel, lane) = place::<S>(v);
            // SAFETY: the caller grants the step of every panel of the tile.
            *pairs = unsafe { s.load_pairs_ptr(w[panel].add(offset).cast::<u32>().add(lane)) };
        }
        let mut w = [s.splat(0.0); NV];
        for (w, &pairs) in w.iter_mut().zip(&pairs) {
            *w = s.first(pairs);
        }
        // SAFETY: the caller grants the first activation of every row.
        unsafe { multiply(s, acc, a, lda, w) };
        if HALF {
            return;
        }
        for (w, &pairs) in w.iter_mut().zip(&pairs) {
            *w = s.second(pairs);
        }
        // SAFETY: and the second one.
        unsafe { multiply(s, acc, a.add(1), lda, w) };
    }
}

impl Kind for DotBf16 {
    type Act = u32;
    const STEP_BYTES: usize = 4 * PANEL;
    const STEP_ACTS: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd, const MR: usize, const NV: usize, const HALF: bool>(
        s: S,
        acc: &mut [[S::F32; NV]; MR],
        a: *const u32,
        lda: usize,
        w: &[*const u8; GROUP],
        offset: usize,
    ) {
        let mut pairs = [s.splat_pair(0); NV];
        for (v, pairs) in pairs.iter_mut().enumerate() {
            let (panel, lane) = place::<S>(v);
            // SAFETY: the caller grants the step of every panel of the tile.
            *pairs = unsafe { s.load_pairs_ptr(w[panel].add(offset).cast::<u32>().add(lane)) };
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller grants one pair of every row.
            let x = s.splat_pair(unsafe { *a.add(r * lda) });
            for (acc, w) in acc.iter_mut().zip(pairs) {
                *acc = s.dot_pairs(*acc, x, w);
            }
        }
    }
}

impl Kind for WideF16 {
    type Act = f32;
    const STEP_BYTES: usize = 2 * PANEL;
    const STEP_ACTS: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd, const MR: usize, const NV: usize, const HALF: bool>(
        s: S,
        acc: &mut [[S::F32; NV]; MR],
        a: *const f32,
        lda: usize,
        w: &[*const u8; GROUP],
        offset: usize,
    ) {
        let mut values = [s.splat(0.0); NV];
        for (v, values) in values.iter_mut().enumerate() {
            let (panel, lane) = place::<S>(v);
            // SAFETY: the caller grants the step of every panel of the tile.
            *values = unsafe { s.load_f16_ptr(w[panel].add(offset).cast::<f16>().add(lane)) };
        }
        // SAFETY: the caller grants one activation of every row.
        unsafe { multiply(s, acc, a, lda, values) };
    }
}

impl Kind for PlainF32 {
    type Act = f32;
    const STEP_BYTES: usize = 4 * PANEL;
    const STEP_ACTS: usize = 1;

    #[inline(always)]
    unsafe fn step<S: Simd, const MR: usize, const NV: usize, const HALF: bool>(
        s: S,
        acc: &mut [[S::F32; NV]; MR],
        a: *const f32,
        lda: usize,
        w: &[*const u8; GROUP],
        offset: usize,
    ) {
        let mut values = [s.splat(0.0); NV];
        for (v, values) in values.iter_mut().enumerate() {
            let (panel, lane) = place::<S>(v);
            // SAFETY: the caller grants the step of every panel of the tile.
            *values = unsafe { s.load_ptr(w[panel].add(offset).cast::<f32>().add(lane)) };
        }
        // SAFETY: the caller grants one activation of every row.
        unsafe { multiply(s, acc, a, lda, values) };
    }
}

/// A [`Block`] whose pointers somebody vouched for. It is dispatched by itself, and not inside a larger op, so that what
/// surrounds it cannot disturb the allocation of registers.
struct Run<K: Kind>(Block<K>);

impl<K: Kind> SimdOp for Run<K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: `Block::run` is the only one to make a `Run`, and its caller vouches for the pointers.
        unsafe { self.0.run_with(s) };
    }
}

/// A block of the product: rows of activations by one group of panels, over some steps.
pub(super) struct Block<K: Kind> {
    /// First activation of the first row at the first step, and elements from row to row.
    pub(super) a: (*const K::Act, usize),
    /// The panels at the first step; the first `panels` are used.
    pub(super) w: [*const u8; GROUP],
    pub(super) panels: usize,
    /// Whole steps, and whether half a step (one activation of a pair) follows.
    pub(super) steps: usize,
    pub(super) half: bool,
    /// Sums to start from and elements from row to row (0: the same for all rows).
    pub(super) from: (*const f32, usize),
    /// Where the sums go. May be `from`.
    pub(super) to: (*mut f32, usize),
    pub(super) rows: usize,
}

impl<K: Kind> Block<K> {
    /// Computes the block.
    ///
    /// # Safety
    /// For every row below `rows`: `steps` (and the half) of activations, `16 * panels` sums to read and to write; for
    /// every panel: `steps` (and the half) of weights. `to` aliases nothing but `from`.
    pub(super) unsafe fn run(self, isa: Isa) {
        isa.dispatch(Run(self));
    }

    /// # Safety
    /// As [`Block::run`].
    #[inline(always)]
    unsafe fn run_with<S: Simd>(&self, s: S) {
        if S::LANES == PANEL && self.panels == GROUP {
            // SAFETY: 4 vectors of 16 lanes are the 4 panels granted by the caller.
            unsafe { self.columns::<S, 4>(s, 0) };
        } else if S::LANES == PANEL {
            for p in 0..self.panels {
                // SAFETY: one vector of 16 lanes is panel `p`, below `panels`.
                unsafe { self.columns::<S, 1>(s, p) };
            }
        } else {
            for p in 0..self.panels {
                // SAFETY: two vectors of 8 lanes are panel `p`, below `panels`.
                unsafe { self.columns::<S, 2>(s, p) };
            }
        }
    }

    /// All rows of the `NV` vectors that begin with panel `first`.
    ///
    /// # Safety
    /// As [`Block::run`], and the vectors lie in the first `panels` panels.
    #[inline(always)]
    unsafe fn columns<S: Simd, const NV: usize>(&self, s: S, first: usize) {
        let mut row = 0;
        while row < self.rows {
            let left = (self.rows - row).min(TILE_ROWS);
            // SAFETY: `row + left <= rows`.
            unsafe {
                match left {
                    1 => self.tile::<S, 1, NV>(s, row, first),
                    2 => self.tile::<S, 2, NV>(s, row, first),
                    3 => self.tile::<S, 3, NV>(s, row, first),
                    4 => self.tile::<S, 4, NV>(s, row, first),
                    5 => self.tile::<S, 5, NV>(s, row, first),
                    _ => self.tile::<S, TILE_ROWS, NV>(s, row, first),
                }
            }
            row += left;
        }
    }

    /// # Safety
    /// As [`Block::columns`], with `row + MR <= rows`.
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NV: usize>(&self, s: S, row: usize, first: usize) {
        // Panel `first` in front; the tile reaches no further than `panels`.
        let mut w = self.w;
        w.rotate_left(first);
        let lda = self.a.1;
        let mut acc = [[s.splat(0.0); NV]; MR];
        // SAFETY: rows `row .. row + MR` and the tile's panels are inside the block, which the caller vouches for.
        unsafe {
            for (r, acc) in acc.iter_mut().enumerate() {
                let from = self.from.0.add((row + r) * self.from.1 + first * PANEL);
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = s.load_ptr(from.add(v * S::LANES));
                }
            }
            let mut a = self.a.0.add(row * lda);
            let mut offset = 0;
            for _ in 0..self.steps {
                K::step::<S, MR, NV, false>(s, &mut acc, a, lda, &w, offset);
                a = a.add(K::STEP_ACTS);
                offset += K::STEP_BYTES;
            }
            if self.half {
                K::step::<S, MR, NV, true>(s, &mut acc, a, lda, &w, offset);
            }
            for (r, acc) in acc.iter().enumerate() {
                let to = self.to.0.add((row + r) * self.to.1 + first * PANEL);
                for (v, &acc) in acc.iter().enumerate() {
                    s.store_ptr(acc, to.add(v * S::LANES));
                }
            }
        }
    }
}

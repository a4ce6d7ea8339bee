//! `silu(gate) * up` on sums that the kernels have just left in cache.
use crate::simd::{Isa, Simd, SimdOp};

/// `out[r][c] = silu(gates[r][c]) * ups[r][c]`.
pub(super) struct SiluMul {
    pub(super) gates: *const f32,
    pub(super) ups: *const f32,
    /// Elements from row to row of `gates` and `ups`.
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

impl SiluMul {
    /// # Safety
    /// `rows` rows of `cols` values are readable in `gates` and `ups` and writable in `out`, which overlaps neither.
    pub(super) unsafe fn run(self, isa: Isa) {
        isa.dispatch(Run(self));
    }
}

/// A [`SiluMul`] whose pointers somebody vouched for.
struct Run(SiluMul);

impl SimdOp for Run {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let SiluMul { gates, ups, stride, rows, cols, out, out_stride } = self.0;
        for r in 0..rows {
            let mut c = 0;
            while c + S::LANES <= cols {
                // SAFETY: columns `c .. c + LANES` of row `r`, inside what `SiluMul::run` was granted.
                unsafe {
                    let gate = s.load_ptr(gates.add(r * stride + c));
                    let up = s.load_ptr(ups.add(r * stride + c));
                    s.store_ptr(s.mul(s.silu(gate), up), out.add(r * out_stride + c));
                }
                c += S::LANES;
            }
            if c < cols {
                let left = cols - c;
                let mut lanes = [0.0; 16];
                // SAFETY: the last `left` columns of row `r`. The output may be uninitialised: it is written through a
                // pointer, never viewed as a slice.
                unsafe {
                    let gate = std::slice::from_raw_parts(gates.add(r * stride + c), left);
                    let up = std::slice::from_raw_parts(ups.add(r * stride + c), left);
                    let (gate, up) = (s.load_partial(gate, 0.0), s.load_partial(up, 0.0));
                    s.store(s.mul(s.silu(gate), up), &mut lanes);
                    std::ptr::copy_nonoverlapping(lanes.as_ptr(), out.add(r * out_stride + c), left);
                }
            }
        }
    }
}

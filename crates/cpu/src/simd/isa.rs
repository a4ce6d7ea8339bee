//! Which instruction set this process uses: detection, the environment override, and the entry points with the features on.
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use super::Simd;
use super::scalar::Scalar;

/// Environment variable that forces an [`Isa`] by name (`avx512bf16`, `avx512`, `avx2`, `scalar`), for bisection.
pub const ISA_VARIABLE: &str = "LONGHAUL_CPU_ISA";

/// An instruction set that the kernels are compiled for, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL and BF16 dot products.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2, FMA, F16C.
    Avx2,
    /// Portable code, vectorised by the compiler for the target's baseline (SSE2, NEON).
    Scalar,
}

/// The environment names an ISA that does not exist or that this CPU lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{ISA_VARIABLE}={found}: expected one of {}, which this CPU has; or unset it", names(.available))]
pub struct UnknownIsa {
    /// What was asked for.
    pub found: String,
    /// What this CPU can do.
    pub available: Vec<Isa>,
}

fn names(isas: &[Isa]) -> String {
    isas.iter().map(Isa::to_string).collect::<Vec<_>>().join(", ")
}

/// A kernel, generic over the instruction set.
///
/// Mark `run`, and every function below it that takes an `S`, `#[inline(always)]`, and call [`Simd`] methods from loops,
/// not from closures (`map`, `from_fn`, ...): what is not inlined into the entry point is compiled without the ISA's
/// features, where every intrinsic is a function call, some 20 times slower. A closure cannot be marked, and whether it
/// is inlined changes with unrelated code.
pub trait SimdOp {
    /// What the kernel returns.
    type Output;
    /// Runs the kernel with `s`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

impl Isa {
    /// Every ISA, fastest first.
    pub const ALL: [Isa; 4] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Scalar];

    /// Whether this CPU can run it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = || {
                avx2 && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            };
            match self {
                Isa::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
                Isa::Avx512 => avx512(),
                Isa::Avx2 => avx2,
                Isa::Scalar => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Scalar
        }
    }

    /// The ISAs of this CPU, fastest first; never empty.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The ISA of this process, chosen once: [`ISA_VARIABLE`] if set, else the fastest that the CPU has.
    ///
    /// # Errors
    /// [`UnknownIsa`] when the variable names none of [`Isa::available`].
    pub fn active() -> Result<Isa, UnknownIsa> {
        static ACTIVE: OnceLock<Result<Isa, UnknownIsa>> = OnceLock::new();
        ACTIVE.get_or_init(|| Self::choose(std::env::var(ISA_VARIABLE).ok().as_deref())).clone()
    }

    fn choose(asked: Option<&str>) -> Result<Isa, UnknownIsa> {
        let available = Self::available();
        match asked {
            None | Some("") => Ok(available.first().copied().unwrap_or(Isa::Scalar)),
            Some(name) => match name.parse() {
                Ok(isa) if available.contains(&isa) => Ok(isa),
                _ => Err(UnknownIsa { found: name.to_owned(), available }),
            },
        }
    }

    /// Runs `op` compiled for this ISA.
    ///
    /// An ISA that the CPU lacks runs the portable code instead, so that this is safe for every value.
    #[inline]
    pub fn dispatch<O: SimdOp>(self, op: O) -> O::Output {
        #[cfg(target_arch = "x86_64")]
        if self.is_available() {
            match self {
                // SAFETY: `is_available` has just detected every feature of the entry point.
                Isa::Avx512Bf16 => return unsafe { x86::avx512_bf16(op) },
                // SAFETY: as above.
                Isa::Avx512 => return unsafe { x86::avx512(op) },
                // SAFETY: as above.
                Isa::Avx2 => return unsafe { x86::avx2(op) },
                Isa::Scalar => {}
            }
        }
        op.run(Scalar)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::{avx2::Avx2, avx512::Avx512};
    use super::SimdOp;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) fn avx512_bf16<O: SimdOp>(op: O) -> O::Output {
        // SAFETY: this function's own features are those of the token.
        op.run(unsafe { Avx512::<true>::new() })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) fn avx512<O: SimdOp>(op: O) -> O::Output {
        // SAFETY: this function's own features are those of the token.
        op.run(unsafe { Avx512::<false>::new() })
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn avx2<O: SimdOp>(op: O) -> O::Output {
        // SAFETY: this function's own features are those of the token.
        op.run(unsafe { Avx2::new() })
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Scalar => "scalar",
        })
    }
}

impl FromStr for Isa {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|isa| isa.to_string() == name).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_override_names_what_the_cpu_has() {
        assert_eq!(Isa::choose(None), Ok(Isa::available()[0]));
        assert_eq!(Isa::choose(Some("scalar")), Ok(Isa::Scalar));
        let error = Isa::choose(Some("sse9")).unwrap_err();
        assert!(error.to_string().starts_with("LONGHAUL_CPU_ISA=sse9: expected one of"), "{error}");
        assert!(error.to_string().contains("scalar"), "{error}");
        for isa in Isa::ALL {
            assert_eq!(Isa::choose(Some(&isa.to_string())).is_ok(), isa.is_available());
        }
    }
}

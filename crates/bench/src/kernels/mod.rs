//! `longhaul bench kernels`: every op at the shapes of the five models, beside the limit it is a fraction of.
//!
//! Times are device times of recorded launches (CUDA events around graph replays) with random data. Weights and caches are taken
//! in turn from sets that together exceed the second-level cache; activations of a few rows stay in it, as they do in a model. On the emulated device nothing is launched: bytes and operations are counted.

mod cases;
pub(crate) mod measure;
mod operands;

use std::fmt;

use longhaul_cuda::{Context, CudaError};
use serde::Serialize;

pub use cases::{Case, cases};

/// What to measure.
#[derive(Debug, Clone, Default)]
pub struct KernelsConfig {
    /// Only ops whose name contains this.
    pub op: Option<String>,
    /// Only this family member.
    pub model: Option<String>,
}

/// One op at one shape.
#[derive(Debug, Clone, Serialize)]
pub struct KernelFigure {
    /// The op.
    pub op: String,
    /// The family member whose shape it is.
    pub model: String,
    /// The shape in words.
    pub shape: String,
    /// Bytes that must be read and written at least.
    pub bytes: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// Microseconds a launch, median; absent where nothing was launched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub microseconds: Option<f64>,
    /// Fraction of the measured copy bandwidth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction_of_copy: Option<f64>,
    /// Fraction of the measured rate of a large matrix product.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction_of_matmul: Option<f64>,
    /// Why there is no time, if a launch failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The table.
#[derive(Debug, Clone, Serialize)]
pub struct KernelsReport {
    /// The device in words.
    pub device: String,
    /// Bytes per second of a large copy within the device, read plus written; absent where nothing was launched.
    pub copy_bytes_per_second: Option<f64>,
    /// Operations per second of an 8192-cube bf16 product of the vendor's library.
    pub matmul_flops_per_second: Option<f64>,
    /// The ops.
    pub kernels: Vec<KernelFigure>,
}

/// Counts, and on a GPU measures, every case. `launches` says whether the device's times mean anything.
///
/// # Errors
/// A device that fails for good; a case that fails alone is reported in its line.
pub fn kernels(
    ctx: &Context,
    launches: bool,
    config: &KernelsConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<KernelsReport, CudaError> {
    let wanted = |case: &Case| {
        config.op.as_deref().is_none_or(|op| case.op.contains(op))
            && config.model.as_deref().is_none_or(|model| case.model == model)
    };
    let cases: Vec<Case> = cases().into_iter().filter(wanted).collect();
    let limits = if launches { Some(measure::limits(ctx)?) } else { None };
    let mut figures = Vec::with_capacity(cases.len());
    for (index, case) in cases.iter().enumerate() {
        let mut figure = KernelFigure {
            op: case.op.into(),
            model: case.model.into(),
            shape: case.shape.clone(),
            bytes: case.bytes,
            flops: case.flops,
            microseconds: None,
            fraction_of_copy: None,
            fraction_of_matmul: None,
            error: None,
        };
        if let Some((copy, matmul)) = limits {
            match measure::case(ctx, case) {
                Ok(seconds) => {
                    figure.microseconds = Some(seconds * 1e6);
                    figure.fraction_of_copy = Some(case.bytes as f64 / seconds / copy);
                    figure.fraction_of_matmul = Some(case.flops as f64 / seconds / matmul);
                }
                Err(error) if error.is_fatal() => return Err(error),
                Err(error) => figure.error = Some(error.to_string()),
            }
        }
        figures.push(figure);
        progress(index + 1, cases.len());
    }
    Ok(KernelsReport {
        device: longhaul_cuda::describe(ctx),
        copy_bytes_per_second: limits.map(|l| l.0),
        matmul_flops_per_second: limits.map(|l| l.1),
        kernels: figures,
    })
}

impl fmt::Display for KernelsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.device)?;
        match (self.copy_bytes_per_second, self.matmul_flops_per_second) {
            (Some(copy), Some(matmul)) => {
                writeln!(f, "; copy {:.2} TB/s, matmul {:.0} TFLOP/s", copy / 1e12, matmul / 1e12)?
            }
            _ => writeln!(f, "; counts only, nothing was launched")?,
        }
        writeln!(
            f,
            "{:<22} {:<16} {:<34} {:>10} {:>10} {:>10} {:>6} {:>7}",
            "op", "model", "shape", "MB", "GFLOP", "µs", "copy", "matmul"
        )?;
        let mut lines = self.kernels.iter().peekable();
        while let Some(k) = lines.next() {
            let time = k.microseconds.map_or("-".into(), |t| format!("{t:.1}"));
            let percent = |p: Option<f64>| p.map_or("-".into(), |p| format!("{:.0} %", 100.0 * p));
            write!(
                f,
                "{:<22} {:<16} {:<34} {:>10.3} {:>10.4} {:>10} {:>6} {:>7}",
                k.op,
                k.model,
                k.shape,
                k.bytes as f64 / 1e6,
                k.flops as f64 / 1e9,
                time,
                percent(k.fraction_of_copy),
                percent(k.fraction_of_matmul),
            )?;
            if let Some(error) = &k.error {
                write!(f, "  {error}")?;
            }
            if lines.peek().is_some() {
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_and_op_has_cases_with_counts() {
        let all = cases();
        for model in longhaul_model::family_names() {
            assert!(all.iter().any(|c| c.model == model), "{model}");
        }
        for op in
            ["linear", "attention_prefill", "attention_decode", "moe", "add_rms_norm", "sample", "route"]
        {
            assert!(all.iter().any(|c| c.op.contains(op)), "{op}");
        }
        assert!(all.iter().all(|c| c.bytes > 0));
    }

    /// Bytes of the roofline's table for the 7B's gate and up projection at batch 1: 271.6 MB of weights.
    #[test]
    fn weight_bytes_agree_with_the_roofline() {
        let all = cases();
        let case = all
            .iter()
            .find(|c| c.model == "qwen2-7b" && c.op == "linear_silu_and_mul" && c.shape.starts_with("1 x"))
            .unwrap();
        let weights = 2 * 2 * 18944 * 3584;
        assert!(case.bytes > weights && case.bytes < weights + 100_000, "{}", case.bytes);
        assert_eq!(case.flops, 2 * 2 * 18944 * 3584 + 4 * 18944);
    }
}

//! Devices: from a choice and a model's files to a [`Runner`] with its KV pool.

use std::sync::Arc;

use longhaul_backend::{DType, KvLayout};
use longhaul_cpu::Cpu;
use longhaul_cpu::simd::Isa;
use longhaul_cuda::arena::Arena;
use longhaul_cuda::driver::{Driver, Element, Emulated, EmulatedOptions};
use longhaul_cuda::{Context, Cuda, CudaError, Limits, Sizes, Variant};
use longhaul_model::{Model, ModelSpec, PositionProfile};
use longhaul_weights::TensorSource;

use crate::cuda_runner::CudaRunner;
use crate::runner::{CpuRunner, Runner};
use crate::{EngineError, Result};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A CUDA device if this build and machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first CUDA device.
    Cuda,
    /// The CUDA device emulated on the CPU: the same kernels, slow; for tests.
    Emulated,
}

/// Precision of matrix products and of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// float32 on the CPU, bfloat16 on a CUDA device.
    #[default]
    Auto,
    /// Exact products of the stored weights, f32 cache.
    Float32,
    /// Operands rounded to bf16, f32 sums, bf16 cache.
    Bfloat16,
    /// bfloat16 where the checkpoint is bfloat16 and the device has bf16 products, otherwise float32.
    Fastest,
}

impl Precision {
    fn on_cpu(self, checkpoint: Option<DType>) -> longhaul_cpu::Precision {
        let fast = checkpoint == Some(DType::BF16) && Isa::active() == Ok(Isa::Avx512Bf16);
        match self {
            Precision::Bfloat16 => longhaul_cpu::Precision::Bf16,
            Precision::Fastest if fast => longhaul_cpu::Precision::Bf16,
            _ => longhaul_cpu::Precision::F32,
        }
    }

    fn on_cuda(self) -> Element {
        match self {
            Precision::Float32 => Element::F32,
            Precision::Auto | Precision::Bfloat16 | Precision::Fastest => Element::Bf16,
        }
    }
}

/// Element type of the KV cache, by vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheDtype {
    /// That of [`Precision`].
    #[default]
    Auto,
    /// float32.
    Float32,
    /// bfloat16.
    Bfloat16,
    /// FP8 E4M3, half the memory of bfloat16; CUDA devices only. A key or value is its code times a scale per KV head, 1.
    Fp8E4m3,
}

impl KvCacheDtype {
    /// The cache of `device`, where `auto` is what the precision asks for.
    fn on(self, device: &str, auto: DType) -> Result<DType> {
        match self {
            KvCacheDtype::Auto => Ok(auto),
            KvCacheDtype::Float32 => Ok(DType::F32),
            KvCacheDtype::Bfloat16 => Ok(DType::BF16),
            KvCacheDtype::Fp8E4m3 if device == "cpu" => Err(EngineError::Parameter {
                name: "--kv-cache-dtype",
                message:
                    "fp8_e4m3 needs a CUDA device (--device cuda or emulated); the CPU has auto, float32 and \
                          bfloat16"
                        .into(),
            }),
            KvCacheDtype::Fp8E4m3 => Ok(DType::F8E4M3),
        }
    }
}

/// Which CUDA kernels run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// The fastest that take the shape.
    #[default]
    Auto,
    /// The plain reference kernels.
    Plain,
    /// mma.sync kernels where they take the shape.
    Mma,
}

/// How a device is set up.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceOptions {
    /// Where the model runs.
    pub device: Device,
    /// Precision of matrix products.
    pub precision: Precision,
    /// Element type of the KV cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// CPU threads; 0 = all cores.
    pub threads: usize,
    /// Which CUDA kernels run.
    pub kernels: Kernels,
    /// Run every decode step op by op instead of from a recorded graph.
    pub enforce_eager: bool,
    /// How the emulated device schedules.
    pub emulator: EmulatedOptions,
}

/// A model on a device.
pub(crate) struct Placed {
    pub runner: Box<dyn Runner>,
    pub blocks: usize,
    pub block_size: usize,
    pub description: String,
}

/// Rows of a prefill step on a CUDA device: enough for full matrix speed; the arena is sized for them.
const CUDA_ROWS: usize = 2048;
/// As above where every row costs milliseconds.
const EMULATED_ROWS: usize = 512;
/// Sequences of a step.
const CUDA_SEQUENCES: usize = 64;
/// Rows of a step whose logits may be wanted.
const CUDA_LOGIT_ROWS: usize = 64;

/// Loads the weights onto the device that `options` names; `progress` hears (bytes read, bytes in all).
pub(crate) fn place(
    options: &DeviceOptions,
    spec: &ModelSpec,
    positions: &PositionProfile,
    source: &dyn TensorSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Placed> {
    match options.device {
        Device::Cpu => place_on_cpu(options, spec, positions, source, progress),
        Device::Emulated => {
            let driver = Emulated::new(options.emulator).map_err(|e| cuda_error("emulated", e))?;
            place_on_cuda("emulated", Arc::new(driver), options, spec, positions, source, progress)
        }
        Device::Cuda => {
            let driver = gpu()?;
            place_on_cuda("cuda", driver, options, spec, positions, source, progress)
        }
        Device::Auto => match gpu() {
            Ok(driver) => place_on_cuda("cuda", driver, options, spec, positions, source, progress),
            Err(_) => place_on_cpu(options, spec, positions, source, progress),
        },
    }
}

/// The first CUDA device.
fn gpu() -> Result<Arc<dyn Driver>> {
    Err(EngineError::Device {
        device: "cuda".into(),
        message:
            "this build has no CUDA device; use --device cpu, or build with --features cuda on a machine \
                  with a GPU (README, \"GPU\")"
                .into(),
    })
}

/// A device without a model, for measuring kernels; the flag says whether its times mean anything.
///
/// # Errors
/// [`EngineError::Device`] where there is none.
pub fn kernel_context(options: &DeviceOptions) -> Result<(Context, bool)> {
    /// Activations of the largest measured shape, several times over.
    const ARENA_BYTES: usize = 8 << 30;
    let (name, driver, arena_bytes): (_, Arc<dyn Driver>, _) = match options.device {
        Device::Cpu => {
            return Err(EngineError::Device {
                device: "cpu".into(),
                message: "has no CUDA kernels; use --device cuda, or emulated for counts without times"
                    .into(),
            });
        }
        Device::Emulated => {
            let driver = Emulated::new(options.emulator).map_err(|e| cuda_error("emulated", e))?;
            ("emulated", Arc::new(driver), 1 << 20)
        }
        Device::Cuda | Device::Auto => ("cuda", gpu()?, ARENA_BYTES),
    };
    let arena = Arena::new(&driver, arena_bytes).map_err(|e| cuda_error(name, e))?;
    let context = Context::new(driver, arena, variant(options.kernels), Element::Bf16);
    Ok((context.map_err(|e| cuda_error(name, e))?, name != "emulated"))
}

fn variant(kernels: Kernels) -> Variant {
    match kernels {
        Kernels::Auto => Variant::Auto,
        Kernels::Plain => Variant::Plain,
        Kernels::Mma => Variant::Mma,
    }
}

fn cuda_error(device: &str, error: CudaError) -> EngineError {
    match error {
        CudaError::Unavailable { message } => EngineError::Device { device: device.into(), message },
        other => EngineError::Backend(other.into()),
    }
}

fn layout(spec: &ModelSpec, positions: &PositionProfile, dtype: DType) -> KvLayout {
    let block_size = positions.block_size();
    KvLayout {
        layers: spec.layers,
        query_heads: spec.query_heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        block_size,
        blocks: positions.max_model_len.div_ceil(block_size),
        dtype,
    }
}

fn place_on_cpu(
    options: &DeviceOptions,
    spec: &ModelSpec,
    positions: &PositionProfile,
    source: &dyn TensorSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Placed> {
    let precision = options.precision.on_cpu(spec.dtype);
    let dtype = match precision {
        longhaul_cpu::Precision::F32 => DType::F32,
        longhaul_cpu::Precision::Bf16 => DType::BF16,
    };
    let dtype = options.kv_cache_dtype.on("cpu", dtype)?;
    let cpu = Cpu::new(options.threads, precision)
        .map_err(|e| EngineError::Device { device: "cpu".into(), message: e.to_string() })?;
    let description = cpu.description();
    let model = Model::load(cpu, spec, positions, source, progress)?;
    let layout = layout(spec, positions, dtype);
    let runner = Box::new(CpuRunner::new(model, layout)?);
    Ok(Placed { runner, blocks: layout.blocks, block_size: layout.block_size, description })
}

fn place_on_cuda(
    name: &str,
    driver: Arc<dyn Driver>,
    options: &DeviceOptions,
    spec: &ModelSpec,
    positions: &PositionProfile,
    source: &dyn TensorSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Placed> {
    let element = options.precision.on_cuda();
    let dtype = if element == Element::F32 { DType::F32 } else { DType::BF16 };
    let dtype = options.kv_cache_dtype.on(name, dtype)?;
    let layout = layout(spec, positions, dtype);
    let rows = if name == "emulated" { EMULATED_ROWS } else { CUDA_ROWS };
    let limits = Limits {
        rows: rows.min(positions.max_model_len).max(1),
        sequences: CUDA_SEQUENCES,
        // A decode batch shares the pool, but a padded one names its last table again for every padding row.
        blocks: layout.blocks * 9,
        logit_rows: CUDA_LOGIT_ROWS,
    };
    let cuda = Cuda::new(driver, variant(options.kernels), element, &sizes(spec), limits)
        .map_err(|e| cuda_error(name, e))?;
    let description = longhaul_cuda::describe(cuda.context());
    let model = Model::load(cuda, spec, positions, source, progress)?;
    let runner = Box::new(CudaRunner::new(model, layout, !options.enforce_eager)?);
    Ok(Placed { runner, blocks: layout.blocks, block_size: layout.block_size, description })
}

/// The widths that decide a step's memory.
fn sizes(spec: &ModelSpec) -> Sizes {
    let query = spec.query_heads * spec.head_dim;
    let moe = spec.moe.as_ref();
    Sizes {
        hidden: spec.hidden_size,
        qkv: query + 2 * spec.kv_heads * spec.head_dim,
        query,
        intermediate: spec.intermediate_size.max(moe.map_or(0, |m| m.shared_intermediate_size)),
        expert_intermediate: moe.map_or(0, |m| m.intermediate_size),
        experts: moe.map_or(0, |m| m.experts),
        top_k: moe.map_or(0, |m| m.top_k),
        vocab: spec.vocab_size,
    }
}

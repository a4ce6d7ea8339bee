//! Devices: from a choice and a model's files to a [`Runner`] with its KV pool.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use longhaul_backend::{Collective, DType, Single};
use longhaul_collective::{Options as GroupOptions, Threads};
use longhaul_cpu::Cpu;
use longhaul_cpu::simd::Isa;
use longhaul_cuda::arena::Arena;
use longhaul_cuda::driver::{Driver, Element, Emulated, EmulatedOptions};
use longhaul_cuda::{Context, Cuda, CudaError, Limits, Sizes, Variant};
use longhaul_model::{Model, ModelSpec, PositionProfile, RankShard, ShardOptions, ShardPlan};
use longhaul_weights::TensorSource;

use crate::cuda_runner::CudaRunner;
use crate::ranks::{Follower, RankedRunner};
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
#[derive(Debug, Clone, Copy)]
pub struct DeviceOptions {
    /// Where the model runs.
    pub device: Device,
    /// Precision of matrix products.
    pub precision: Precision,
    /// CPU threads of all ranks together, at least one each; 0 = all cores.
    pub threads: usize,
    /// Ranks that the model is dealt over.
    pub tensor_parallel: usize,
    /// Deal routed experts whole over the ranks.
    pub expert_parallel: bool,
    /// Which CUDA kernels run.
    pub kernels: Kernels,
    /// Run every decode step op by op instead of from a recorded graph.
    pub enforce_eager: bool,
    /// How the emulated device schedules.
    pub emulator: EmulatedOptions,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            precision: Precision::Auto,
            threads: 0,
            tensor_parallel: 1,
            expert_parallel: false,
            kernels: Kernels::Auto,
            enforce_eager: false,
            emulator: EmulatedOptions::default(),
        }
    }
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

/// Longest time that a CPU rank waits for the others in one collective: on few cores they take turns.
const RANK_TIMEOUT: Duration = Duration::from_secs(600);

/// Loads the weights onto the device that `options` names; `progress` hears (bytes read, bytes in all).
pub(crate) fn place(
    options: &DeviceOptions,
    spec: &ModelSpec,
    positions: &PositionProfile,
    source: &(dyn TensorSource + Sync),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Placed> {
    let group = ShardOptions { expert_parallel: options.expert_parallel, ..ShardOptions::default() };
    let plan = ShardPlan::new(spec, options.tensor_parallel, &group)?;
    let one_rank = |device: &str| match options.tensor_parallel {
        1 => Ok(()),
        ranks => Err(EngineError::Device {
            device: device.into(),
            message: format!("runs on one rank, not on --tp {ranks}; use --device cpu"),
        }),
    };
    match options.device {
        Device::Cpu => place_on_cpu(options, spec, positions, &plan, source, progress),
        Device::Emulated => {
            one_rank("emulated")?;
            let driver = Emulated::new(options.emulator).map_err(|e| cuda_error("emulated", e))?;
            place_on_cuda("emulated", Arc::new(driver), options, spec, positions, source, progress)
        }
        Device::Cuda => {
            let driver = gpu()?;
            one_rank("cuda")?;
            place_on_cuda("cuda", driver, options, spec, positions, source, progress)
        }
        Device::Auto => match gpu() {
            Ok(driver) => {
                one_rank("cuda")?;
                place_on_cuda("cuda", driver, options, spec, positions, source, progress)
            }
            Err(_) => place_on_cpu(options, spec, positions, &plan, source, progress),
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

fn place_on_cpu(
    options: &DeviceOptions,
    spec: &ModelSpec,
    positions: &PositionProfile,
    plan: &ShardPlan,
    source: &(dyn TensorSource + Sync),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Placed> {
    let precision = options.precision.on_cpu(spec.dtype);
    let dtype = match precision {
        longhaul_cpu::Precision::F32 => DType::F32,
        longhaul_cpu::Precision::Bf16 => DType::BF16,
    };
    let block_size = positions.block_size();
    let blocks = positions.max_model_len.div_ceil(block_size);
    let ranks = plan.ranks().len();
    let threads = match (ranks, options.threads) {
        (1, threads) => threads,
        (_, 0) => (thread::available_parallelism().map_or(1, usize::from) / ranks).max(1),
        (_, threads) => (threads / ranks).max(1),
    };
    let load = |group: &Arc<dyn Collective>, progress: &mut dyn FnMut(u64, u64)| -> Result<CpuRunner> {
        let cpu = Cpu::new(threads, precision)
            .map_err(|e| EngineError::Device { device: "cpu".into(), message: e.to_string() })?
            .in_group(group.clone());
        let rank = group.rank();
        let model = Model::load_shard(cpu, spec, positions, (plan, rank), source, progress)?;
        let shard = plan
            .ranks()
            .get(rank)
            .ok_or(EngineError::Parameter { name: "--tp", message: format!("rank {rank} of {ranks}") })?;
        CpuRunner::new(model, shard.kv_layout(spec, block_size, blocks, dtype))
    };
    let of_rank = |rank: usize| move |source| EngineError::Rank { rank, source: Box::new(source) };
    if ranks == 1 {
        let single: Arc<dyn Collective> = Arc::new(Single);
        let runner = load(&single, progress)?;
        let description = runner.description();
        return Ok(Placed { runner: Box::new(runner), blocks, block_size, description });
    }
    let options = GroupOptions { timeout: RANK_TIMEOUT, ..GroupOptions::default() };
    let groups = Threads::group(ranks, options)
        .map_err(|e| EngineError::Parameter { name: "--tp", message: e.to_string() })?;
    let mut groups = groups.into_iter().map(|group| Arc::new(group) as Arc<dyn Collective>);
    let Some(group) = groups.next() else {
        return Err(EngineError::Parameter { name: "--tp", message: "must be at least 1".into() });
    };
    let others: Vec<Arc<dyn Collective>> = groups.collect();
    let (leader, loaded) = thread::scope(|scope| {
        let load = &load;
        let threads: Vec<_> =
            others.iter().map(|group| scope.spawn(move || load(group, &mut |_, _| {}))).collect();
        let leader = load(&group, progress);
        let loaded: Vec<Result<CpuRunner>> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        (leader, loaded)
    });
    let leader = leader.map_err(of_rank(0))?;
    let mut followers = Vec::with_capacity(others.len());
    for (group, runner) in others.into_iter().zip(loaded) {
        let rank = group.rank();
        let mut runner = runner.map_err(of_rank(rank))?;
        let follower = Follower::spawn(group, move |inputs| runner.follow(inputs));
        followers.push(follower.map_err(|e| EngineError::Device {
            device: "cpu".into(),
            message: format!("the thread of rank {rank} could not be started: {e}"),
        })?);
    }
    let description = format!("{}, rank 0 of {ranks}", leader.description());
    let runner = Box::new(RankedRunner::new(leader, group, followers));
    Ok(Placed { runner, blocks, block_size, description })
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
    let block_size = positions.block_size();
    let blocks = positions.max_model_len.div_ceil(block_size);
    let layout = RankShard::whole(spec).kv_layout(spec, block_size, blocks, dtype);
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

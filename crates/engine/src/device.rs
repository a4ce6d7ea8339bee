//! Devices: from a choice and a model's files to a [`Runner`] with its KV pool.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use longhaul_backend::{DType, KvLayout};
use longhaul_cpu::simd::Isa;
use longhaul_cuda::arena::Arena;
use longhaul_cuda::driver::{Driver, Element, Emulated, EmulatedOptions};
use longhaul_cuda::group::AllReduce;
use longhaul_cuda::{Context, Variant};
use longhaul_model::{ModelSpec, PositionProfile, RankShard, ShardOptions, ShardPlan};

use crate::cpu_device::{CpuRanks, cpu_dtype};
use crate::cuda_device::{CudaDevices, CudaRanks, cuda_error};
use crate::local_ranks::{Loading, LocalRanks, Ranks};
use crate::memory_budget::{Available, MemoryBudget, fit_with_pool};
use crate::nodes::{RemoteNodes, Worker};
use crate::runner::Runner;
use crate::{EngineError, Result, gpu};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// CUDA devices, one a rank, if this build and machine have that many, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA devices from this ordinal on, one a rank.
    Cuda(usize),
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
    pub(crate) fn on_cpu(self, checkpoint: Option<DType>) -> longhaul_cpu::Precision {
        let fast = checkpoint == Some(DType::BF16) && Isa::active() == Ok(Isa::Avx512Bf16);
        match self {
            Precision::Bfloat16 => longhaul_cpu::Precision::Bf16,
            Precision::Fastest if fast => longhaul_cpu::Precision::Bf16,
            _ => longhaul_cpu::Precision::F32,
        }
    }

    pub(crate) fn on_cuda(self) -> Element {
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
    /// The cache of a CUDA device, where `auto` is what the precision asks for.
    pub(crate) fn on_cuda(self, auto: DType) -> DType {
        match self {
            KvCacheDtype::Auto => auto,
            KvCacheDtype::Float32 => DType::F32,
            KvCacheDtype::Bfloat16 => DType::BF16,
            KvCacheDtype::Fp8E4m3 => DType::F8E4M3,
        }
    }

    /// The cache of the CPU backend, likewise.
    pub(crate) fn on_cpu(self, auto: DType) -> Result<DType> {
        match self.on_cuda(auto) {
            DType::F8E4M3 => Err(EngineError::Parameter {
                name: "--kv-cache-dtype",
                message: "fp8_e4m3 needs a CUDA device (--device cuda or emulated); the CPU has auto, float32 and bfloat16"
                    .into(),
            }),
            dtype => Ok(dtype),
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

/// How many KV blocks there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvPool {
    /// Enough for one sequence of the whole context.
    #[default]
    OneContext,
    /// So many.
    Blocks(usize),
    /// As many as fit into so many bytes of each rank.
    Bytes(u64),
    /// As many as fit beside the rest: on a GPU up to the fraction that may be filled, on the host 4 GiB at most; never less
    /// than one sequence of the whole context.
    Memory,
}

/// How a device is set up.
#[derive(Debug, Clone, Copy)]
pub struct DeviceOptions {
    /// Where the model runs.
    pub device: Device,
    /// Precision of matrix products.
    pub precision: Precision,
    /// Element type of the KV cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// How many KV blocks there are.
    pub kv_pool: KvPool,
    /// Most sequences of a step; `None` = what suits the device.
    pub max_sequences: Option<NonZeroUsize>,
    /// Most rows of a step; `None` = what suits the device.
    pub max_step_rows: Option<NonZeroUsize>,
    /// CPU threads of all ranks together, at least one each; 0 = all cores.
    pub threads: usize,
    /// Ranks that the model is dealt over.
    pub tensor_parallel: usize,
    /// Deal routed experts whole over the ranks.
    pub expert_parallel: bool,
    /// How partial sums of ranks on CUDA devices come together.
    pub all_reduce: AllReduce,
    /// Rows from which a step of CPU ranks runs in two halves, so that one is summed over the ranks while they compute the
    /// other; `None` = never.
    pub overlap_prefill_rows: Option<NonZeroUsize>,
    /// Which CUDA kernels run.
    pub kernels: Kernels,
    /// Run every decode step op by op instead of from a recorded graph.
    pub enforce_eager: bool,
    /// How the emulated device schedules.
    pub emulator: EmulatedOptions,
    /// Fraction of a GPU's memory up to which this process may fill it.
    pub gpu_memory_utilization: f32,
    /// How long a group of ranks may go without progress in a step; `None` = what its earlier steps say.
    pub step_timeout: Option<Duration>,
    /// Hears why a group of ranks has ended when nobody has dropped the engine since: whoever owns it is stuck in a step, or waits
    /// for somebody else. A process should end then.
    pub group_lost: fn(&str),
}

/// As vLLM's: room for what other libraries of the process take, and for fragmentation.
pub const DEFAULT_GPU_MEMORY_UTILIZATION: f32 = 0.9;

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            device: Device::default(),
            precision: Precision::default(),
            threads: 0,
            tensor_parallel: 1,
            expert_parallel: false,
            all_reduce: AllReduce::default(),
            overlap_prefill_rows: None,
            kernels: Kernels::default(),
            enforce_eager: false,
            kv_cache_dtype: KvCacheDtype::default(),
            kv_pool: KvPool::default(),
            max_sequences: None,
            max_step_rows: None,
            emulator: EmulatedOptions::default(),
            gpu_memory_utilization: DEFAULT_GPU_MEMORY_UTILIZATION,
            step_timeout: None,
            group_lost: |_| (),
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

/// A device that has been opened and holds nothing yet.
pub(crate) struct Opened {
    place: Place,
    /// What the user should know about the choice.
    pub note: Option<String>,
}

enum Place {
    Cpu,
    Cuda(CudaDevices),
}

/// Opens the device that `options` names, for `ranks`: those of this node.
///
/// # Errors
/// [`EngineError::Device`] or [`EngineError::Memory`] with the remedy; [`EngineError::Parameter`] for a way to sum without
/// ranks on CUDA devices.
pub(crate) fn open(options: &DeviceOptions, ranks: Range<usize>) -> Result<Opened> {
    let on_cuda = |devices| Opened { place: Place::Cuda(devices), note: None };
    let opened = match options.device {
        Device::Cpu => Opened { place: Place::Cpu, note: None },
        Device::Emulated => on_cuda(CudaDevices::emulated(options, ranks)?),
        Device::Cuda(first) => on_cuda(CudaDevices::gpus(first, ranks)?),
        Device::Auto => match CudaDevices::gpus(0, ranks) {
            // A full device is not a missing one: the user decides.
            Err(error @ EngineError::Memory { .. }) => return Err(error),
            Err(error) => {
                // Where there is no GPU, the CPU is what the user means; a GPU that stays idle is worth a word.
                let note = gpu::is_present().then(|| format!("the model runs on the CPU: {error}"));
                Opened { place: Place::Cpu, note }
            }
            Ok(devices) => on_cuda(devices),
        },
    };
    if options.all_reduce != AllReduce::Auto {
        let refuse = |message: &str| {
            let message = format!("{} {message}", options.all_reduce);
            Err(EngineError::Parameter { name: "--all-reduce", message })
        };
        match &opened.place {
            Place::Cpu => return refuse("is about ranks on CUDA devices; leave it off on the CPU"),
            Place::Cuda(_) if options.tensor_parallel < 2 => {
                return refuse("needs ranks to sum over: --tp 2 or more");
            }
            Place::Cuda(_) => {}
        }
    }
    Ok(opened)
}

/// How the model is dealt over ranks.
///
/// # Errors
/// The model's.
pub(crate) fn shard_plan(options: &DeviceOptions, spec: &ModelSpec) -> Result<ShardPlan> {
    let group = ShardOptions { expert_parallel: options.expert_parallel, ..ShardOptions::default() };
    Ok(ShardPlan::new(spec, options.tensor_parallel, &group)?)
}

/// What of a model fits a device.
pub(crate) struct Fitted {
    pub positions: PositionProfile,
    /// KV blocks of the pool.
    pub blocks: usize,
    /// What the user should know about the context.
    pub note: Option<String>,
}

impl Opened {
    /// Refuses halves that overlap where there is nothing to overlap.
    ///
    /// # Errors
    /// [`EngineError::Parameter`].
    pub fn check_overlap(&self, options: &DeviceOptions) -> Result<()> {
        let message = match self.place {
            _ if options.overlap_prefill_rows.is_none() => return Ok(()),
            Place::Cpu if options.tensor_parallel > 1 => return Ok(()),
            Place::Cpu => "needs ranks to sum over: --tp 2 or more",
            _ => "is for ranks on the CPU so far; use --device cpu, or leave it off",
        };
        Err(EngineError::Parameter { name: "--overlap-prefill-rows", message: message.into() })
    }

    /// The positions of a model whose context fits the device, and the KV pool. `asked`: the
    /// context of `wanted` is the user's choice, otherwise less will do; `profile` makes the positions of another one.
    ///
    /// # Errors
    /// [`EngineError::Memory`].
    pub fn fit(
        &self,
        options: &DeviceOptions,
        spec: &ModelSpec,
        weight_bytes: u64,
        wanted: PositionProfile,
        asked: bool,
        profile: &dyn Fn(usize) -> Result<PositionProfile>,
    ) -> Result<Fitted> {
        match &self.place {
            Place::Cpu => {
                let dtype = cpu_dtype(options, options.precision.on_cpu(spec.dtype))?;
                let available = Available::on_host();
                let budget = |positions: &PositionProfile, blocks| {
                    let layout = layout(spec, positions, blocks, dtype);
                    MemoryBudget::on_cpu(spec, positions, &layout, weight_bytes, available.clone())
                };
                fit_with_pool(("cpu", true), options.kv_pool, (wanted, asked), profile, &budget)
            }
            Place::Cuda(devices) => {
                let plan = shard_plan(options, spec)?;
                let available = devices.available(options)?;
                let budget = |positions: &PositionProfile, blocks| {
                    devices.budget(options, spec, &plan, (positions, blocks), &available)
                };
                let device = (devices.name(), devices.is_on_host());
                fit_with_pool(device, options.kv_pool, (wanted, asked), profile, &budget)
            }
        }
    }

    /// How ranks here compute and exchange, in words: what must be the same on all nodes of a group.
    ///
    /// # Errors
    /// A way to sum or a cache that this device does not have.
    pub fn between_nodes(&self, options: &DeviceOptions, spec: &ModelSpec) -> Result<String> {
        match &self.place {
            Place::Cuda(devices) => devices.between_nodes(options),
            Place::Cpu => {
                let precision = options.precision.on_cpu(spec.dtype);
                let cache = cpu_dtype(options, precision)?;
                let overlap = match options.overlap_prefill_rows {
                    // Every rank must take the sums that the others take.
                    Some(rows) => format!(", halves overlap from {rows} rows"),
                    None => String::new(),
                };
                Ok(format!("{precision:?} products, {cache} cache{overlap}"))
            }
        }
    }

    /// Loads the weights on ranks of this process; `progress` hears (bytes read, bytes in all).
    ///
    /// # Errors
    /// The checkpoint's and the device's.
    pub fn load(&self, loading: Loading<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<Placed> {
        match &self.place {
            Place::Cpu => CpuRanks(loading).place(progress),
            Place::Cuda(devices) => CudaRanks { devices, loading }.place(progress),
        }
    }

    /// As [`Self::load`] for the leader of several nodes.
    ///
    /// # Errors
    /// As [`Self::load`]; that the group has ended meanwhile.
    pub fn lead(
        &self,
        loading: Loading<'_>,
        local: LocalRanks,
        nodes: RemoteNodes,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Placed> {
        match &self.place {
            Place::Cpu => CpuRanks(loading).lead(local, Some(nodes), progress),
            Place::Cuda(devices) => CudaRanks { devices, loading }.lead(local, Some(nodes), progress),
        }
    }

    /// Loads this node's ranks and does what the leader says until it ends the group.
    ///
    /// # Errors
    /// As [`Self::load`]; why the group ended.
    pub fn work(
        &self,
        loading: Loading<'_>,
        local: LocalRanks,
        worker: &Worker,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        match &self.place {
            Place::Cpu => CpuRanks(loading).work(local, worker, progress),
            Place::Cuda(devices) => CudaRanks { devices, loading }.work(local, worker, progress),
        }
    }
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
        Device::Auto => ("cuda", gpu::open(0).map_err(|e| cuda_error("cuda", e))?, ARENA_BYTES),
        Device::Cuda(n) => {
            ("cuda", gpu::open(n).map_err(|e| cuda_error(&format!("cuda:{n}"), e))?, ARENA_BYTES)
        }
    };
    let arena = Arena::new(&driver, arena_bytes).map_err(|e| cuda_error(name, e))?;
    let context = Context::new(driver, arena, variant(options.kernels), Element::Bf16);
    Ok((context.map_err(|e| cuda_error(name, e))?, name != "emulated"))
}

pub(crate) fn variant(kernels: Kernels) -> Variant {
    match kernels {
        Kernels::Auto => Variant::Auto,
        Kernels::Plain => Variant::Plain,
        Kernels::Mma => Variant::Mma,
    }
}

/// The pool of all ranks together.
pub(crate) fn layout(spec: &ModelSpec, positions: &PositionProfile, blocks: usize, dtype: DType) -> KvLayout {
    RankShard::whole(spec).kv_layout(spec, positions.block_size(), blocks, dtype)
}

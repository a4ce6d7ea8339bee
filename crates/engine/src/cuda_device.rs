//! CUDA devices, real or emulated, as the place of a model: one device, or a tensor-parallel group with a device a rank.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use longhaul_backend::{Collective, DType, KvLayout, Single};
use longhaul_cuda::driver::{Driver, Element, Emulated};
use longhaul_cuda::group::{Group, between_nodes};
use longhaul_cuda::{Cuda, CudaError, Limits};
use longhaul_model::{Model, ModelSpec, PositionProfile, RankShard, ShardPlan};

use crate::cuda_runner::CudaRunner;
use crate::device::{DeviceOptions, Placed, variant};
use crate::local_ranks::{Loading, LocalRanks, Ranks};
use crate::memory_budget::{Available, CudaPlan, MemoryBudget};
use crate::runner::RankRunner;
use crate::{EngineError, Result, gpu};

/// Rows of a prefill step on a CUDA device: enough for full matrix speed; the arena is sized for them.
const CUDA_ROWS: usize = 2048;
/// As above where every row costs milliseconds.
const EMULATED_ROWS: usize = 512;
/// Sequences of a step.
const CUDA_SEQUENCES: usize = 64;
/// Rows of a step whose logits may be wanted.
const CUDA_LOGIT_ROWS: usize = 64;
/// Longest time that emulated ranks may go without progress unless the user says: a step of theirs can take minutes.
const EMULATED_STEP_TIMEOUT: Duration = Duration::from_secs(600);

/// Opened devices, one a rank.
pub(crate) struct CudaDevices {
    /// As the user would name them.
    name: String,
    drivers: Vec<Arc<dyn Driver>>,
    /// The rank of the first device.
    first_rank: usize,
    is_emulated: bool,
}

impl CudaDevices {
    /// An emulated device for each of `ranks`, those of this node.
    ///
    /// # Errors
    /// [`EngineError::Device`] where this build has none.
    pub fn emulated(options: &DeviceOptions, ranks: Range<usize>) -> Result<Self> {
        let open = |_| -> Result<Arc<dyn Driver>> {
            let driver = Emulated::new(options.emulator).map_err(|e| cuda_error("emulated", e))?;
            Ok(Arc::new(driver))
        };
        let first_rank = ranks.start;
        let drivers = ranks.map(open).collect::<Result<_>>()?;
        Ok(Self { name: "emulated".into(), drivers, first_rank, is_emulated: true })
    }

    /// As many GPUs as `ranks`, those of this node, from `first` on.
    ///
    /// # Errors
    /// [`EngineError::Device`] or [`EngineError::Memory`] with the remedy.
    pub fn gpus(first: usize, ranks: Range<usize>) -> Result<Self> {
        let (first_rank, ranks) = (ranks.start, ranks.len().max(1));
        let last = first.saturating_add(ranks - 1);
        let name = if ranks == 1 { format!("cuda:{first}") } else { format!("cuda:{first} to cuda:{last}") };
        if ranks > 1 {
            let there = gpu::count().map_err(|e| cuda_error(&name, e))?;
            if last >= there {
                let from = if first == 0 { String::new() } else { format!(" from cuda:{first} on") };
                let fits = there.saturating_sub(first);
                let remedy = match fits {
                    0 | 1 => "leave --tp off".into(),
                    _ => format!("use --tp {fits} or less"),
                };
                return Err(EngineError::Device {
                    device: name,
                    message: format!(
                        "{ranks} ranks of --tp need {ranks} devices{from}, and this machine has {there}; {remedy}, or use --device cpu"
                    ),
                });
            }
        }
        let open = |ordinal| gpu::open(ordinal).map_err(|e| cuda_error(&format!("cuda:{ordinal}"), e));
        let drivers = (first..=last).map(open).collect::<Result<_>>()?;
        Ok(Self { name, drivers, first_rank, is_emulated: false })
    }

    /// Whether they take the host's memory.
    pub fn is_on_host(&self) -> bool {
        self.is_emulated
    }

    /// As the user would name them.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The way that sums go between nodes, and the precision, in words: what must be the same on all nodes.
    ///
    /// # Errors
    /// [`EngineError::Device`] when `--all-reduce` asks for one that is not possible.
    pub fn between_nodes(&self, options: &DeviceOptions) -> Result<String> {
        let way = between_nodes(&self.drivers, options.all_reduce).map_err(|e| cuda_error(&self.name, e))?;
        let element = options.precision.on_cuda();
        let auto = if element == Element::F32 { DType::F32 } else { DType::BF16 };
        let cache = options.kv_cache_dtype.on_cuda(auto);
        let graphs = if options.enforce_eager { ", eager" } else { "" };
        Ok(format!("{element:?} products on CUDA devices, {cache} cache, sums by {way}{graphs}"))
    }

    /// How a rank lays out its part of the model.
    fn setup(
        &self,
        options: &DeviceOptions,
        spec: &ModelSpec,
        (positions, blocks): (&PositionProfile, usize),
        shard: &RankShard,
    ) -> Setup {
        let element = options.precision.on_cuda();
        let dtype = if element == Element::F32 { DType::F32 } else { DType::BF16 };
        let block_size = positions.block_size();
        let layout = shard.kv_layout(spec, block_size, blocks, options.kv_cache_dtype.on_cuda(dtype));
        let rows = if self.is_emulated { EMULATED_ROWS } else { CUDA_ROWS };
        let rows = options.max_step_rows.map_or(rows.min(positions.max_model_len).max(1), NonZeroUsize::get);
        let sequences = options.max_sequences.map_or(CUDA_SEQUENCES, NonZeroUsize::get);
        let limits = Limits {
            rows,
            sequences,
            // Sequences may share blocks, so the pool is no bound.
            blocks: sequences.saturating_mul(positions.blocks()),
            logit_rows: sequences.max(CUDA_LOGIT_ROWS),
        };
        Setup { element, layout, limits }
    }

    /// What is free for each rank: on a GPU of its own, or in the host's memory for all together.
    ///
    /// # Errors
    /// The driver's.
    pub fn available(&self, options: &DeviceOptions) -> Result<Vec<Available>> {
        if self.is_emulated {
            return Ok(vec![Available::on_host()]);
        }
        let free = |(rank, driver): (usize, &Arc<dyn Driver>)| {
            let free = driver.free_bytes().map_err(|e| cuda_error(&self.name, e))?;
            let total = driver.properties().memory_bytes;
            let available = Available::on_gpu(free, total, options.gpu_memory_utilization);
            Ok(if self.drivers.len() == 1 { available } else { available.of_rank(self.first_rank + rank) })
        };
        self.drivers.iter().enumerate().map(free).collect()
    }

    /// What the model takes: of the rank with the least room left, or of all ranks where they share the host's memory.
    pub fn budget(
        &self,
        options: &DeviceOptions,
        spec: &ModelSpec,
        plan: &ShardPlan,
        (positions, blocks): (&PositionProfile, usize),
        available: &[Available],
    ) -> MemoryBudget {
        let of_rank = |(rank, driver): (usize, &Arc<dyn Driver>)| {
            let shard = plan.ranks().get(self.first_rank + rank)?;
            let setup = self.setup(options, spec, (positions, blocks), shard);
            let cuda = CudaPlan {
                element: setup.element,
                limits: &setup.limits,
                driver: driver.as_ref(),
                graphs: !options.enforce_eager && !self.is_emulated,
            };
            let available = available.get(rank).or(available.first())?;
            Some(MemoryBudget::on_cuda(
                spec,
                positions,
                (plan, shard),
                &setup.layout,
                &cuda,
                available.clone(),
            ))
        };
        let budgets = self.drivers.iter().enumerate().filter_map(of_rank);
        if self.is_emulated { MemoryBudget::sum(budgets) } else { MemoryBudget::tightest(budgets) }
    }
}

/// A model on its way to CUDA devices.
pub(crate) struct CudaRanks<'a> {
    pub devices: &'a CudaDevices,
    pub loading: Loading<'a>,
}

impl CudaRanks<'_> {
    /// Loads the model on the devices of this process.
    ///
    /// # Errors
    /// The checkpoint's and the device's; of a group by the rank's number.
    pub fn place(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Placed> {
        let ranks = self.loading.plan.ranks().len();
        if ranks != 1 {
            return self.lead(LocalRanks::alone(ranks)?, None, progress);
        }
        let mut ranks = self.place_ranks(vec![Arc::new(Single)])?;
        let Some(rank) = ranks.pop() else {
            return Err(EngineError::Parameter { name: "--tp", message: "must be at least 1".into() });
        };
        let runner = self.load(rank, progress)?;
        let description = runner.description();
        Ok(self.loading.placed(Box::new(runner), description))
    }
}

impl Ranks for CudaRanks<'_> {
    type Rank = Rank;
    type Runner = CudaRunner;

    fn loading(&self) -> Loading<'_> {
        self.loading
    }

    fn name(&self) -> &str {
        &self.devices.name
    }

    fn place_ranks(&self, ranks: Vec<Arc<dyn Collective>>) -> Result<Vec<Rank>> {
        let drivers = &self.devices.drivers;
        let groups = Group::connect(drivers, ranks, self.loading.options.all_reduce)
            .map_err(|e| cuda_error(&self.devices.name, e))?;
        Ok(groups
            .into_iter()
            .zip(drivers)
            .map(|(group, driver)| Rank { group, driver: driver.clone() })
            .collect())
    }

    fn collective<'a>(&self, rank: &'a Rank) -> &'a Arc<dyn Collective> {
        rank.group.collective()
    }

    fn load(&self, rank: Rank, progress: &mut dyn FnMut(u64, u64)) -> Result<CudaRunner> {
        let Loading { options, spec, positions, blocks, plan, source } = self.loading;
        let number = rank.group.rank();
        let shard = plan.ranks().get(number).ok_or_else(|| EngineError::Parameter {
            name: "--tp",
            message: format!("rank {number} of {}", plan.ranks().len()),
        })?;
        let Setup { element, layout, limits } = self.devices.setup(options, spec, (positions, blocks), shard);
        let cuda = Cuda::new(rank.driver, variant(options.kernels), element, &shard.widths(spec), limits)
            .and_then(|cuda| cuda.in_group(rank.group))
            .map_err(|e| cuda_error(&self.devices.name, e))?;
        let model = Model::load_shard(cuda, spec, positions, (plan, number), source, progress)?;
        CudaRunner::new(model, layout, !options.enforce_eager)
    }

    fn step_timeout(&self) -> Option<Duration> {
        self.loading.options.step_timeout.or(self.devices.is_emulated.then_some(EMULATED_STEP_TIMEOUT))
    }
}

/// A rank before its shard is loaded.
pub(crate) struct Rank {
    group: Group,
    driver: Arc<dyn Driver>,
}

/// How a rank's part of a model is laid out on its device.
struct Setup {
    element: Element,
    layout: KvLayout,
    limits: Limits,
}

/// The error of a device as the engine's.
pub(crate) fn cuda_error(device: &str, error: CudaError) -> EngineError {
    match error {
        CudaError::Unavailable { message } => EngineError::Device { device: device.into(), message },
        CudaError::OutOfMemory { .. } => {
            EngineError::Memory { device: device.into(), message: error.to_string() }
        }
        other => EngineError::Backend(other.into()),
    }
}

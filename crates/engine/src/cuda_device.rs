//! CUDA devices, real or emulated, as the place of a model: one device, or a tensor-parallel group with a device a rank.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use longhaul_backend::{Collective, DType, KvLayout, Single};
use longhaul_collective::{Options as GroupOptions, Pulse, Threads};
use longhaul_cuda::driver::{Driver, Element, Emulated};
use longhaul_cuda::group::Group;
use longhaul_cuda::{Cuda, CudaError, Limits};
use longhaul_model::{Model, ModelSpec, PositionProfile, RankShard, ShardPlan};
use longhaul_weights::TensorSource;

use crate::cuda_runner::CudaRunner;
use crate::device::{DeviceOptions, Placed, variant};
use crate::memory_budget::{Available, CudaPlan, MemoryBudget};
use crate::ranks::{Follower, RankedRunner, Watch};
use crate::runner::{RankRunner, Runner};
use crate::watchdog::Watchdog;
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
    is_emulated: bool,
}

impl CudaDevices {
    /// `ranks` emulated devices.
    ///
    /// # Errors
    /// [`EngineError::Device`] where this build has none.
    pub fn emulated(options: &DeviceOptions) -> Result<Self> {
        let open = |_| -> Result<Arc<dyn Driver>> {
            let driver = Emulated::new(options.emulator).map_err(|e| cuda_error("emulated", e))?;
            Ok(Arc::new(driver))
        };
        let drivers = (0..options.tensor_parallel.max(1)).map(open).collect::<Result<_>>()?;
        Ok(Self { name: "emulated".into(), drivers, is_emulated: true })
    }

    /// As many GPUs as there are ranks, from `first` on.
    ///
    /// # Errors
    /// [`EngineError::Device`] or [`EngineError::Memory`] with the remedy.
    pub fn gpus(first: usize, options: &DeviceOptions) -> Result<Self> {
        let ranks = options.tensor_parallel.max(1);
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
                        "--tp {ranks} needs {ranks} devices{from}, and this machine has {there}; {remedy}, or use --device cpu"
                    ),
                });
            }
        }
        let open = |ordinal| gpu::open(ordinal).map_err(|e| cuda_error(&format!("cuda:{ordinal}"), e));
        let drivers = (first..=last).map(open).collect::<Result<_>>()?;
        Ok(Self { name, drivers, is_emulated: false })
    }

    /// As the user would name them.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How a rank lays out its part of the model.
    fn setup(
        &self,
        options: &DeviceOptions,
        spec: &ModelSpec,
        positions: &PositionProfile,
        shard: &RankShard,
    ) -> Setup {
        let element = options.precision.on_cuda();
        let dtype = if element == Element::F32 { DType::F32 } else { DType::BF16 };
        let block_size = positions.block_size();
        let blocks = positions.max_model_len.div_ceil(block_size);
        let layout = shard.kv_layout(spec, block_size, blocks, options.kv_cache_dtype.on_cuda(dtype));
        let rows = if self.is_emulated { EMULATED_ROWS } else { CUDA_ROWS };
        let limits = Limits {
            rows: rows.min(positions.max_model_len).max(1),
            sequences: CUDA_SEQUENCES,
            // A decode batch shares the pool, but a padded one names its last table again for every padding row.
            blocks: layout.blocks * 9,
            logit_rows: CUDA_LOGIT_ROWS,
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
            Ok(if self.drivers.len() == 1 { available } else { available.of_rank(rank) })
        };
        self.drivers.iter().enumerate().map(free).collect()
    }

    /// What the model takes: of the rank with the least room left, or of all ranks where they share the host's memory.
    pub fn budget(
        &self,
        options: &DeviceOptions,
        spec: &ModelSpec,
        plan: &ShardPlan,
        positions: &PositionProfile,
        available: &[Available],
    ) -> MemoryBudget {
        let of_rank = |(rank, driver): (usize, &Arc<dyn Driver>)| {
            let shard = plan.ranks().get(rank)?;
            let setup = self.setup(options, spec, positions, shard);
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

    /// Loads every rank's shard, each on a thread of its own but the first.
    ///
    /// # Errors
    /// The checkpoint's and the device's; of a group by the rank's number.
    pub fn place(
        self,
        options: &DeviceOptions,
        spec: &ModelSpec,
        positions: &PositionProfile,
        plan: &ShardPlan,
        source: &(dyn TensorSource + Sync),
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Placed> {
        let load = |rank: Rank, progress: &mut dyn FnMut(u64, u64)| -> Result<CudaRunner> {
            let number = rank.group.rank();
            let shard = plan.ranks().get(number).ok_or_else(|| EngineError::Parameter {
                name: "--tp",
                message: format!("rank {number} of {}", plan.ranks().len()),
            })?;
            let Setup { element, layout, limits } = self.setup(options, spec, positions, shard);
            let name = rank.name;
            let cuda = Cuda::new(rank.driver, variant(options.kernels), element, &shard.widths(spec), limits)
                .and_then(|cuda| cuda.in_group(rank.group))
                .map_err(|e| cuda_error(&name, e))?;
            let model = Model::load_shard(cuda, spec, positions, (plan, number), source, progress)?;
            CudaRunner::new(model, layout, !options.enforce_eager)
        };
        let (block_size, blocks) =
            (positions.block_size(), positions.max_model_len.div_ceil(positions.block_size()));
        let (ranks, pulse) = self.ranks(options)?;
        let mut ranks = ranks.into_iter();
        let Some(first) = ranks.next() else {
            return Err(EngineError::Parameter { name: "--tp", message: "must be at least 1".into() });
        };
        if ranks.len() == 0 {
            let runner = load(first, progress)?;
            let description = runner.description();
            return Ok(Placed { runner: Box::new(runner), blocks, block_size, description });
        }
        let group = first.group.collective().clone();
        let watch = self.watch(options, spec, &group, pulse)?;
        let others: Vec<Rank> = ranks.collect();
        let collectives: Vec<_> = others.iter().map(|rank| rank.group.collective().clone()).collect();
        // A rank that cannot load ends the group: nobody waits for it.
        let load = |rank: Rank, progress: &mut dyn FnMut(u64, u64)| {
            let (number, collective) = (rank.group.rank(), rank.group.collective().clone());
            load(rank, progress).map_err(|source| {
                collective.abort(&source.to_string());
                EngineError::Rank { rank: number, source: Box::new(source) }
            })
        };
        let (leader, loaded) = thread::scope(|scope| {
            let load = &load;
            let threads: Vec<_> =
                others.into_iter().map(|rank| scope.spawn(move || load(rank, &mut |_, _| {}))).collect();
            let leader = load(first, progress);
            let loaded: Vec<Result<CudaRunner>> = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect();
            (leader, loaded)
        });
        let leader = leader?;
        let mut followers = Vec::with_capacity(collectives.len());
        for (group, runner) in collectives.into_iter().zip(loaded) {
            let (rank, mut runner) = (group.rank(), runner?);
            let follower = Follower::spawn(group, move |inputs| runner.follow(inputs));
            followers.push(follower.map_err(|e| EngineError::Device {
                device: self.name.clone(),
                message: format!("the thread of rank {rank} could not be started: {e}"),
            })?);
        }
        let description = leader.description();
        let runner: Box<dyn Runner> =
            Box::new(RankedRunner::new(Box::new(leader), group, followers).watched(watch));
        Ok(Placed { runner, blocks, block_size, description })
    }

    /// Watches the steps of a group. Where sums do not pass the host, the end of a step is the only progress it sees.
    fn watch(
        &self,
        options: &DeviceOptions,
        spec: &ModelSpec,
        group: &Arc<dyn Collective>,
        pulse: Option<Pulse>,
    ) -> Result<Watch> {
        let limit = options.step_timeout.or(self.is_emulated.then_some(EMULATED_STEP_TIMEOUT));
        let watchdog = Watchdog::start(group.clone(), pulse, limit, options.group_lost).map_err(|e| {
            let message = format!("the watchdog could not be started: {e}");
            EngineError::Device { device: self.name.clone(), message }
        })?;
        let spec = spec.clone();
        Ok(Watch { watchdog, operations: Box::new(move |context| spec.flops_per_token(context, true)) })
    }

    /// The ranks of a group over the devices, and the pulse of what they exchange through the host.
    fn ranks(&self, options: &DeviceOptions) -> Result<(Vec<Rank>, Option<Pulse>)> {
        let count = self.drivers.len();
        let mut pulse = None;
        let collectives: Vec<Arc<dyn Collective>> = if count == 1 {
            vec![Arc::new(Single)]
        } else {
            // Ranks wait without end: the watchdog ends a step in which nothing moves.
            let options = GroupOptions { timeout: Duration::MAX, ..GroupOptions::default() };
            let threads = Threads::group(count, options)
                .map_err(|e| EngineError::Parameter { name: "--tp", message: e.to_string() })?;
            pulse = threads.first().map(Threads::pulse);
            threads.into_iter().map(|rank| Arc::new(rank) as Arc<dyn Collective>).collect()
        };
        let groups = Group::connect(&self.drivers, collectives, options.all_reduce)
            .map_err(|e| cuda_error(&self.name, e))?;
        let rank = |(group, driver): (Group, &Arc<dyn Driver>)| Rank {
            group,
            driver: driver.clone(),
            name: self.name.clone(),
        };
        Ok((groups.into_iter().zip(&self.drivers).map(rank).collect(), pulse))
    }
}

/// A rank before its shard is loaded.
struct Rank {
    group: Group,
    driver: Arc<dyn Driver>,
    /// Of all devices.
    name: String,
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

//! The CPU as a device: one rank, or a tensor-parallel group of threads, on one node or several.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use longhaul_backend::{Collective, DType, KvLayout, Single};
use longhaul_collective::{Options as GroupOptions, Pulse, Threads};
use longhaul_cpu::Cpu;
use longhaul_model::{Model, ModelSpec, PositionProfile, ShardPlan};
use longhaul_weights::TensorSource;

use crate::device::{DeviceOptions, Placed};
use crate::nodes::{RemoteNodes, Worker};
use crate::ranks::{Follower, RankedRunner, Watch};
use crate::runner::{CpuRunner, RankRunner};
use crate::watchdog::Watchdog;
use crate::{EngineError, Result};

/// A model on its way to ranks of the CPU.
pub(crate) struct CpuRanks<'a> {
    pub options: &'a DeviceOptions,
    pub spec: &'a ModelSpec,
    pub positions: &'a PositionProfile,
    pub plan: &'a ShardPlan,
    pub source: &'a (dyn TensorSource + Sync),
}

/// Those of a group's ranks that live here.
pub(crate) struct LocalRanks {
    pub ranks: Vec<Arc<dyn Collective>>,
    pub pulse: Pulse,
}

impl CpuRanks<'_> {
    /// Loads the model on ranks of this process.
    ///
    /// # Errors
    /// Those of the checkpoint; a rank that cannot be set up, by its number.
    pub(crate) fn place(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Placed> {
        let ranks = self.plan.ranks().len();
        if ranks == 1 {
            let single: Arc<dyn Collective> = Arc::new(Single);
            let runner = self.load(&single, self.options.threads, progress)?;
            let description = runner.description();
            return Ok(self.placed(Box::new(runner), description));
        }
        // Ranks wait without end: the watchdog ends a step in which nothing moves.
        let options = GroupOptions { timeout: Duration::MAX, ..GroupOptions::default() };
        let of_tp = |message: String| EngineError::Parameter { name: "--tp", message };
        let threads = Threads::group(ranks, options).map_err(|e| of_tp(e.to_string()))?;
        let pulse = threads.first().map(Threads::pulse).ok_or_else(|| of_tp("must be at least 1".into()))?;
        let ranks = threads.into_iter().map(|rank| Arc::new(rank) as Arc<dyn Collective>).collect();
        self.lead(LocalRanks { ranks, pulse }, None, progress)
    }

    /// Loads this node's ranks, of which the first is the leader, and waits for those of other nodes.
    ///
    /// # Errors
    /// As [`Self::place`]; that the group has ended meanwhile.
    pub(crate) fn lead(
        &self,
        local: LocalRanks,
        nodes: Option<RemoteNodes>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Placed> {
        let watch = self.watch(&local)?;
        let loaded = self.load_all(local.ranks, progress).inspect_err(|error| {
            if let Some(nodes) = &nodes {
                nodes.abort(&error.to_string());
            }
        });
        let mut loaded = loaded?.into_iter();
        let Some((group, leader)) = loaded.next() else {
            return Err(EngineError::Parameter { name: "--tp", message: "must be at least 1".into() });
        };
        let followers = loaded.map(|(group, runner)| follower(group, runner)).collect::<Result<_>>()?;
        let ranks = self.plan.ranks().len();
        let description = format!("{}, rank 0 of {ranks}", leader.description());
        let mut runner = RankedRunner::new(Box::new(leader), group, followers).watched(watch);
        if let Some(nodes) = nodes {
            nodes.wait_until_ready()?;
            runner = runner.with_nodes(nodes);
        }
        Ok(self.placed(Box::new(runner), description))
    }

    /// Loads this node's ranks and does what the leader says until it ends the group.
    ///
    /// # Errors
    /// As [`Self::place`]; why the group ended.
    pub(crate) fn work(
        &self,
        local: LocalRanks,
        worker: &Worker,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let watch = self.watch(&local)?;
        let loaded = self.load_all(local.ranks, progress).inspect_err(|e| worker.abort(&e.to_string()))?;
        let followers: Vec<Follower> =
            loaded.into_iter().map(|(group, runner)| follower(group, runner)).collect::<Result<_>>()?;
        worker.run(followers, &watch)
    }

    fn placed(&self, runner: Box<dyn crate::runner::Runner>, description: String) -> Placed {
        let block_size = self.positions.block_size();
        Placed { runner, blocks: self.blocks(), block_size, description }
    }

    fn blocks(&self) -> usize {
        self.positions.max_model_len.div_ceil(self.positions.block_size())
    }

    fn watch(&self, local: &LocalRanks) -> Result<Watch> {
        let group = local.ranks.first().cloned().ok_or_else(|| cpu_error("no ranks".into()))?;
        let options = self.options;
        let watchdog =
            Watchdog::start(group, Some(local.pulse.clone()), options.step_timeout, options.group_lost)
                .map_err(|e| cpu_error(format!("the watchdog could not be started: {e}")))?;
        let spec = self.spec.clone();
        Ok(Watch { watchdog, operations: Box::new(move |context| spec.flops_per_token(context, true)) })
    }

    /// Loads every rank on a thread of its own but the first.
    fn load_all(
        &self,
        groups: Vec<Arc<dyn Collective>>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<(Arc<dyn Collective>, CpuRunner)>> {
        #[cfg(feature = "faults")]
        let groups: Vec<_> = groups.into_iter().map(crate::faults::plant).collect();
        let threads = match self.options.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let threads = (threads / groups.len().max(1)).max(1);
        let loaded: Vec<Result<CpuRunner>> = thread::scope(|scope| {
            let (first, others) = groups.split_at(groups.len().min(1));
            let others: Vec<_> = others
                .iter()
                .map(|group| scope.spawn(move || self.load(group, threads, &mut |_, _| {})))
                .collect();
            let first: Vec<_> = first.iter().map(|group| self.load(group, threads, progress)).collect();
            let others = others
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            first.into_iter().chain(others).collect()
        });
        let ranked = groups.into_iter().zip(loaded).map(|(group, runner)| {
            let rank = group.rank();
            let of_rank = |source| EngineError::Rank { rank, source: Box::new(source) };
            runner.map(|runner| (group, runner)).map_err(of_rank)
        });
        ranked.collect()
    }

    fn load(
        &self,
        group: &Arc<dyn Collective>,
        threads: usize,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CpuRunner> {
        let precision = self.options.precision.on_cpu(self.spec.dtype);
        let cpu = Cpu::new(threads, precision).map_err(|e| cpu_error(e.to_string()))?.in_group(group.clone());
        let (rank, ranks) = (group.rank(), self.plan.ranks());
        let model =
            Model::load_shard(cpu, self.spec, self.positions, (self.plan, rank), self.source, progress)?;
        let shard = ranks.get(rank).ok_or_else(|| EngineError::Parameter {
            name: "--tp",
            message: format!("rank {rank} of {}", ranks.len()),
        })?;
        let dtype = cpu_dtype(self.options, precision)?;
        let layout: KvLayout = shard.kv_layout(self.spec, self.positions.block_size(), self.blocks(), dtype);
        CpuRunner::new(model, layout)
    }
}

fn follower(group: Arc<dyn Collective>, mut runner: CpuRunner) -> Result<Follower> {
    let rank = group.rank();
    let step = move |inputs| {
        // It may come from another node.
        runner.check(&inputs)?;
        runner.follow(inputs)
    };
    Follower::spawn(group, step)
        .map_err(|e| cpu_error(format!("the thread of rank {rank} could not be started: {e}")))
}

fn cpu_error(message: String) -> EngineError {
    EngineError::Device { device: "cpu".into(), message }
}

/// Element of the KV cache on the CPU.
pub(crate) fn cpu_dtype(options: &DeviceOptions, precision: longhaul_cpu::Precision) -> Result<DType> {
    let auto = match precision {
        longhaul_cpu::Precision::F32 => DType::F32,
        longhaul_cpu::Precision::Bf16 => DType::BF16,
    };
    options.kv_cache_dtype.on_cpu(auto)
}

//! The CPU as a device: one rank, or a tensor-parallel group of threads.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use longhaul_backend::{Collective, DType, Single};
use longhaul_collective::{Options as GroupOptions, Threads};
use longhaul_cpu::Cpu;
use longhaul_model::{Model, ModelSpec, PositionProfile, ShardPlan};
use longhaul_weights::TensorSource;

use crate::device::{DeviceOptions, Placed};
use crate::ranks::{Follower, RankedRunner};
use crate::runner::{CpuRunner, RankRunner};
use crate::{EngineError, Result};

/// Longest time that a CPU rank waits for the others in one collective: on few cores they take turns.
const RANK_TIMEOUT: Duration = Duration::from_secs(600);

/// Loads the model's shards, one a rank of `plan`, each on a thread of its own but the first.
///
/// # Errors
/// Those of the checkpoint; a rank that cannot be set up, by its number.
pub(crate) fn place_on_cpu(
    options: &DeviceOptions,
    spec: &ModelSpec,
    positions: &PositionProfile,
    plan: &ShardPlan,
    source: &(dyn TensorSource + Sync),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Placed> {
    let precision = options.precision.on_cpu(spec.dtype);
    let dtype = cpu_dtype(options, precision)?;
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
        let follower = Follower::spawn(group, move |inputs, goal| runner.follow(inputs, goal));
        followers.push(follower.map_err(|e| EngineError::Device {
            device: "cpu".into(),
            message: format!("the thread of rank {rank} could not be started: {e}"),
        })?);
    }
    let description = format!("{}, rank 0 of {ranks}", leader.description());
    let runner = Box::new(RankedRunner::new(Box::new(leader), group, followers));
    Ok(Placed { runner, blocks, block_size, description })
}

/// Element of the KV cache on the CPU.
pub(crate) fn cpu_dtype(options: &DeviceOptions, precision: longhaul_cpu::Precision) -> Result<DType> {
    let auto = match precision {
        longhaul_cpu::Precision::F32 => DType::F32,
        longhaul_cpu::Precision::Bf16 => DType::BF16,
    };
    options.kv_cache_dtype.on_cpu(auto)
}

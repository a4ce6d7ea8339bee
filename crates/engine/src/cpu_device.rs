//! The CPU as a device: one rank, or a tensor-parallel group of threads, on one node or several.

use std::sync::Arc;
use std::thread;

use longhaul_backend::{Collective, DType, KvLayout, Single};
use longhaul_cpu::Cpu;
use longhaul_model::Model;

use crate::device::{DeviceOptions, Placed};
use crate::local_ranks::{Loading, LocalRanks, Ranks};
use crate::runner::{CpuRunner, RankRunner};
use crate::{EngineError, Result};

/// A model on its way to ranks of the CPU.
pub(crate) struct CpuRanks<'a>(pub Loading<'a>);

/// A rank with threads of its own.
pub(crate) struct CpuRank {
    group: Arc<dyn Collective>,
    threads: usize,
}

impl CpuRanks<'_> {
    /// Loads the model on ranks of this process.
    ///
    /// # Errors
    /// Those of the checkpoint; a rank that cannot be set up, by its number.
    pub(crate) fn place(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Placed> {
        let ranks = self.0.plan.ranks().len();
        if ranks != 1 {
            return self.lead(LocalRanks::alone(ranks)?, None, progress);
        }
        let rank = CpuRank { group: Arc::new(Single), threads: self.0.options.threads };
        let runner = self.load(rank, progress)?;
        let description = runner.description();
        Ok(self.0.placed(Box::new(runner), description))
    }
}

impl Ranks for CpuRanks<'_> {
    type Rank = CpuRank;
    type Runner = CpuRunner;

    fn loading(&self) -> Loading<'_> {
        self.0
    }

    fn name(&self) -> &str {
        "cpu"
    }

    fn place_ranks(&self, ranks: Vec<Arc<dyn Collective>>) -> Result<Vec<CpuRank>> {
        #[cfg(feature = "faults")]
        let ranks: Vec<_> = ranks.into_iter().map(crate::faults::plant).collect();
        let threads = match self.0.options.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let threads = (threads / ranks.len().max(1)).max(1);
        Ok(ranks.into_iter().map(|group| CpuRank { group, threads }).collect())
    }

    fn collective<'a>(&self, rank: &'a CpuRank) -> &'a Arc<dyn Collective> {
        &rank.group
    }

    fn load(&self, rank: CpuRank, progress: &mut dyn FnMut(u64, u64)) -> Result<CpuRunner> {
        let Loading { options, spec, positions, blocks, plan, source } = self.0;
        let CpuRank { group, threads } = rank;
        let precision = options.precision.on_cpu(spec.dtype);
        let cpu = Cpu::new(threads, precision).map(|cpu| cpu.in_group(group.clone()));
        let cpu = match options.overlap_prefill_rows {
            Some(_) => cpu.and_then(Cpu::with_exchanger),
            None => cpu,
        };
        let cpu = cpu.map_err(|e| EngineError::Device { device: "cpu".into(), message: e.to_string() })?;
        let (rank, ranks) = (group.rank(), plan.ranks());
        let model = Model::load_shard(cpu, spec, positions, (plan, rank), source, progress)?;
        let shard = ranks.get(rank).ok_or_else(|| EngineError::Parameter {
            name: "--tp",
            message: format!("rank {rank} of {}", ranks.len()),
        })?;
        let dtype = cpu_dtype(options, precision)?;
        let layout: KvLayout = shard.kv_layout(spec, positions.block_size(), blocks, dtype);
        CpuRunner::new(model.overlapping(options.overlap_prefill_rows), layout)
    }

    fn describe(&self, leader: &CpuRunner) -> String {
        format!("{}, rank 0 of {}", leader.description(), self.0.plan.ranks().len())
    }
}

/// Element of the KV cache on the CPU.
pub(crate) fn cpu_dtype(options: &DeviceOptions, precision: longhaul_cpu::Precision) -> Result<DType> {
    let auto = match precision {
        longhaul_cpu::Precision::F32 => DType::F32,
        longhaul_cpu::Precision::Bf16 => DType::BF16,
    };
    options.kv_cache_dtype.on_cpu(auto)
}

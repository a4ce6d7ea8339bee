//! What a model will take, before anything is loaded: a start that cannot fit stops here with a table.

use std::fmt;
use std::ops::Range;

use longhaul_backend::KvLayout;
use longhaul_cuda::driver::{Driver, Element};
use longhaul_cuda::ops::comm::{PeerOptions, Region};
use longhaul_cuda::{Cuda, Limits, matrix_bytes};
use longhaul_model::{ModelSpec, PositionProfile, RankShard, ShardPlan};
use longhaul_weights::Slice;

use crate::device::{Fitted, KvPool};
use crate::{EngineError, Result};

/// The pool's line.
const POOL: &str = "KV pool";
/// Graphs of recorded steps and the code that libraries load at first use.
const GRAPH_BYTES: u64 = 256 << 20;
/// Rows of a step on the CPU, unless the request chooses others.
const CPU_ROWS: u64 = 512;

/// Bytes by purpose, and what there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemoryBudget {
    /// Purpose, bytes, remark.
    lines: Vec<(&'static str, u64, String)>,
    available: u64,
    /// How `available` came about.
    remark: String,
}

/// The memory of a device that a model may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Available {
    /// Bytes.
    pub bytes: u64,
    /// How that came about.
    pub remark: String,
}

impl Available {
    /// What is free of `total` bytes when the process may fill the device up to the fraction `utilisation`.
    pub fn on_gpu(free: u64, total: u64, utilisation: f32) -> Self {
        let reserve = (total as f64 * (1.0 - f64::from(utilisation))) as u64;
        Self {
            bytes: free.saturating_sub(reserve),
            remark: format!("{} free of {}, --gpu-memory-utilization {utilisation}", size(free), size(total)),
        }
    }

    /// Says whose it is.
    pub fn of_rank(self, rank: usize) -> Self {
        Self { remark: format!("rank {rank}: {}", self.remark), ..self }
    }

    /// What the host can give without swapping: the kernel's estimate, within the control group's limit.
    pub fn on_host() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
        let system = read("/proc/meminfo").and_then(|text| mem_available(&text));
        let unified = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
        let legacy = number("/sys/fs/cgroup/memory/memory.limit_in_bytes")
            .zip(number("/sys/fs/cgroup/memory/memory.usage_in_bytes"));
        // The group's usage counts the page cache, which goes when it is needed.
        let cache = read("/sys/fs/cgroup/memory.stat")
            .or_else(|| read("/sys/fs/cgroup/memory/memory.stat"))
            .and_then(|text| reclaimable(&text));
        let group = unified
            .or(legacy)
            .map(|(limit, used)| limit.saturating_sub(used.saturating_sub(cache.unwrap_or(0))));
        let bytes = [system, group].into_iter().flatten().min();
        let remark = match (bytes, group) {
            // Where nothing is known, nothing is refused.
            (None, _) => "unknown",
            (_, Some(group)) if bytes == Some(group) => "within the control group's limit",
            _ => "MemAvailable",
        };
        Self { bytes: bytes.unwrap_or(u64::MAX), remark: remark.into() }
    }
}

/// `MemAvailable` of `/proc/meminfo`, bytes.
fn mem_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// File pages of a control group's `memory.stat` that can be dropped, bytes.
fn reclaimable(text: &str) -> Option<u64> {
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok())
    };
    field("inactive_file").or_else(|| field("total_inactive_file"))
}

impl MemoryBudget {
    /// A rank's part of the model on a CUDA device: exactly what [`Cuda`], the weights and the pool take, in the driver's pages.
    pub fn on_cuda(
        spec: &ModelSpec,
        positions: &PositionProfile,
        (plan, shard): (&ShardPlan, &RankShard),
        layout: &KvLayout,
        cuda: &CudaPlan<'_>,
        available: Available,
    ) -> Self {
        let (element, limits) = (cuda.element, cuda.limits);
        let weights = plan
            .tensors(shard)
            .map(|(tensor, _, slice)| {
                let cut = |whole: usize, part: &Range<usize>| part.len().min(whole);
                let bytes = match (tensor.shape.as_slice(), &slice) {
                    (&[rows, cols], Slice::Rows(part)) => matrix_bytes(cut(rows, part), cols, element),
                    (&[rows, cols], Slice::Cols(part)) => matrix_bytes(rows, cut(cols, part), element),
                    (&[rows, cols], Slice::All) => matrix_bytes(rows, cols, element),
                    (&[rows], Slice::Rows(part)) => 4 * cut(rows, part),
                    (shape, _) => 4 * shape.iter().product::<usize>(),
                } as u64;
                // The experts of a layer are one allocation.
                if tensor.name.contains(".mlp.experts.") { bytes } else { pages(bytes) }
            })
            .sum();
        let step = Cuda::step_bytes(&shard.widths(spec), limits, element, cuda.driver);
        let tables = 2 * pages((positions.table_rows() * spec.head_dim / 2 * 4) as u64);
        let mut lines = vec![
            ("weights", weights, String::new()),
            ("rotation tables", tables, String::new()),
            (POOL, pages(layout.bytes()), tokens_of(layout)),
            ("step arena", pages(step.arena as u64), format!("{} rows", limits.rows)),
            ("step inputs", step.inputs as u64, String::new()),
            ("logits", pages(step.logits as u64), format!("{} rows", limits.logit_rows)),
        ];
        if shard.world_size > 1 {
            let bytes = Region::bytes(PeerOptions::default().slice_bytes) as u64;
            lines.push(("exchange region", pages(bytes), String::new()));
        }
        if cuda.graphs {
            lines.push(("recorded steps", GRAPH_BYTES, String::new()));
        }
        Self { lines, available: available.bytes, remark: available.remark }
    }

    /// The budget with the least room left, of ranks with memories of their own.
    pub fn tightest(budgets: impl Iterator<Item = Self>) -> Self {
        let room = |budget: &Self| i128::from(budget.available) - i128::from(budget.total());
        budgets.min_by_key(room).unwrap_or_else(Self::nothing)
    }

    /// What ranks take together that share one memory: purpose by purpose.
    pub fn sum(budgets: impl Iterator<Item = Self>) -> Self {
        let add = |mut sum: Self, next: Self| {
            for ((_, bytes, _), (_, more, _)) in sum.lines.iter_mut().zip(next.lines) {
                *bytes = bytes.saturating_add(more);
            }
            sum
        };
        budgets.reduce(add).unwrap_or_else(Self::nothing)
    }

    fn nothing() -> Self {
        Self { lines: Vec::new(), available: 0, remark: String::new() }
    }

    /// The model on the CPU. `weight_bytes` is what the checkpoint holds.
    pub fn on_cpu(
        spec: &ModelSpec,
        positions: &PositionProfile,
        layout: &KvLayout,
        weight_bytes: u64,
        available: Available,
    ) -> Self {
        let intermediate = spec.moe.as_ref().map_or(spec.intermediate_size, |m| {
            (m.intermediate_size * m.top_k).max(m.shared_intermediate_size).max(spec.intermediate_size)
        });
        let widths = 6 * spec.hidden_size + 2 * spec.query_heads * spec.head_dim + 3 * intermediate;
        let step = CPU_ROWS * 4 * widths as u64 + 2 * 4 * spec.vocab_size as u64;
        let lines = vec![
            ("weights", weight_bytes, String::new()),
            ("rotation tables", (positions.table_rows() * spec.head_dim * 4) as u64, String::new()),
            (POOL, layout.bytes(), tokens_of(layout)),
            ("step", step, format!("{CPU_ROWS} rows")),
        ];
        Self { lines, available: available.bytes, remark: available.remark }
    }

    /// Bytes of the KV pool.
    pub fn pool(&self) -> u64 {
        self.lines.iter().filter(|(purpose, ..)| *purpose == POOL).map(|(_, bytes, _)| bytes).sum()
    }

    /// Bytes of all lines.
    pub fn total(&self) -> u64 {
        self.lines.iter().fold(0, |sum, (_, bytes, _)| sum.saturating_add(*bytes))
    }

    /// Whether everything fits.
    pub fn fits(&self) -> bool {
        self.total() <= self.available
    }
}

/// What decides a CUDA device's step memory, beside the shard.
pub(crate) struct CudaPlan<'a> {
    pub element: Element,
    pub limits: &'a Limits,
    pub driver: &'a dyn Driver,
    /// Decode steps are recorded on a GPU.
    pub graphs: bool,
}

fn tokens_of(layout: &KvLayout) -> String {
    format!("{} tokens", layout.blocks * layout.block_size)
}

/// Device memory comes in pages of 2 MiB, which only small allocations share.
fn pages(bytes: u64) -> u64 {
    const SMALL: u64 = 1 << 20;
    bytes.next_multiple_of(if bytes >= SMALL { 2 << 20 } else { 512 })
}

fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

impl fmt::Display for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, bytes: u64, remark: &str| {
            let remark = if remark.is_empty() { String::new() } else { format!("  {remark}") };
            writeln!(f, "  {name:<16}{:>12}{remark}", size(bytes))
        };
        for (name, bytes, remark) in &self.lines {
            line(name, *bytes, remark)?;
        }
        line("total", self.total(), "")?;
        line("available", self.available, &self.remark)
    }
}

/// Most of the host's memory that [`KvPool::Memory`] takes: other processes live there, too.
const MOST_ON_HOST: u64 = 4 << 30;

/// [`fit`], and the pool. `device` has a name, and takes the host's memory or its own.
///
/// # Errors
/// [`EngineError::Memory`]; [`EngineError::Parameter`] for a pool that does not hold one sequence of a context that is asked
/// for.
pub(crate) fn fit_with_pool(
    (device, on_host): (&str, bool),
    pool: KvPool,
    (wanted, asked): (PositionProfile, bool),
    profile: &dyn Fn(usize) -> Result<PositionProfile>,
    budget: &dyn Fn(&PositionProfile, usize) -> MemoryBudget,
) -> Result<Fitted> {
    let bytes = |positions: &PositionProfile, blocks| budget(positions, blocks).pool();
    // A pool of a given size bounds the context.
    let most = match pool {
        KvPool::OneContext | KvPool::Memory => usize::MAX,
        KvPool::Blocks(blocks) => blocks,
        KvPool::Bytes(most) => largest(MOST_BLOCKS, 1, &|blocks| bytes(&wanted, blocks) <= most).unwrap_or(0),
    };
    let wanted = match most.saturating_mul(wanted.block_size()) {
        0 => return Err(too_small("holds not one block".into())),
        tokens if tokens >= wanted.max_model_len => wanted,
        tokens if asked => {
            let needed = wanted.max_model_len;
            return Err(too_small(format!("holds {tokens} tokens, but --max-model-len asks for {needed}")));
        }
        tokens => profile(tokens)?,
    };
    let (positions, note) =
        fit(device, wanted, asked, profile, &|positions| budget(positions, positions.blocks()))?;
    let blocks = match pool {
        KvPool::OneContext => positions.blocks(),
        KvPool::Blocks(_) | KvPool::Bytes(_) => most,
        KvPool::Memory => {
            let fits = |blocks: usize| {
                let budget = budget(&positions, blocks);
                budget.fits() && (!on_host || budget.pool() <= MOST_ON_HOST)
            };
            largest(MOST_BLOCKS, 1, &fits).unwrap_or(0).max(positions.blocks())
        }
    };
    let budget = budget(&positions, blocks);
    if !budget.fits() {
        let message = format!("a KV pool of {blocks} blocks does not fit:\n{budget}");
        return Err(EngineError::Memory { device: device.into(), message });
    }
    Ok(Fitted { positions, blocks, note })
}

/// Block numbers have 32 bits, and tokens of a pool are counted in as many.
const MOST_BLOCKS: usize = 1 << 26;

fn too_small(message: String) -> EngineError {
    let message = format!("the pool {message}; give it more, or lower --max-model-len");
    EngineError::Parameter { name: "--kv-cache-memory-bytes or --num-gpu-blocks-override", message }
}

/// Positions for the context that is asked for, or, where nothing is asked for, for the largest that fits. The text says so
/// when it is less than the checkpoint's.
///
/// # Errors
/// [`EngineError::Memory`] with the budget and the largest context that would fit.
pub(crate) fn fit(
    device: &str,
    wanted: PositionProfile,
    asked: bool,
    profile: &dyn Fn(usize) -> Result<PositionProfile>,
    budget: &dyn Fn(&PositionProfile) -> MemoryBudget,
) -> Result<(PositionProfile, Option<String>)> {
    let full = budget(&wanted);
    if full.fits() {
        return Ok((wanted, None));
    }
    let most = largest(wanted.max_model_len, TOKEN_STEP, &|tokens| {
        profile(tokens).is_ok_and(|positions| budget(&positions).fits())
    });
    match most {
        Some(tokens) if !asked => {
            let note = format!(
                "the context is {tokens} tokens instead of the checkpoint's {}: what fits the memory of {device} ({} available); \
                 set it with --max-model-len",
                wanted.max_model_len,
                size(full.available)
            );
            Ok((profile(tokens)?, Some(note)))
        }
        Some(tokens) => {
            Err(shortage(device, &wanted, &full, &format!("use --max-model-len {tokens} or less")))
        }
        None => {
            Err(shortage(device, &wanted, &full, "no context fits: use a smaller model or another device"))
        }
    }
}

fn shortage(device: &str, wanted: &PositionProfile, budget: &MemoryBudget, remedy: &str) -> EngineError {
    EngineError::Memory {
        device: device.into(),
        message: format!(
            "not enough memory for a context of {} tokens; {remedy}\n{}",
            wanted.max_model_len,
            budget.to_string().trim_end()
        ),
    }
}

/// A context that shrinks is a multiple of this.
const TOKEN_STEP: usize = 64;

/// The largest multiple of `unit` below `limit` that `fits`, which holds up to some number and not beyond.
fn largest(limit: usize, unit: usize, fits: &dyn Fn(usize) -> bool) -> Option<usize> {
    let (mut low, mut high) = (0, limit.div_ceil(unit));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle * unit) {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low > 0).then_some(low * unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use longhaul_backend::DType;
    use longhaul_model::family;

    fn budget(available: u64) -> (ModelSpec, impl Fn(&PositionProfile) -> MemoryBudget) {
        let spec = family("qwen2-0.5b").unwrap().spec;
        let of = spec.clone();
        let budget = move |positions: &PositionProfile| {
            let layout = crate::device::layout(&of, positions, positions.blocks(), DType::F32);
            let available = Available { bytes: available, remark: "test".into() };
            MemoryBudget::on_cpu(&of, positions, &layout, 1 << 30, available)
        };
        (spec, budget)
    }

    #[test]
    fn a_default_context_shrinks_to_what_fits_and_no_further() {
        let (spec, budget) = budget((1 << 30) + (200 << 20));
        let profile = |tokens| Ok(PositionProfile::new(&spec, None, Some(tokens))?);
        let wanted = PositionProfile::new(&spec, None, None).unwrap();
        let (positions, note) = fit("cpu", wanted.clone(), false, &profile, &budget).unwrap();
        assert!(positions.max_model_len < wanted.max_model_len && positions.max_model_len > 0);
        assert!(budget(&positions).fits());
        assert!(!budget(&profile(positions.max_model_len + 64).unwrap()).fits());
        let note = note.unwrap();
        assert!(note.contains(&positions.max_model_len.to_string()) && note.contains("32768"), "{note}");

        let error = fit("cpu", wanted, true, &profile, &budget).unwrap_err().to_string();
        assert!(error.contains(&format!("--max-model-len {} or less", positions.max_model_len)), "{error}");
        for line in ["weights", "KV pool", "32768 tokens", "total", "available"] {
            assert!(error.contains(line), "{error}");
        }
    }

    #[test]
    fn what_fits_is_left_alone() {
        let (spec, budget) = budget(64 << 30);
        let wanted = PositionProfile::new(&spec, None, None).unwrap();
        let never = |_| -> Result<PositionProfile> { unreachable!("nothing is searched") };
        let (positions, note) = fit("cpu", wanted.clone(), false, &never, &budget).unwrap();
        assert_eq!((positions.max_model_len, note), (wanted.max_model_len, None));
    }

    #[test]
    fn weights_that_do_not_fit_leave_no_context() {
        let (spec, budget) = budget(1 << 20);
        let wanted = PositionProfile::new(&spec, None, None).unwrap();
        let profile = |tokens| Ok(PositionProfile::new(&spec, None, Some(tokens))?);
        let error = fit("cpu", wanted, false, &profile, &budget).unwrap_err().to_string();
        assert!(error.contains("no context fits") && error.contains("1.00 GiB"), "{error}");
    }

    #[test]
    fn the_reserve_is_a_fraction_of_the_whole_device() {
        assert_eq!(Available::on_gpu(80 << 30, 80 << 30, 0.75).bytes, 60 << 30);
        assert_eq!(Available::on_gpu(30 << 30, 80 << 30, 0.75).bytes, 10 << 30);
        assert_eq!(Available::on_gpu(10 << 30, 80 << 30, 0.75).bytes, 0);
    }

    #[test]
    fn ranks_are_summed_or_the_tightest_counts() {
        let of = |weights, available| MemoryBudget {
            lines: vec![("weights", weights, String::new()), (POOL, 1, String::new())],
            available,
            remark: String::new(),
        };
        let ranks = || [of(10, 100), of(30, 50), of(5, 40)].into_iter();
        let tightest = MemoryBudget::tightest(ranks());
        assert_eq!((tightest.total(), tightest.available), (31, 50));
        let sum = MemoryBudget::sum(ranks());
        assert_eq!((sum.total(), sum.available), (48, 100));
    }

    #[test]
    fn the_search_finds_the_edge() {
        for edge in [0, 1, 64, 65, 127, 128, 1000, 4095] {
            let expected = (edge / 64 * 64).min(4096 - 64);
            assert_eq!(largest(4096, 64, &|n| n <= edge), (expected > 0).then_some(expected), "{edge}");
            assert_eq!(largest(4096, 1, &|n| n <= edge), (edge > 0).then_some(edge), "{edge}");
        }
    }

    #[test]
    fn the_host_s_memory_is_read_from_its_files() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
        assert_eq!(reclaimable("cache 1\ntotal_inactive_file 4096\n"), Some(4096));
        assert!(Available::on_host().bytes > 0);
    }
}

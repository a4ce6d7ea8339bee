//! Tensor parallelism on the CPU: the goldens over any number of ranks, more than there are heads included, give the logits
//! and the greedy tokens of one. Every rank reads its own part of the files and nothing else.

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use longhaul_backend::{Backend, Collective, DType, SequenceInputs, StepInputs};
use longhaul_collective::{Options, Threads};
use longhaul_cpu::{Cpu, KvCache, Precision};
use longhaul_model::{Model, ModelSpec, PositionProfile, ShardOptions, ShardPlan, WeightFormat};
use longhaul_testkit::{Golden, assert_close, golden_cases};
use longhaul_weights::{Checkpoint, TensorSource};

use common::{Counted, Counts};

/// max|Δlogits| / max|logits| in f32.
const TOLERANCE: f32 = 2e-4;
const RANKS: [usize; 8] = [1, 2, 3, 4, 5, 7, 8, 16];

/// One rank with its shard loaded.
struct Rank<'a> {
    model: Model<Cpu>,
    kv: KvCache,
    positions: &'a PositionProfile,
    length: usize,
}

impl Rank<'_> {
    /// Logits of the tokens `ids`, which follow those of earlier calls.
    fn step(&mut self, ids: &[u32]) -> Vec<f32> {
        let first = self.length;
        self.length += ids.len();
        let blocks = self.kv.layout().blocks as u32;
        let inputs = StepInputs {
            ids: ids.to_vec(),
            logit_scales: (first..self.length).map(|p| self.positions.logit_scale(p)).collect(),
            sequences: vec![SequenceInputs {
                rows: ids.len(),
                kv_len: self.length,
                block_table: (0..blocks).collect(),
            }],
            logit_rows: (0..ids.len()).collect(),
        };
        let logits = self.model.forward(inputs, &mut self.kv).unwrap().unwrap();
        let logits = self.model.gather_logits(logits).unwrap();
        self.model.backend().to_host(&logits).unwrap()
    }
}

/// What a rank ends with: logits of the prompt and the greedy continuation.
type Outcome = (Vec<f32>, Vec<u32>);

/// Runs a rank to its end.
fn run_rank(
    golden: &Golden,
    spec: &ModelSpec,
    plan: &ShardPlan,
    (chunk, overlap_rows): (usize, Option<NonZeroUsize>),
    group: Counted,
) -> Outcome {
    let rank = group.rank();
    let tokens = golden.input_ids.len() + golden.greedy.len();
    let positions = PositionProfile::new(spec, None, Some(tokens.max(spec.trained_window()))).unwrap();
    let source = Checkpoint::open(&golden.dir, &spec.tensors(), &spec.ignorable_tensors()).unwrap();
    let mut cpu = Cpu::new(1, Precision::F32).unwrap().in_group(Arc::new(group));
    if overlap_rows.is_some() {
        cpu = cpu.with_exchanger().unwrap();
    }
    let model = Model::load_shard(cpu, spec, &positions, (plan, rank), &source, &mut |_, _| {}).unwrap();
    let model = model.overlapping(overlap_rows);
    let shard = &plan.ranks()[rank];
    let dtype = spec.dtype.unwrap_or(DType::BF16);
    assert_eq!(
        source.bytes_read(),
        plan.weight_bytes(shard, WeightFormat::Float(dtype)),
        "{} rank {rank} of {}: bytes read",
        golden.name,
        shard.world_size
    );
    let block_size = positions.block_size();
    let layout = shard.kv_layout(spec, block_size, tokens.div_ceil(block_size), DType::F32);
    let kv = model.kv_cache(layout).unwrap();
    let mut rank = Rank { model, kv, positions: &positions, length: 0 };
    let logits: Vec<f32> = golden.input_ids.chunks(chunk).flat_map(|ids| rank.step(ids)).collect();
    let mut last = logits[logits.len() - golden.vocab..].to_vec();
    let mut greedy = Vec::new();
    while greedy.len() < golden.greedy.len() {
        let best = (0..golden.vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
        greedy.push(best);
        last = rank.step(&[best]);
    }
    (logits, greedy)
}

/// Every rank's [`run_rank`], and the sums that rank 0 took.
fn run(
    golden: &Golden,
    world_size: usize,
    steps: (usize, Option<NonZeroUsize>),
    expert_parallel: bool,
) -> (Vec<Outcome>, usize) {
    let config = std::fs::read(golden.dir.join("config.json")).unwrap();
    let spec = ModelSpec::from_config(&config, "config.json").unwrap();
    let options = ShardOptions { expert_parallel, ..ShardOptions::default() };
    let plan = ShardPlan::new(&spec, world_size, &options).unwrap();
    let groups = Threads::group(world_size, Options::default()).unwrap();
    let counts: Vec<Arc<Counts>> = groups.iter().map(|_| Arc::default()).collect();
    let results = thread::scope(|scope| {
        let (spec, plan) = (&spec, &plan);
        let ranks: Vec<_> = groups
            .into_iter()
            .zip(&counts)
            .map(|(group, counts)| Counted { group, counts: counts.clone() })
            .map(|group| scope.spawn(move || run_rank(golden, spec, plan, steps, group)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    (results, counts[0].sums.load(Ordering::Relaxed))
}

fn check(golden: &Golden, world_size: usize, chunk: usize, expert_parallel: bool) {
    let case = format!("{} over {world_size}, chunk {chunk}, experts {expert_parallel}", golden.name);
    let (results, _) = run(golden, world_size, (chunk, None), expert_parallel);
    assert_close(&case, &results[0].0, &golden.logits, TOLERANCE);
    assert_eq!(results[0].1, golden.greedy, "{case}");
    for (rank, result) in results.iter().enumerate() {
        assert!(*result == results[0], "{case}: rank {rank} has other bits than rank 0");
    }
}

#[test]
fn the_goldens_over_any_number_of_ranks() {
    for case in golden_cases() {
        let golden = Golden::load(&case);
        for world_size in RANKS {
            check(&golden, world_size, golden.input_ids.len(), false);
        }
    }
}

#[test]
fn the_goldens_in_chunks() {
    for case in golden_cases() {
        let golden = Golden::load(&case);
        for world_size in [3, 16] {
            check(&golden, world_size, 23, false);
        }
    }
}

#[test]
fn experts_dealt_whole() {
    for name in ["moe-64-experts", "moe-shared"] {
        let golden = Golden::load(&longhaul_testkit::goldens_dir().join(name));
        for world_size in RANKS {
            check(&golden, world_size, golden.input_ids.len(), true);
        }
        check(&golden, 20, 23, true);
    }
}

/// Halves that overlap give the bits of whole steps: in chunks, of which the last may have one row and stays whole, and in
/// one go.
#[test]
fn overlapped_halves_change_no_bit() {
    for dir in golden_cases() {
        let golden = Golden::load(&dir);
        let bits = |results: &[Outcome]| -> Vec<(Vec<u32>, Vec<u32>)> {
            results.iter().map(|(l, ids)| (l.iter().map(|l| l.to_bits()).collect(), ids.clone())).collect()
        };
        for ranks in [2, 3] {
            for chunk in [7, golden.input_ids.len()] {
                let whole = run(&golden, ranks, (chunk, None), false);
                let halves = run(&golden, ranks, (chunk, NonZeroUsize::new(2)), false);
                assert!(bits(&halves.0) == bits(&whole.0), "{} over {ranks}, chunk {chunk}", golden.name);
                // A sum for each half instead of one, in every step of the prompt that has two rows.
                let steps = golden.input_ids.chunks(chunk).filter(|ids| ids.len() > 1).count();
                let layers = whole.1 / (golden.input_ids.chunks(chunk).count() + golden.greedy.len());
                assert_eq!(halves.1, whole.1 + steps * layers, "{}", golden.name);
            }
        }
    }
}

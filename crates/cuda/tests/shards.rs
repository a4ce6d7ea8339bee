//! Tensor parallelism on emulated devices, a thread and a device a rank: the goldens over several ranks, more than there are
//! heads included, whole and in chunks, with every way for sums to travel. Steps that are replayed from a recording included.
//! Of each golden a few dozen tokens; `tests/emulated_device.rs` of the command takes the goldens whole.

mod common;

use std::sync::Arc;
use std::thread;

use common::open_choice;
use longhaul_backend::{Backend, Collective, DType, SequenceInputs, StepInputs};
use longhaul_collective::{Options, Threads};
use longhaul_cuda::driver::{Driver, Element, Emulated, EmulatedOptions};
use longhaul_cuda::group::{AllReduce, Group};
use longhaul_cuda::kv::KvCache;
use longhaul_cuda::{Cuda, Limits};
use longhaul_model::{Model, ModelSpec, PositionProfile, ShardOptions, ShardPlan};
use longhaul_testkit::{Golden, assert_close, goldens_dir};
use longhaul_weights::Checkpoint;

/// max|Δlogits| / max|logits| with f32 activations, and with bf16 ones.
const F32_TOLERANCE: f32 = 1e-3;
const BF16_TOLERANCE: f32 = 4e-2;

#[derive(Clone, Copy)]
struct Setup {
    ranks: usize,
    element: Element,
    all_reduce: AllReduce,
    /// Rows of a prefill step.
    chunk: usize,
    expert_parallel: bool,
    /// Tokens of the golden.
    tokens: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            ranks: 2,
            element: Element::F32,
            all_reduce: AllReduce::Peer,
            chunk: 64,
            expert_parallel: false,
            tokens: 40,
        }
    }
}

/// One rank with its shard loaded.
struct Rank {
    model: Model<Cuda>,
    kv: KvCache,
    positions: PositionProfile,
    length: usize,
}

impl Rank {
    fn inputs(&self, ids: &[u32], before: usize) -> StepInputs {
        let after = before + ids.len();
        StepInputs {
            ids: ids.to_vec(),
            logit_scales: (before..after).map(|p| self.positions.logit_scale(p)).collect(),
            sequences: vec![SequenceInputs {
                rows: ids.len(),
                kv_len: after,
                block_table: (0..self.kv.layout().blocks as u32).collect(),
            }],
            logit_rows: (0..ids.len()).collect(),
        }
    }

    /// Logits of the tokens `ids`, which follow those of earlier calls.
    fn step(&mut self, ids: &[u32]) -> Vec<f32> {
        let inputs = self.inputs(ids, self.length);
        self.length += ids.len();
        let logits = self.model.forward(inputs, &mut self.kv).unwrap().unwrap();
        self.host(logits)
    }

    fn host(&self, logits: longhaul_cuda::Tensor) -> Vec<f32> {
        let logits = self.model.gather_logits(logits).unwrap();
        self.model.backend().to_host(&logits).unwrap()
    }

    /// The last of `ids` once more, from a recording that was made for another position.
    fn replayed(&mut self, ids: &[u32]) -> Vec<f32> {
        let (recorded, last) = (self.inputs(&ids[..1], 0), self.length - 1);
        let backend = self.model.backend();
        backend.prepare(recorded.clone(), &self.kv).unwrap();
        let (model, kv) = (&self.model, &mut self.kv);
        let (graph, _) = backend
            .record(|| model.forward(recorded, kv).map_err(|e| longhaul_backend::Error::Step(e.to_string())))
            .unwrap();
        backend.prepare(self.inputs(&ids[ids.len() - 1..], last), &self.kv).unwrap();
        backend.replay(graph).unwrap();
        self.host(backend.last_logits(1))
    }
}

/// Logits of the golden's tokens on one rank, and what a replayed step adds.
fn run_rank(golden: &Golden, setup: Setup, driver: Arc<dyn Driver>, group: Group) -> Vec<f32> {
    let config = std::fs::read(golden.dir.join("config.json")).unwrap();
    let spec = ModelSpec::from_config(&config, "config.json").unwrap();
    let options = ShardOptions { expert_parallel: setup.expert_parallel, ..ShardOptions::default() };
    let plan = ShardPlan::new(&spec, setup.ranks, &options).unwrap();
    let (rank, ids) = (group.rank(), &golden.input_ids[..setup.tokens.min(golden.input_ids.len())]);
    let tokens = ids.len();
    let shard = &plan.ranks()[rank];
    let positions = PositionProfile::new(&spec, None, Some(tokens.max(spec.trained_window()))).unwrap();
    let block_size = positions.block_size();
    let blocks = tokens.div_ceil(block_size);
    let limits = Limits { rows: setup.chunk, sequences: 1, blocks, logit_rows: setup.chunk };
    let cuda = Cuda::new(driver, open_choice(), setup.element, &shard.widths(&spec), limits).unwrap();
    let cuda = cuda.in_group(group).unwrap();
    let source = Checkpoint::open(&golden.dir, &spec.tensors(), &spec.ignorable_tensors()).unwrap();
    let model = Model::load_shard(cuda, &spec, &positions, (&plan, rank), &source, &mut |_, _| {}).unwrap();
    let dtype = if setup.element == Element::F32 { DType::F32 } else { DType::BF16 };
    let kv = model.kv_cache(shard.kv_layout(&spec, block_size, blocks, dtype)).unwrap();
    let mut rank = Rank { model, kv, positions, length: 0 };
    let mut logits: Vec<f32> = ids.chunks(setup.chunk).flat_map(|ids| rank.step(ids)).collect();
    if rank.model.backend().group().can_be_recorded() {
        // The last token alone, op by op and replayed: the same bits.
        rank.length -= 1;
        let eager = rank.step(&ids[tokens - 1..]);
        let replayed = rank.replayed(ids);
        assert!(replayed == eager, "{}: a replayed step has other bits", golden.name);
        logits.extend(replayed);
    }
    logits
}

fn check(golden: &Golden, setup: Setup, seed: u64) {
    let options = EmulatedOptions { seed, eager: seed.is_multiple_of(2), ..EmulatedOptions::default() };
    let drivers: Vec<Arc<dyn Driver>> =
        (0..setup.ranks).map(|_| Arc::new(Emulated::new(options).unwrap()) as Arc<dyn Driver>).collect();
    let threads = Threads::group(setup.ranks, Options::default()).unwrap();
    let collectives = threads.into_iter().map(|rank| Arc::new(rank) as Arc<dyn Collective>).collect();
    let groups = Group::connect(&drivers, collectives, setup.all_reduce).unwrap();
    assert!(groups.iter().all(|group| group.all_reduce_way() == setup.all_reduce));
    let results: Vec<Vec<f32>> = thread::scope(|scope| {
        let ranks: Vec<_> = groups
            .into_iter()
            .zip(drivers)
            .map(|(group, driver)| scope.spawn(move || run_rank(golden, setup, driver, group)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let Setup { ranks, element, all_reduce, chunk, expert_parallel, tokens } = setup;
    let case = format!(
        "{} over {ranks}, {element:?}, {all_reduce}, chunk {chunk}, experts {expert_parallel}",
        golden.name
    );
    let exact = &golden.logits[..tokens.min(golden.input_ids.len()) * golden.vocab];
    let tolerance = if element == Element::F32 { F32_TOLERANCE } else { BF16_TOLERANCE };
    assert_close(&case, &results[0][..exact.len()], exact, tolerance);
    for (rank, result) in results.iter().enumerate() {
        assert!(*result == results[0], "{case}: rank {rank} has other bits than rank 0");
    }
}

fn golden(name: &str) -> Golden {
    Golden::load(&goldens_dir().join(name))
}

/// Both ways for sums to travel, both elements, whole and in chunks.
#[test]
fn goldens_over_several_ranks() {
    let setup = Setup::default();
    check(&golden("dense-tied"), Setup { ranks: 4, chunk: 7, ..setup }, 1);
    check(&golden("dense-yarn"), Setup { element: Element::Bf16, ..setup }, 2);
    check(&golden("dense-hd128"), Setup { ranks: 3, element: Element::Bf16, chunk: 23, ..setup }, 3);
    check(&golden("dense-tied"), Setup { all_reduce: AllReduce::Host, chunk: 23, ..setup }, 4);
    // Beyond the first chunk of positions.
    check(&golden("dense-dca"), Setup { tokens: 150, chunk: 100, ..setup }, 5);
}

/// Shares that cut a KV group (28 heads over 3 are 10, 9 and 9), in the kernels of both kinds.
#[test]
fn shares_that_cut_a_group() {
    let golden = golden("dense-28-heads");
    let setup = Setup { ranks: 3, ..Setup::default() };
    check(&golden, setup, 6);
    check(&golden, Setup { element: Element::Bf16, chunk: 30, ..setup }, 7);
}

/// Ranks without heads, without columns, without rows of the vocabulary.
#[test]
fn more_ranks_than_heads() {
    check(&golden("dense-tied"), Setup { ranks: 9, chunk: 23, ..Setup::default() }, 8);
}

/// Experts dealt whole, and cut by columns over more ranks than have a share.
#[test]
fn experts_over_ranks() {
    let setup = Setup { tokens: 12, expert_parallel: true, ..Setup::default() };
    check(&golden("moe-64-experts"), Setup { ranks: 3, ..setup }, 9);
    check(&golden("moe-shared"), setup, 10);
    check(&golden("moe-shared"), Setup { ranks: 7, chunk: 10, ..setup }, 11);
    check(&golden("moe-shared"), Setup { ranks: 7, expert_parallel: false, ..setup }, 12);
}

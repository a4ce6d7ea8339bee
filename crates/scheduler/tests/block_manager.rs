//! The block manager against a naive model that keeps lists and searches them.

#[path = "simulation/rng.rs"]
mod rng;

use longhaul_scheduler::{BlockHash, BlockManager};
use rng::Rng;

/// A block as the naive model sees it.
#[derive(Debug, Clone, Default)]
struct NaiveBlock {
    holders: usize,
    hash: Option<BlockHash>,
    soiled: bool,
}

/// The rules in the words of the documentation, without an index anywhere.
#[derive(Debug)]
struct Naive {
    blocks: Vec<NaiveBlock>,
    /// Blocks that nobody holds and nothing is known of; the last is handed out first.
    free: Vec<usize>,
    /// Idle blocks, least recently used first.
    idle: Vec<usize>,
    scrub: Vec<usize>,
}

impl Naive {
    fn new(blocks: usize) -> Self {
        Self {
            blocks: vec![NaiveBlock::default(); blocks],
            free: (0..blocks).rev().collect(),
            idle: Vec::new(),
            scrub: Vec::new(),
        }
    }

    fn allocate(&mut self, count: usize) -> Option<Vec<usize>> {
        if count > self.free.len() + self.idle.len() {
            return None;
        }
        Some(
            (0..count)
                .map(|_| {
                    let block = self.free.pop().unwrap_or_else(|| self.idle.remove(0));
                    let soiled = self.blocks[block].soiled;
                    self.blocks[block] = NaiveBlock { holders: 1, ..NaiveBlock::default() };
                    if soiled {
                        self.scrub.push(block);
                    }
                    block
                })
                .collect(),
        )
    }

    fn find(&self, hash: BlockHash) -> Option<usize> {
        self.blocks.iter().position(|b| b.hash == Some(hash))
    }

    fn acquire(&mut self, chain: &[BlockHash]) -> Vec<usize> {
        let mut hits = Vec::new();
        for &hash in chain {
            let Some(block) = self.find(hash) else { break };
            self.blocks[block].holders += 1;
            self.idle.retain(|&b| b != block);
            hits.push(block);
        }
        hits
    }

    fn release(&mut self, block: usize) {
        self.blocks[block].holders -= 1;
        if self.blocks[block].holders == 0 {
            match self.blocks[block].hash {
                Some(_) => self.idle.push(block),
                None => self.free.push(block),
            }
        }
    }

    fn publish(&mut self, block: usize, hash: BlockHash) -> bool {
        if self.blocks[block].hash.is_some() || self.find(hash).is_some() {
            return false;
        }
        self.blocks[block].hash = Some(hash);
        true
    }

    fn poison(&mut self, block: usize) {
        self.blocks[block].soiled = true;
        self.blocks[block].hash = None;
    }

    fn clear_cache(&mut self) {
        for block in self.idle.drain(..).rev() {
            self.free.push(block);
        }
        self.blocks.iter_mut().for_each(|b| b.hash = None);
    }
}

/// What is done to both; numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Op {
    Allocate(usize),
    Acquire(usize, usize),
    Fork(usize),
    Release(usize),
    Publish(usize),
    Soil(usize, usize),
    Poison(usize, usize),
    TakeScrub,
    ClearCache,
}

fn op(rng: &mut Rng) -> Op {
    let any = rng.next() as usize;
    match rng.below(27) {
        0..5 => Op::Allocate(any % 6),
        5..10 => Op::Acquire(any % 4, rng.range(1, 5)),
        10..12 => Op::Fork(any),
        12..18 => Op::Release(any),
        18..24 => Op::Publish(any),
        24 => Op::Soil(any, rng.below(8)),
        25 => Op::Poison(any, rng.below(8)),
        _ if rng.permille(500) => Op::TakeScrub,
        _ => Op::ClearCache,
    }
}

/// The hash of the block at `depth` of prompt `chain`; prompts 0 and 1 share their first two blocks.
fn hash(chain: usize, depth: usize) -> BlockHash {
    let chain = if chain == 1 && depth < 2 { 0 } else { chain };
    let mut bytes = [0; 32];
    bytes[0] = chain as u8;
    bytes[1] = depth as u8;
    BlockHash(bytes)
}

fn same(ours: &[u32], naive: &[usize]) -> bool {
    ours.iter().map(|&b| b as usize).eq(naive.iter().copied())
}

/// Says which sequence of operations it was when a check fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.0);
        }
    }
}

fn run(seed: u64, pool: usize, ops: Vec<Op>) {
    let _named = Named(seed);
    let (mut ours, mut naive) = (BlockManager::new(pool), Naive::new(pool));
    // Tables of the holders, and the prompt that each computes.
    let mut tables: Vec<(usize, Vec<u32>)> = Vec::new();
    for (turn, op) in ops.into_iter().enumerate() {
        match op {
            Op::Allocate(count) => {
                let (a, b) = (ours.allocate(count), naive.allocate(count));
                assert_eq!(a.is_some(), b.is_some());
                if let (Some(a), Some(b)) = (a, b) {
                    assert!(same(&a, &b), "{a:?} {b:?}");
                    tables.push((turn % 4, a));
                }
            }
            Op::Acquire(chain, len) => {
                let hashes: Vec<BlockHash> = (0..len).map(|depth| hash(chain, depth)).collect();
                let held = hashes
                    .iter()
                    .take_while(|&&h| naive.find(h).is_some_and(|b| naive.blocks[b].holders > 0));
                assert_eq!(ours.held_prefix(&hashes), held.count());
                let (a, b) = (ours.acquire(&hashes), naive.acquire(&hashes));
                assert!(same(&a, &b), "{a:?} {b:?}");
                tables.push((chain, a));
            }
            Op::Fork(at) if !tables.is_empty() => {
                let (chain, table) = tables[at % tables.len()].clone();
                table.iter().for_each(|&block| ours.retain(block));
                table.iter().for_each(|&block| naive.blocks[block as usize].holders += 1);
                tables.push((chain, table));
            }
            Op::Release(at) if !tables.is_empty() => {
                let (_, table) = tables.swap_remove(at % tables.len());
                ours.release_table(&table);
                table.iter().rev().for_each(|&block| naive.release(block as usize));
            }
            Op::Publish(at) if !tables.is_empty() => {
                let (chain, table) = &tables[at % tables.len()];
                for (depth, &block) in table.iter().enumerate() {
                    let hash = hash(*chain, depth);
                    assert_eq!(ours.publish(block, hash), naive.publish(block as usize, hash));
                }
            }
            Op::Soil(at, block) if !tables.is_empty() => {
                let (_, table) = &tables[at % tables.len()];
                if !table.is_empty() {
                    let block = table[block % table.len()];
                    ours.soil(block);
                    naive.blocks[block as usize].soiled = true;
                }
            }
            Op::Poison(at, block) if !tables.is_empty() => {
                let (_, table) = &tables[at % tables.len()];
                if !table.is_empty() {
                    let block = table[block % table.len()];
                    ours.poison(block);
                    naive.poison(block as usize);
                }
            }
            Op::TakeScrub => assert!(same(&ours.take_scrub(), &std::mem::take(&mut naive.scrub))),
            Op::ClearCache => {
                ours.clear_cache();
                naive.clear_cache();
            }
            _ => {}
        }
        assert_eq!(ours.audit(tables.iter().map(|(_, t)| t.as_slice())), Ok(()));
        assert_eq!(ours.free(), naive.free.len());
        assert_eq!(ours.available(), naive.free.len() + naive.idle.len());
        assert_eq!(ours.cached(), naive.blocks.iter().filter(|b| b.hash.is_some()).count());
        for (index, block) in naive.blocks.iter().enumerate() {
            assert_eq!(ours.holders(index as u32) as usize, block.holders);
            assert_eq!(ours.is_writable(index as u32, 0), block.holders == 1 && block.hash.is_none());
        }
    }
}

fn run_seeds(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let (pool, ops) = (rng.range(1, 24), rng.range(1, 200));
        run(seed, pool, (0..ops).map(|_| op(&mut rng)).collect());
    }
}

#[test]
fn behaves_as_the_naive_model() {
    run_seeds(0..5_000);
}

#[test]
#[ignore = "nightly: 500,000 sequences of operations"]
fn behaves_as_the_naive_model_for_long() {
    run_seeds(1_000_000..1_500_000);
}

#[test]
fn an_idle_chain_is_given_up_from_its_end() {
    let mut blocks = BlockManager::new(4);
    let table = blocks.allocate(3).unwrap();
    for (depth, &block) in table.iter().enumerate() {
        assert!(blocks.publish(block, hash(0, depth)));
    }
    blocks.release_table(&table);
    assert_eq!((blocks.free(), blocks.available(), blocks.cached()), (1, 4, 3));
    blocks.allocate(2).unwrap();
    let chain: Vec<BlockHash> = (0..3).map(|depth| hash(0, depth)).collect();
    assert_eq!(blocks.acquire(&chain), table[..2], "the last block went first");
    assert_eq!(blocks.evictions(), 1);
}

#[test]
fn a_poisoned_block_is_found_by_nobody_and_zeroed_before_its_next_use() {
    let mut blocks = BlockManager::new(1);
    let table = blocks.allocate(1).unwrap();
    assert!(blocks.publish(table[0], hash(0, 0)));
    blocks.poison(table[0]);
    assert_eq!(blocks.cached(), 0);
    blocks.release_table(&table);
    assert_eq!(blocks.take_scrub(), []);
    assert_eq!(blocks.allocate(1).unwrap(), table);
    assert_eq!(blocks.take_scrub(), table);
    blocks.release_table(&table);
    blocks.allocate(1).unwrap();
    assert_eq!(blocks.take_scrub(), [], "once is enough");
}

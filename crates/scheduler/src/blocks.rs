use std::collections::BTreeMap;

use crate::prefix::BlockHash;

/// One KV block of the pool.
#[derive(Debug, Clone, Default)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    /// Its name in the cache.
    hash: Option<BlockHash>,
    /// Key in `idle` while it is cached and nobody holds it.
    idle_since: u64,
    /// Something in it may not be finite: to be zeroed before its next use.
    soiled: bool,
}

/// The KV blocks of the pool: who holds them, and which hold a known prefix.
///
/// A block is **free** (nobody holds it, nothing worth keeping in it), **held** by one or more sequences, or **idle**: cached and
/// held by nobody. Idle blocks are handed out again when none are free, the least recently used first, and of one
/// sequence the last block first, since a block is of use only together with all before it. A block is written only by a
/// sequence that holds it alone, and never once it is cached.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    /// Popped from the end: low blocks first, so a small load touches the same memory all the time.
    free: Vec<u32>,
    cached: BTreeMap<BlockHash, u32>,
    /// Idle blocks by the time of their release.
    idle: BTreeMap<u64, u32>,
    clock: u64,
    /// Blocks handed out that have to be zeroed before they are used.
    scrub: Vec<u32>,
    evictions: u64,
}

impl BlockManager {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); blocks],
            free: (0..blocks as u32).rev().collect(),
            cached: BTreeMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            scrub: Vec::new(),
            evictions: 0,
        }
    }

    /// Blocks in the pool.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that [`BlockManager::allocate`] can hand out: free and idle ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks with nothing in them.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that hold a known prefix, held or idle.
    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    /// Cached blocks that were given up for others so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Sequences that hold `block`.
    pub fn holders(&self, block: u32) -> u32 {
        self.blocks.get(block as usize).map_or(0, |b| b.holders)
    }

    /// Whether a sequence that holds `block` may write to it: nobody else does, but for `pins` holders that do not mind, and it is
    /// not cached.
    pub fn is_writable(&self, block: u32, pins: u32) -> bool {
        self.blocks.get(block as usize).is_some_and(|b| b.holders == 1 + pins && b.hash.is_none())
    }

    /// `count` blocks for one holder, with no known content; `None`, and nothing changed, when fewer are available.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<u32>> {
        if count > self.available() {
            return None;
        }
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let block = match self.free.pop() {
                Some(block) => block,
                None => self.evict()?,
            };
            if let Some(b) = self.blocks.get_mut(block as usize) {
                b.holders = 1;
                if std::mem::take(&mut b.soiled) {
                    self.scrub.push(block);
                }
            }
            taken.push(block);
        }
        Some(taken)
    }

    /// Takes the least recently used idle block out of the cache.
    fn evict(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        let hash = self.blocks.get_mut(block as usize)?.hash.take();
        hash.and_then(|hash| self.cached.remove(&hash));
        self.evictions += 1;
        Some(block)
    }

    /// Blocks handed out since the last call that have to be zeroed before they are copied to or written.
    pub fn take_scrub(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.scrub)
    }

    /// Leading blocks of `chain` that are cached and held by others: sharing them costs no block.
    pub fn held_prefix(&self, chain: &[BlockHash]) -> usize {
        chain
            .iter()
            .take_while(|hash| self.cached.get(hash).is_some_and(|&block| self.holders(block) > 0))
            .count()
    }

    /// One more holder for each of the leading blocks of `chain` that are cached; returns them.
    pub fn acquire(&mut self, chain: &[BlockHash]) -> Vec<u32> {
        let hits: Vec<u32> = chain.iter().map_while(|hash| self.cached.get(hash).copied()).collect();
        hits.iter().for_each(|&block| self.retain(block));
        hits
    }

    /// One more holder for a block that is held or idle.
    pub fn retain(&mut self, block: u32) {
        if let Some(b) = self.blocks.get_mut(block as usize) {
            if b.holders == 0 {
                self.idle.remove(&b.idle_since);
            }
            b.holders += 1;
        }
    }

    /// One holder less. A cached block becomes idle, another one free.
    pub fn release(&mut self, block: u32) {
        let Some(b) = self.blocks.get_mut(block as usize) else { return };
        debug_assert!(b.holders > 0, "block {block} released by nobody");
        b.holders = b.holders.saturating_sub(1);
        if b.holders == 0 {
            if b.hash.is_some() {
                self.clock += 1;
                b.idle_since = self.clock;
                self.idle.insert(self.clock, block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// Releases the blocks of a sequence, in order of position, so that its last ones are given up first.
    pub fn release_table(&mut self, table: &[u32]) {
        table.iter().rev().for_each(|&block| self.release(block));
    }

    /// Makes a held block findable under `hash`. False, and nothing changed, when another block is already.
    pub fn publish(&mut self, block: u32, hash: BlockHash) -> bool {
        let Some(b) = self.blocks.get_mut(block as usize) else { return false };
        debug_assert!(b.holders > 0, "block {block} is nobody's");
        if b.hash.is_some() || self.cached.contains_key(&hash) {
            return false;
        }
        b.hash = Some(hash);
        self.cached.insert(hash, block);
        true
    }

    /// Marks a held block to be zeroed before its next use: it may have rows that are not finite, where its holders do not
    /// read.
    pub fn soil(&mut self, block: u32) {
        if let Some(b) = self.blocks.get_mut(block as usize) {
            b.soiled = true;
        }
    }

    /// Marks a held block as perhaps not finite anywhere: it is soiled, and nobody finds it any more.
    pub fn poison(&mut self, block: u32) {
        self.soil(block);
        let hash = self.blocks.get_mut(block as usize).and_then(|b| b.hash.take());
        hash.and_then(|hash| self.cached.remove(&hash));
    }

    /// Forgets all cached prefixes: the weights or the positions have changed.
    pub fn clear_cache(&mut self) {
        for block in std::mem::take(&mut self.idle).into_values().rev() {
            self.free.push(block);
        }
        for block in std::mem::take(&mut self.cached).into_values() {
            if let Some(b) = self.blocks.get_mut(block as usize) {
                b.hash = None;
            }
        }
    }

    /// Checks the books against the tables of those who hold blocks.
    ///
    /// # Errors
    /// The contradiction in words.
    pub fn audit<'a>(&self, tables: impl IntoIterator<Item = &'a [u32]>) -> Result<(), String> {
        let mut holders = vec![0u32; self.blocks.len()];
        for block in tables.into_iter().flatten() {
            match holders.get_mut(*block as usize) {
                Some(count) => *count += 1,
                None => return Err(format!("block {block} is not in the pool")),
            }
        }
        let mut free = vec![0u32; self.blocks.len()];
        for &block in self.free.iter().chain(self.idle.values()) {
            if let Some(count) = free.get_mut(block as usize) {
                *count += 1;
            }
        }
        let mut named = 0;
        for (index, (block, (&held, &free))) in self.blocks.iter().zip(holders.iter().zip(&free)).enumerate()
        {
            if block.holders != held {
                return Err(format!("block {index} counts {} holders, {held} hold it", block.holders));
            }
            if free != u32::from(held == 0) {
                return Err(format!("block {index}: {held} holders, {free} times available"));
            }
            if let Some(hash) = block.hash {
                named += 1;
                if self.cached.get(&hash) != Some(&(index as u32)) {
                    return Err(format!("block {index} is not found under its hash"));
                }
            }
        }
        if named != self.cached.len() {
            return Err(format!("{} hashes name {named} blocks", self.cached.len()));
        }
        match self.idle.values().find(|&&b| self.blocks.get(b as usize).is_none_or(|b| b.hash.is_none())) {
            Some(block) => Err(format!("block {block} is idle, but nothing is known in it")),
            None => Ok(()),
        }
    }
}

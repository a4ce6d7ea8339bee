//! The model: the next token is a hash of everything that the row sees. What a row sees is read from the KV blocks, cell by
//! cell, so a wrong block, a stale one, a wrong order or another tenant's cache gives another token than [`Oracle`] says. Half of
//! the sequences mostly say again what they said three tokens before, so that some of it can be guessed.

use std::collections::BTreeSet;

use longhaul_scheduler::{SampleResult, SequenceId, StepPlan};

use crate::rng::mix;

pub const VOCAB: u32 = 61;

/// Content of a cell that is not finite.
const NAN: u64 = u64::MAX;

/// A sequence's context, folded cell by cell. `realm` stands for what cached KV may depend on beside the tokens (here: who may
/// share it): the same tokens in another realm are other values.
#[derive(Clone, Copy)]
pub struct Context {
    fold: u64,
    position: u64,
    /// Whether it mostly repeats itself.
    repeats: bool,
    /// The last three tokens.
    recent: [u32; 3],
}

impl Context {
    fn new() -> Self {
        Self { fold: 0x1234_5678, position: 0, repeats: false, recent: [0; 3] }
    }

    /// A hash, and the token in the low bits.
    fn cell(&self, realm: u64, token: u32) -> u64 {
        let hash = mix(self.fold ^ realm.rotate_left(17) ^ (u64::from(token) << 32 | self.position));
        hash >> 1 & !63 | u64::from(token)
    }

    fn see(&mut self, cell: u64) {
        self.fold = (self.fold.rotate_left(5) ^ cell).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.position += 1;
        if self.position == 1 {
            self.repeats = mix(cell).is_multiple_of(2);
        }
        self.recent = [self.recent[1], self.recent[2], (cell & 63) as u32];
    }

    fn token(&self) -> u32 {
        let hash = mix(self.fold);
        match self.repeats && self.position >= 3 && hash >> 32 & 7 != 0 {
            true => self.recent[0],
            false => (hash % u64::from(VOCAB)) as u32,
        }
    }
}

/// What a sequence must say, from its tokens alone.
#[derive(Clone)]
pub struct Oracle {
    realm: u64,
    context: Context,
}

impl Oracle {
    pub fn new(realm: u64, prompt: &[u32]) -> Self {
        let mut oracle = Self { realm, context: Context::new() };
        prompt.iter().for_each(|&token| oracle.push(token));
        oracle
    }

    pub fn push(&mut self, token: u32) {
        let cell = self.context.cell(self.realm, token);
        self.context.see(cell);
    }

    pub fn next(&self) -> u32 {
        self.context.token()
    }
}

/// The KV pool of the device.
pub struct Device {
    block_size: usize,
    cells: Vec<u64>,
    /// The tokens drawn in the latest step, for the rows of the next that wait for them.
    drawn: Vec<u32>,
}

/// What a step did.
pub struct Executed {
    pub samples: Vec<SampleResult>,
    /// Sequences with a row whose KV or logits are not finite.
    pub poisoned: BTreeSet<SequenceId>,
    /// Sequences whose rows are finite, but not what is in their last block behind these.
    pub trailed: BTreeSet<SequenceId>,
}

impl Device {
    pub fn new(blocks: usize, block_size: usize) -> Self {
        // Memory is never clean.
        Self { block_size, cells: vec![NAN - 1; blocks * block_size], drawn: Vec::new() }
    }

    fn block(&mut self, block: u32) -> &mut [u64] {
        let first = block as usize * self.block_size;
        &mut self.cells[first..first + self.block_size]
    }

    /// Runs a plan. `poison` is the row whose KV comes out not finite, `garbage` makes all that the step writes so.
    pub fn run(
        &mut self,
        plan: &StepPlan,
        realm: impl Fn(SequenceId) -> u64,
        poison: Option<usize>,
        garbage: bool,
    ) -> Result<Executed, String> {
        for &block in &plan.scrub {
            self.block(block).fill(0);
        }
        for copy in &plan.copies {
            let content = self.block(copy.source).to_vec();
            self.block(copy.destination).copy_from_slice(&content);
        }
        let mut ids = plan.ids.clone();
        for pending in &plan.pending {
            ids[pending.row] =
                *self.drawn.get(pending.sample).ok_or("a row waits for a sample that is not")?;
        }
        let mut samples = Vec::new();
        let (mut poisoned, mut trailed) = (BTreeSet::new(), BTreeSet::new());
        let mut written = BTreeSet::new();
        let (mut row, mut draws) = (0, plan.logit_rows.iter().peekable());
        self.drawn.clear();
        for sequence in &plan.sequences {
            let realm = realm(sequence.id);
            let first = sequence.kv_len - sequence.rows;
            let mut context = Context::new();
            let mut finite = true;
            let at = |position: usize| {
                sequence.block_table[position / self.block_size] as usize * self.block_size
                    + position % self.block_size
            };
            for position in 0..first {
                let cell = self.cells[at(position)];
                finite &= cell != NAN;
                context.see(cell);
            }
            for position in first..sequence.kv_len {
                let index = at(position);
                let block = sequence.block_table[position / self.block_size];
                if position == first || position % self.block_size == 0 {
                    if !written.insert(block) {
                        return Err(format!("block {block} is written by two sequences"));
                    }
                    let start = block as usize * self.block_size;
                    let fresh = position % self.block_size == 0;
                    if fresh && self.cells[start..start + self.block_size].contains(&NAN) {
                        return Err(format!("block {block} is used again and was not zeroed"));
                    }
                }
                let cell = context.cell(realm, ids[row]);
                finite &= poison != Some(row);
                context.see(cell);
                self.cells[index] = if finite && !garbage { cell } else { NAN };
                if draws.next_if_eq(&&row).is_some() {
                    samples.push(match finite {
                        true => SampleResult::Token(context.token()),
                        false => SampleResult::NotFinite,
                    });
                    self.drawn.push(context.token());
                }
                row += 1;
            }
            let end = at(sequence.kv_len - 1) + 1;
            if !finite {
                poisoned.insert(sequence.id);
            } else if self.cells[end..end.next_multiple_of(self.block_size)].contains(&NAN) {
                trailed.insert(sequence.id);
            }
        }
        Ok(Executed { samples, poisoned, trailed })
    }
}

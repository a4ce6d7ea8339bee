use std::sync::Arc;

use crate::ngram::NgramIndex;
use crate::prefix::{BlockHash, block_hash};
use crate::request::{FinishReason, SequenceId};

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The first choice of a request that was not started; or a later choice before the prompt is computed.
    New,
    /// Holds blocks and takes part in steps.
    Running,
    /// Started, and without blocks until it is its turn again.
    Suspended,
    /// Complete.
    Done(FinishReason),
}

/// One choice of a request.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) phase: Phase,
    prompt: Arc<[u32]>,
    /// Tokens drawn, without a stop token.
    pub(crate) output: Vec<u32>,
    pub(crate) max_tokens: usize,
    /// Whether the logits of all its prompt rows are wanted.
    scored: bool,
    /// The n-grams that end in its output or right before it, if drafts are wanted.
    pub(crate) lookup: Option<NgramIndex>,
    /// Blocks it holds, in order of position.
    pub(crate) blocks: Vec<u32>,
    /// Hashes of its leading full blocks, as far as they were needed.
    pub(crate) hashes: Vec<BlockHash>,
    /// Leading blocks that are in the cache, or have a twin there.
    pub(crate) published: usize,
    /// Positions whose KV is written, or will be by a step in flight.
    pub(crate) planned: usize,
    /// Positions whose KV is known to be finite, because a later row's logits were.
    pub(crate) proven: usize,
    /// Tokens that are being drawn in steps in flight.
    pub(crate) in_flight: usize,
    /// The latest of these: its index among the samples of its step.
    pub(crate) last_sample: usize,
    /// Changes whenever it gets blocks anew: results of an earlier stay say nothing about the blocks it holds now.
    pub(crate) stay: u64,
    pub(crate) preemptions: u32,
}

impl Sequence {
    pub(crate) fn new(
        id: SequenceId,
        prompt: Arc<[u32]>,
        max_tokens: usize,
        scored: bool,
        lookup: Option<NgramIndex>,
    ) -> Self {
        Self {
            id,
            phase: Phase::New,
            prompt,
            output: Vec::new(),
            max_tokens,
            scored,
            lookup,
            blocks: Vec::new(),
            hashes: Vec::new(),
            published: 0,
            planned: 0,
            proven: 0,
            in_flight: 0,
            last_sample: 0,
            stay: 0,
            preemptions: 0,
        }
    }

    /// Tokens that the host knows.
    pub(crate) fn len(&self) -> usize {
        self.prompt.len() + self.output.len()
    }

    pub(crate) fn prompt_len(&self) -> usize {
        self.prompt.len()
    }

    /// The token at `position`, if the host knows it.
    pub(crate) fn token(&self, position: usize) -> Option<u32> {
        match position.checked_sub(self.prompt.len()) {
            None => self.prompt.get(position).copied(),
            Some(index) => self.output.get(index).copied(),
        }
    }

    /// Whether the logits of the rows that it has to compute next are all wanted.
    pub(crate) fn scores(&self) -> bool {
        self.scored && self.planned < self.prompt.len() && self.output.is_empty()
    }

    /// The length at which the next token is drawn.
    pub(crate) fn end(&self, run_ahead: bool) -> usize {
        self.len() + if run_ahead { self.in_flight } else { 0 }
    }

    /// Rows until the next token is drawn; none when the last one is being drawn, or has to be seen first.
    pub(crate) fn rows_left(&self, run_ahead: bool) -> usize {
        if self.output.len() + self.in_flight >= self.max_tokens {
            return 0;
        }
        self.end(run_ahead).saturating_sub(self.planned)
    }

    /// Hashes of the leading `blocks` full blocks; the chain begins at `root`.
    pub(crate) fn hash_blocks(&mut self, root: BlockHash, block_size: usize, blocks: usize) -> &[BlockHash] {
        while self.hashes.len() < blocks {
            let first = self.hashes.len() * block_size;
            if first + block_size > self.len() {
                break;
            }
            let parent = self.hashes.last().copied().unwrap_or(root);
            let hash = block_hash(parent, (first..first + block_size).filter_map(|p| self.token(p)));
            self.hashes.push(hash);
        }
        self.hashes.get(..blocks).unwrap_or(&self.hashes)
    }

    /// Forgets its blocks, which the caller releases.
    pub(crate) fn take_blocks(&mut self) -> Vec<u32> {
        self.planned = 0;
        self.proven = 0;
        self.published = 0;
        self.stay = 0;
        std::mem::take(&mut self.blocks)
    }
}

use crate::request::SequenceId;

/// Steps are numbered from 0 in the order of their plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct StepId(pub u64);

/// The content of block `source` goes to block `destination`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Read.
    pub source: u32,
    /// Overwritten.
    pub destination: u32,
}

/// A row whose token id the host has not seen yet: the token drawn in the step before this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PendingId {
    /// Index into [`StepPlan::ids`], which holds 0 there.
    pub row: usize,
    /// Index into [`StepPlan::samples`] of the step before.
    pub sample: usize,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedSequence {
    /// Whose rows.
    pub id: SequenceId,
    /// Rows; they follow each other in [`StepPlan::ids`].
    pub rows: usize,
    /// Of these, the last ones that hold drafted tokens: guesses. A sample is drawn from each, and from the row before them.
    pub drafts: usize,
    /// Tokens in the KV cache once the step has written its rows. The first row is at position `kv_len - rows`.
    pub kv_len: usize,
    /// KV blocks in order of position, as many as `kv_len` tokens need.
    pub block_table: Vec<u32>,
    /// Whether the logits of all these rows are wanted ([`crate::Request::scored`]). Those that nothing is drawn from are not among
    /// [`StepPlan::logit_rows`].
    pub scored: bool,
}

/// A token to draw from a row's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedSample {
    /// For whom.
    pub sequence: SequenceId,
    /// Index of the token among the sequence's output tokens.
    pub position: usize,
}

/// One step of the device. In this order: zero `scrub`, copy `copies`, run the rows, draw the samples. Steps run in the order of
/// their plans.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// Names the step in its results.
    pub step: StepId,
    /// Blocks to fill with zeros: what was in them may not be finite.
    pub scrub: Vec<u32>,
    /// Blocks to copy. No destination is another copy's source or destination.
    pub copies: Vec<BlockCopy>,
    /// Token ids, `[rows]`; drafted ones, too.
    pub ids: Vec<u32>,
    /// The rows whose id is not known yet, ascending; none unless two steps may be in flight.
    pub pending: Vec<PendingId>,
    /// The sequences in row order: those that decode, then prefill chunks.
    pub sequences: Vec<PlannedSequence>,
    /// Rows that a token is drawn from, ascending; those of a sequence are its last rows, one more than its drafts.
    pub logit_rows: Vec<usize>,
    /// What to draw, one for each of `logit_rows`.
    pub samples: Vec<PlannedSample>,
}

impl StepPlan {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }
}

/// What became of a [`PlannedSample`]. Where a sequence has several in a step, those behind the first token that is not the one
/// drafted for the next row are of no effect on what is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleResult {
    /// The token drawn. It says that all logits of the row were finite.
    Token(u32),
    /// The logits were not finite: the request ends, and its blocks are given to nobody before they are zeroed.
    NotFinite,
    /// Nothing could be drawn: the request ends.
    Failed,
}

/// What became of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepResults {
    /// The step.
    pub step: StepId,
    /// One for each of [`StepPlan::samples`].
    pub samples: Vec<SampleResult>,
}

/// Results that belong to no step in flight: a bug of the caller. The scheduler is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResultsError {
    /// Steps are done in order.
    #[error("results of step {got}, but {} is next", expected.map_or("none".into(), |s| s.0.to_string()))]
    WrongStep {
        /// The step of the results.
        got: u64,
        /// The oldest step in flight.
        expected: Option<StepId>,
    },
    /// Samples without results, or the other way round.
    #[error("{got} results for the {expected} samples of step {step}")]
    WrongCount {
        /// The step.
        step: u64,
        /// Results.
        got: usize,
        /// Samples.
        expected: usize,
    },
}

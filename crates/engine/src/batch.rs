//! Steps over many sequences, as a scheduler plans them: blocks, rows and draws in, tokens and log probabilities out.

use std::sync::Arc;

use longhaul_backend::{Draw, SamplingRow, SeenToken, SequenceInputs, StepInputs};

use crate::EngineError;
use crate::api::SamplingParams;
use crate::engine::{Engine, row};
use crate::runner::{BlockChanges, Outcome, WholeLogits};

/// One step. In this order: zero, copy, run the rows, draw.
#[derive(Debug, Clone, Default)]
pub struct BatchStep {
    /// KV blocks to fill with zeros.
    pub zero: Vec<u32>,
    /// KV blocks to copy, from and to.
    pub copies: Vec<(u32, u32)>,
    /// Token ids `[rows]`.
    pub ids: Vec<u32>,
    /// The sequences in row order.
    pub sequences: Vec<SequenceInputs>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<usize>,
    /// How each of `logit_rows` draws; a row that is only scored draws, too, and nobody looks.
    pub draws: Vec<BatchDraw>,
    /// Log probabilities beyond that of the token drawn.
    pub scores: Vec<ScoreRequest>,
}

/// How a row draws. Lists that are the same for many rows are shared.
#[derive(Debug, Clone, Default)]
pub struct BatchDraw {
    /// Temperature, filters, penalties, seed.
    pub params: SamplingParams,
    /// Index of the token among the output tokens.
    pub position: u64,
    /// Distinct tokens of prompt and output, where a penalty looks at them.
    pub seen: Vec<SeenToken>,
    /// Added to the logits of distinct ids; finite.
    pub bias: Arc<[(u32, f32)]>,
    /// Ids that must not be drawn.
    pub banned: Arc<[u32]>,
    /// One bit for each id that may be drawn; `None` = all.
    pub allowed: Option<Arc<[u32]>>,
}

impl BatchDraw {
    fn row(&self) -> SamplingRow<'_> {
        SamplingRow {
            bias: &self.bias,
            allowed: self.allowed.as_deref(),
            ..row(&self.params, self.position, &self.seen, &self.banned)
        }
    }
}

/// A row whose most likely tokens are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreRequest {
    /// Index into [`BatchStep::logit_rows`].
    pub row: usize,
    /// The id whose log probability is wanted; `None` = nobody's.
    pub id: Option<u32>,
    /// How many of the most likely ones.
    pub top: usize,
}

/// Log probabilities under the raw logits of a row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// Of the id asked for.
    pub logprob: Option<f32>,
    /// The most likely ids with theirs, best first; the lower id first among equals.
    pub top: Vec<(u32, f32)>,
}

/// What a step yields.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BatchResults {
    /// One for each of [`BatchStep::draws`].
    pub draws: Vec<Draw>,
    /// One for each of [`BatchStep::scores`].
    pub scores: Vec<Scores>,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct BatchError {
    /// What happened.
    pub error: Box<EngineError>,
    /// Whether the engine goes on, its KV blocks being as the step's plan says. Otherwise only a new engine does.
    pub survived: bool,
}

impl BatchError {
    /// Whether the device itself is lost, with whatever else.
    pub fn is_device_lost(&self) -> bool {
        let mut error = &*self.error;
        while let EngineError::Rank { source, .. } = error {
            error = source;
        }
        matches!(error.of_backend(), Some(longhaul_backend::Error::DeviceLost(_)))
    }
}

/// What a step may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Rows whose logits are wanted.
    pub logit_rows: usize,
}

impl Engine {
    /// What a step may hold.
    pub fn batch_limits(&self) -> BatchLimits {
        BatchLimits {
            rows: self.runner.max_rows(),
            sequences: self.runner.max_sequences(),
            logit_rows: self.runner.max_logit_rows(),
        }
    }

    /// Prompt tokens of a step that the device is set up for.
    pub fn prefill_rows(&self) -> usize {
        self.runner.default_chunk().min(self.runner.max_rows())
    }

    /// Runs a step.
    ///
    /// # Errors
    /// [`BatchError`], which says whether the engine goes on.
    pub fn run_batch(&mut self, step: BatchStep) -> std::result::Result<BatchResults, BatchError> {
        let changes = BlockChanges { zero: step.zero, copies: step.copies };
        if !changes.is_empty() {
            let lost = |error| BatchError { error: Box::new(error), survived: false };
            self.runner.change_blocks(&changes).map_err(lost)?;
        }
        let positions = step.sequences.iter().flat_map(|s| s.kv_len.saturating_sub(s.rows)..s.kv_len);
        let inputs = StepInputs {
            ids: step.ids,
            logit_scales: positions.map(|position| self.positions.logit_scale(position)).collect(),
            sequences: step.sequences,
            logit_rows: step.logit_rows,
        };
        let rows: Vec<SamplingRow<'_>> = step.draws.iter().map(BatchDraw::row).collect();
        let logits = if step.scores.is_empty() { WholeLogits::Stay } else { WholeLogits::ToHost };
        let outcome = self.runner.run(inputs, &rows, logits).map_err(|error| {
            let survived = !is_fatal(&error);
            BatchError { error: Box::new(error), survived }
        })?;
        Ok(BatchResults { scores: self.scores(&step.scores, &outcome), draws: outcome.draws })
    }

    fn scores(&self, requests: &[ScoreRequest], outcome: &Outcome) -> Vec<Scores> {
        let vocab = self.spec.vocab_size;
        let score = |request: &ScoreRequest| {
            let first = request.row * vocab;
            let logits = outcome.logits.get(first..first + vocab).unwrap_or_default();
            scores(logits, request)
        };
        requests.iter().map(score).collect()
    }
}

/// After these nothing works any more.
fn is_fatal(error: &EngineError) -> bool {
    use longhaul_backend::Error::{Collective, DeviceLost};
    matches!(error, EngineError::Rank { .. })
        || matches!(error.of_backend(), Some(DeviceLost(_) | Collective(_)))
}

fn scores(logits: &[f32], request: &ScoreRequest) -> Scores {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let logprob = |logit: f32| (f64::from(logit - max) - sum.ln()) as f32;
    let at = |id: u32| logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let order = |a: &u32, b: &u32| at(*b).total_cmp(&at(*a)).then(a.cmp(b));
    let top = if request.top == 0 {
        Vec::new()
    } else {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        if request.top < ids.len() {
            ids.select_nth_unstable_by(request.top, order);
            ids.truncate(request.top);
        }
        ids.sort_unstable_by(order);
        ids.into_iter().map(|id| (id, logprob(at(id)))).collect()
    };
    Scores { logprob: request.id.map(|id| logprob(at(id))), top }
}

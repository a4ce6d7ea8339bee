//! What becomes of a step.

use std::collections::BTreeSet;

use crate::plan::{ResultsError, SampleResult, StepId, StepResults};
use crate::request::{FinishReason, Outcome, RequestId, SequenceId, Update};
use crate::scheduler::Scheduler;
use crate::sequence::Phase;

/// The samples of a sequence in a step in flight: one, and one more behind each drafted token.
#[derive(Debug)]
pub(crate) struct Drawing {
    pub(crate) id: SequenceId,
    pub(crate) arrival: u64,
    pub(crate) stay: u64,
    /// Tokens that the first sample's row has read.
    pub(crate) kv_len: usize,
    pub(crate) drafts: Vec<u32>,
}

/// A step whose results are not known.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) step: StepId,
    /// Requests with rows in it, by order of arrival.
    pub(crate) requests: BTreeSet<(u64, RequestId)>,
    pub(crate) drawings: Vec<Drawing>,
}

impl Scheduler {
    pub(crate) fn apply(&mut self, results: StepResults) -> Result<(), ResultsError> {
        let step = self.check_next(results.step)?;
        let expected = step.drawings.iter().map(|drawing| 1 + drawing.drafts.len()).sum();
        let got = results.samples.len();
        if got != expected {
            return Err(ResultsError::WrongCount { step: results.step.0, got, expected });
        }
        let drawings = self.in_flight.pop_front().map(|step| step.drawings).unwrap_or_default();
        let mut samples = results.samples.as_slice();
        for drawing in drawings {
            let Some((own, later)) = samples.split_at_checked(1 + drawing.drafts.len()) else { break };
            self.apply_drawing(&drawing, own);
            samples = later;
        }
        Ok(())
    }

    fn check_next(&self, step: StepId) -> Result<&InFlight, ResultsError> {
        let next = self.in_flight.front();
        let wrong = || ResultsError::WrongStep { got: step.0, expected: next.map(|s| s.step) };
        next.filter(|s| s.step == step).ok_or_else(wrong)
    }

    /// Takes draws as long as each is the token that the row behind it was drafted with. The first that is not, or the one
    /// behind the whole draft, is taken, too: it comes of the right tokens. What follows it comes of a wrong one.
    fn apply_drawing(&mut self, drawing: &Drawing, results: &[SampleResult]) {
        let &Drawing { id, arrival, stay, kv_len, ref drafts } = drawing;
        let Some(live) = self.live.get_mut(&id.request).filter(|l| l.arrival == arrival) else { return };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return };
        let key = live.key;
        sequence.in_flight = sequence.in_flight.saturating_sub(results.len());
        if matches!(sequence.phase, Phase::Done(_)) {
            return;
        }
        let mut accepted = 0;
        for (&result, draft) in results.iter().zip(drafts.iter().map(Some).chain([None])) {
            let drawn = self.apply_sample(id, stay, kv_len + accepted, result);
            if draft.is_none() || drawn.as_ref() != draft {
                break;
            }
            accepted += 1;
            self.queue.charge(key, self.config.output_weight);
        }
        if !drafts.is_empty() {
            self.counts.count_draft(drafts.len(), accepted);
            let rejected = results.get(accepted + 1..).unwrap_or_default();
            let unproven = rejected.iter().position(|result| !matches!(result, SampleResult::Token(_)));
            self.set_back(drawing, unproven);
        }
    }

    /// Sets a sequence back to the tokens that it has: what was written behind them is written again. If the rows there were not all
    /// proven to be finite (`unproven` is the first), no block with such a row is kept: they are zeroed, and what was right in them is
    /// computed again.
    fn set_back(&mut self, drawing: &Drawing, unproven: Option<usize>) {
        let id = drawing.id;
        let Some(live) = self.live.get_mut(&id.request) else { return };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return };
        if sequence.phase != Phase::Running || sequence.stay != drawing.stay {
            return;
        }
        let block_size = self.config.block_size;
        sequence.planned = sequence.len() - 1;
        let mut kept = self.config.blocks_for(sequence.planned);
        if unproven.is_some_and(|row| sequence.planned + row < kept * block_size) {
            kept = sequence.planned / block_size;
        }
        let given_up = sequence.blocks.split_off(kept.min(sequence.blocks.len()));
        if unproven.is_some() {
            given_up.iter().for_each(|&block| self.blocks.soil(block));
        }
        self.blocks.release_table(&given_up);
        if sequence.planned > kept * block_size {
            sequence.planned = kept * block_size;
            // One of those that were just given up.
            sequence.blocks.extend(self.blocks.allocate(1).unwrap_or_default());
        }
        sequence.proven = sequence.proven.min(sequence.planned);
    }

    /// Takes a result of a row that has read `kv_len` tokens. The token drawn, unless the choice or its request has ended.
    fn apply_sample(
        &mut self,
        id: SequenceId,
        stay: u64,
        kv_len: usize,
        result: SampleResult,
    ) -> Option<u32> {
        let live = self.live.get_mut(&id.request)?;
        let sequence = live.sequences.get_mut(id.choice as usize)?;
        let token = match result {
            SampleResult::Token(token) => token,
            SampleResult::NotFinite => {
                live.sequences.iter().flat_map(|s| &s.blocks).for_each(|&b| self.blocks.poison(b));
                self.end_request(id.request, Outcome::NumericError);
                return None;
            }
            SampleResult::Failed => {
                self.end_request(id.request, Outcome::EngineError);
                return None;
            }
        };
        if sequence.stay == stay {
            // Finite logits of a row prove all KV that it has read.
            sequence.proven = sequence.proven.max(kv_len);
            let (block_size, first) = (self.config.block_size, sequence.published);
            let full = sequence.proven / block_size;
            if let Some(root) = live.root.filter(|_| full > first) {
                sequence.hash_blocks(root, block_size, full);
                let named = sequence.blocks.iter().zip(&sequence.hashes).take(full).skip(first);
                for (&block, &hash) in named {
                    self.blocks.publish(block, hash);
                }
                sequence.published = full;
            }
        }
        if !live.forked {
            self.fork(id.request);
        }
        let live = self.live.get_mut(&id.request)?;
        let sequence = live.sequences.get_mut(id.choice as usize)?;
        if live.stop_tokens.contains(&token) {
            self.finish_choice(id, FinishReason::Stop, Some(token));
            return None;
        }
        sequence.output.push(token);
        let complete = sequence.output.len() >= sequence.max_tokens;
        self.updates.push(Update::Token { sequence: id, token });
        if complete {
            self.finish_choice(id, FinishReason::Length, None);
        }
        (!complete).then_some(token)
    }

    /// Begins the choices after the first: each shares the first one's blocks up to the last token of the prompt, which it
    /// computes again for its own first draw. Those without a place among the running wait for one.
    pub(crate) fn fork(&mut self, id: RequestId) {
        let Some(live) = self.live.get_mut(&id) else { return };
        live.forked = true;
        let Some((first, others)) = live.sequences.split_first_mut() else { return };
        let shared = first.prompt_len() - 1;
        let table = first.blocks.get(..self.config.blocks_for(shared)).filter(|_| first.proven >= shared);
        for sequence in others {
            sequence.hashes.clone_from(&first.hashes);
            match table {
                Some(table) if self.running.len() < self.config.max_running && shared > 0 => {
                    table.iter().for_each(|&block| self.blocks.retain(block));
                    sequence.blocks = table.to_vec();
                    sequence.planned = shared;
                    sequence.proven = shared;
                    sequence.published = shared / self.config.block_size;
                    sequence.stay = self.next_stay;
                    self.next_stay += 1;
                    sequence.phase = Phase::Running;
                    self.running.push(sequence.id);
                }
                _ => {
                    sequence.phase = Phase::Suspended;
                    self.suspended.push(sequence.id);
                }
            }
        }
    }

    pub(crate) fn fail_step(&mut self, step: StepId) -> Result<(), ResultsError> {
        self.check_next(step)?;
        let Some(failed) = self.in_flight.pop_front() else { return Ok(()) };
        for (arrival, id) in failed.requests {
            if self.live.get(&id).is_some_and(|l| l.arrival == arrival) {
                self.end_request(id, Outcome::EngineError);
            }
        }
        Ok(())
    }
}

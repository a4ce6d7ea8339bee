//! Speculative decoding: which tokens are computed before they are drawn.
//!
//! Drafts take what is left: rows that neither a decode row nor a prefill wants, and blocks that nobody waits for. So long as
//! `running` blocks stay to be had, the next step's decode rows find theirs, and by the one after that the drafts have given theirs back.

use crate::ngram::draft;
use crate::planner::{Outline, Prefill};
use crate::request::SequenceId;
use crate::scheduler::Scheduler;

impl Scheduler {
    /// The drafted tokens of each sequence of `decoding`. Rows are dealt in equal parts, the first in rank first; what one leaves is
    /// the others'.
    pub(crate) fn plan_drafts(
        &mut self,
        decoding: &[SequenceId],
        prefills: &[Prefill],
        outline: &Outline,
    ) -> Vec<Vec<u32>> {
        let mut drafts = vec![Vec::new(); decoding.len()];
        if self.config.speculation.is_none() {
            return drafts;
        }
        self.extend_lookups();
        let rows: usize = prefills.iter().map(|prefill| prefill.rows).sum();
        let logits: usize = prefills.iter().map(|p| if p.scored { p.rows } else { 1 }).sum();
        let mut room = (self.config.max_step_rows.saturating_sub(decoding.len() + rows))
            .min(self.config.max_logit_rows.saturating_sub(decoding.len() + logits));
        if room == 0 {
            return drafts;
        }
        let mut blocks = match outline.preempted || outline.wanting {
            true => 0,
            false => self.blocks.available().saturating_sub(self.reserve()),
        };
        for (drafts, &id) in drafts.iter_mut().zip(decoding) {
            *drafts = self.lookup(id);
        }
        let mut sharing = drafts.iter().filter(|drafts| !drafts.is_empty()).count();
        for (drafts, &id) in drafts.iter_mut().zip(decoding).filter(|(drafts, _)| !drafts.is_empty()) {
            drafts.truncate(room.div_ceil(sharing));
            sharing -= 1;
            self.hold_drafts(id, drafts, &mut blocks);
            room -= drafts.len();
        }
        drafts
    }

    /// Blocks that the decode rows of the next step may need: one for each sequence that runs, or will when a prompt with several
    /// choices is computed.
    fn reserve(&self) -> usize {
        let unforked = self.running.iter().filter_map(|id| self.live.get(&id.request));
        let choices = unforked.filter(|live| !live.forked).map(|live| live.sequences.len() - 1);
        self.running.len() + choices.sum::<usize>()
    }

    /// Brings the indexes of prompts forward, by at most as many tokens as a step has rows: a prompt is read as fast as it is
    /// computed, and one from the cache does not hold up a step.
    fn extend_lookups(&mut self) {
        let mut most = self.config.max_step_rows;
        for &SequenceId { request, choice } in &self.running {
            let Some(live) = self.live.get_mut(&request) else { continue };
            let Some(index) = live.lookup.as_mut() else { continue };
            let Some(sequence) = live.sequences.get(choice as usize) else { continue };
            if most > 0 && !index.reaches(sequence.prompt_len()) {
                index.reserve(sequence.prompt_len());
                most -= index.extend(sequence.prompt_len(), most, |position| sequence.token(position));
            }
        }
    }

    /// What may follow a sequence's last token, up to a stop token and one less than it may still draw. Nothing before its prompt's
    /// index is complete, or before the choices of its request have begun: they share the blocks that drafts would be written to.
    fn lookup(&mut self, id: SequenceId) -> Vec<u32> {
        let Some(config) = self.config.speculation else { return Vec::new() };
        let Some(live) = self.live.get_mut(&id.request).filter(|live| live.forked) else { return Vec::new() };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return Vec::new() };
        let left = sequence.max_tokens.saturating_sub(sequence.output.len() + 1);
        let most = config.num_speculative_tokens.min(left);
        let mut late = sequence.lookup.take();
        let mut drafted = match (&mut late, &live.lookup) {
            (Some(late), Some(early)) if most > 0 && early.reaches(sequence.prompt_len()) => {
                let token = |position| sequence.token(position);
                late.extend(sequence.len(), usize::MAX, token);
                draft([late, early], sequence.len(), most, token)
            }
            _ => Vec::new(),
        };
        sequence.lookup = late;
        if let Some(stop) = drafted.iter().position(|token| live.stop_tokens.contains(token)) {
            drafted.truncate(stop);
        }
        drafted
    }

    /// Takes blocks for the drafts of a sequence behind its next token, of at most `most`, and drops the drafts that find none.
    fn hold_drafts(&mut self, id: SequenceId, drafts: &mut Vec<u32>, most: &mut usize) {
        let Some(live) = self.live.get_mut(&id.request) else { return };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return };
        let first = sequence.planned + 1;
        let missing = self.config.blocks_for(first + drafts.len()).saturating_sub(sequence.blocks.len());
        if let Some(new) = self.blocks.allocate(missing.min(*most)) {
            *most -= new.len();
            sequence.blocks.extend(new);
        }
        drafts.truncate((sequence.blocks.len() * self.config.block_size).saturating_sub(first));
    }
}

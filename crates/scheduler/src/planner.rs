//! What runs in the next step.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use crate::plan::{BlockCopy, PendingId, PlannedSample, PlannedSequence, StepId, StepPlan};
use crate::request::{SequenceId, Update};
use crate::scheduler::{Drawing, InFlight, Scheduler};
use crate::sequence::Phase;

/// A plan in the making.
#[derive(Default)]
struct Draft {
    plan: StepPlan,
    requests: BTreeSet<(u64, crate::RequestId)>,
    drawings: Vec<Drawing>,
    /// Sources of copies: held until the plan is complete, so that none becomes a destination.
    pins: Vec<u32>,
    /// Whether a sequence lost its blocks: then nobody is admitted.
    preempted: bool,
}

/// What a sequence has to prefill.
#[derive(Clone, Copy)]
struct Prefill {
    id: SequenceId,
    rows: usize,
    /// Whether the logits of all these rows are wanted.
    scored: bool,
}

/// Rows of a step that prefills may take.
#[derive(Clone, Copy)]
struct Room {
    rows: usize,
    /// Of these, rows that may be scored.
    scored: usize,
}

impl Room {
    /// Takes rows for `prefill`, at most one of `parts` equal parts of those that it may have.
    fn take(&mut self, prefill: &Prefill, parts: usize) -> usize {
        let most = if prefill.scored { self.rows.min(self.scored) } else { self.rows };
        let rows = prefill.rows.min(most.div_ceil(parts));
        self.rows -= rows;
        self.scored -= if prefill.scored { rows } else { 0 };
        rows
    }
}

/// Copies of a block in the plan: they are made before any row is written, so they keep nobody from writing to it.
fn pinned(pins: &[u32], block: u32) -> u32 {
    pins.iter().filter(|&&pin| pin == block).count() as u32
}

impl Scheduler {
    /// The next step, or nothing to do before the next event.
    pub(crate) fn plan(&mut self) -> Option<StepPlan> {
        if self.in_flight.len() >= self.config.max_in_flight {
            return None;
        }
        let mut draft = Draft::default();
        draft.plan.step = StepId(self.next_step);
        self.sort_running();
        self.plan_decode(&mut draft);
        self.plan_prefill(&mut draft);
        let Draft { mut plan, requests, drawings, pins, .. } = draft;
        pins.into_iter().for_each(|block| self.blocks.release(block));
        if plan.ids.is_empty() {
            return None;
        }
        plan.scrub = self.blocks.take_scrub();
        self.next_step += 1;
        self.in_flight.push_back(InFlight { step: plan.step, requests, drawings });
        Some(plan)
    }

    fn sort_running(&mut self) {
        let mut running = std::mem::take(&mut self.running);
        running.sort_by_cached_key(|&id| self.rank(id));
        self.running = running;
    }

    /// A row for every sequence that needs just one to draw its next token, the first in rank first. Whoever finds no block takes
    /// those of the last in rank, and gives up its own if it is that itself.
    fn plan_decode(&mut self, draft: &mut Draft) {
        let mut next = 0;
        while let Some(&id) = self.running.get(next) {
            next += 1;
            if self.prefill(id).is_none_or(|prefill| prefill.rows != 1 || prefill.scored) {
                continue;
            }
            while !self.make_writable(id, draft) {
                let Some(&victim) = self.running.last() else { return };
                self.preempt(victim, draft);
                if victim == id {
                    break;
                }
            }
            if self.running.get(next - 1) == Some(&id) {
                self.push_rows(id, 1, draft);
            }
        }
    }

    fn preempt(&mut self, id: SequenceId, draft: &mut Draft) {
        self.suspend_or_finish(id, Phase::Suspended);
        draft.preempted = true;
        self.counts.preemptions += 1;
        if let Some(sequence) =
            self.live.get_mut(&id.request).and_then(|l| l.sequences.get_mut(id.choice as usize))
        {
            sequence.preemptions += 1;
        }
    }

    /// Gives a sequence a block of its own for its next position: a new one after a full block, a copy of one that others
    /// read. False when no block is available.
    fn make_writable(&mut self, id: SequenceId, draft: &mut Draft) -> bool {
        let Some(live) = self.live.get_mut(&id.request) else { return false };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return false };
        let index = sequence.planned / self.config.block_size;
        match sequence.blocks.get_mut(index) {
            Some(&mut block) if self.blocks.is_writable(block, pinned(&draft.pins, block)) => true,
            held => {
                let Some(&[new]) = self.blocks.allocate(1).as_deref() else { return false };
                match held {
                    Some(block) => {
                        // A step in flight may be writing to it, behind what is known to be finite.
                        self.blocks.soil(*block);
                        self.blocks.soil(new);
                        draft.plan.copies.push(BlockCopy { source: *block, destination: new });
                        draft.pins.push(std::mem::replace(block, new));
                    }
                    None => sequence.blocks.push(new),
                }
                true
            }
        }
    }

    /// Prefill chunks, and the admission of sequences as long as their chunks have room. Half of the rows are for the first in
    /// rank, the other half for the keys that were served least, short prompts first; what one half leaves the other takes. Of the
    /// rows that may be scored it is the same.
    fn plan_prefill(&mut self, draft: &mut Draft) {
        let decoding = draft.plan.ids.len();
        let in_step: BTreeSet<SequenceId> = draft.plan.sequences.iter().map(|s| s.id).collect();
        let running = self.running.iter().filter(|id| !in_step.contains(id));
        let mut prefills: Vec<Prefill> = running.filter_map(|&id| self.prefill(id)).collect();
        loop {
            prefills.sort_by_cached_key(|prefill| self.rank(prefill.id));
            let (_, mut room) = self.room(decoding, &prefills);
            for prefill in prefills.iter().skip(1) {
                room.take(prefill, 1);
            }
            if draft.preempted || room.rows == 0 || self.running.len() >= self.config.max_running {
                break;
            }
            match self.candidate(room.scored > 0).filter(|&id| self.admit(id)) {
                Some(id) => prefills.extend(self.prefill(id)),
                None => break,
            }
        }
        let (half, mut room) = self.room(decoding, &prefills);
        let Some((&first, others)) = prefills.split_first() else { return };
        let mut others = others.to_vec();
        others.sort_by_cached_key(|&Prefill { id, rows, .. }| {
            let (class, started, choice) = self.rank(id);
            let counter = self.live.get(&id.request).map_or(0, |l| self.queue.counter(l.key));
            (class, counter, rows, started, choice)
        });
        let chunks: Vec<usize> = others.iter().map(|prefill| room.take(prefill, 1)).collect();
        let rest = room.take(&Prefill { rows: first.rows - half, ..first }, 1);
        self.push_rows(first.id, half + rest, draft);
        others.iter().zip(chunks).for_each(|(prefill, rows)| self.push_rows(prefill.id, rows, draft));
    }

    /// What a sequence has to prefill, if anything.
    fn prefill(&self, id: SequenceId) -> Option<Prefill> {
        let (live, sequence) = self.sequence(id)?;
        let rows = sequence.rows_left(live.run_ahead);
        (rows > 0).then(|| Prefill { id, rows, scored: sequence.scores() })
    }

    /// The first prefill's rows of its half, and the room that this leaves for all.
    fn room(&self, decoding: usize, prefills: &[Prefill]) -> (usize, Room) {
        let most = if decoding > 0 { self.config.max_mixed_prefill_rows } else { usize::MAX };
        let draws = decoding + prefills.iter().filter(|prefill| !prefill.scored).count();
        let mut room = Room {
            rows: self.config.max_step_rows.saturating_sub(decoding).min(most),
            scored: self.config.scored_rows_beside(draws),
        };
        (prefills.first().map_or(0, |first| room.take(first, 2)), room)
    }

    /// Who gets blocks next: the highest priority; in it those that were started before; then the key that was served least; then
    /// whoever came first. Those whose rows are to be scored only if there is room for such rows (`scored`).
    fn candidate(&self, scored: bool) -> Option<SequenceId> {
        let suspended = self.suspended.iter().filter_map(|&id| {
            let (live, sequence) = self.sequence(id)?;
            let order = (Reverse(self.class(live)), 0, 0, live.started?, id.choice);
            (scored || !sequence.scores()).then_some((order, id))
        });
        let waiting = self.queue.heads().filter_map(|(key, request)| {
            let live = self.live.get(&request)?;
            let order = (Reverse(self.class(live)), 1, self.queue.counter(key), live.arrival, 0);
            let room = self.queue.started(key) < self.config.key_max_started;
            let runs = scored || live.sequences.first().is_some_and(|s| !s.scores());
            (room && runs).then_some((order, SequenceId { request, choice: 0 }))
        });
        suspended.chain(waiting).min().map(|(_, id)| id)
    }

    /// Gives a sequence blocks for all tokens it has, those with a known prefix from the cache. Beside others it needs room to
    /// spare, twice as much with each time that it was preempted. False, and nothing changed, when there is not enough, or when it
    /// was preempted while a token of it was being drawn, which has to be seen first.
    fn admit(&mut self, id: SequenceId) -> bool {
        let running = self.running.len();
        let block_size = self.config.block_size;
        let Some(live) = self.live.get_mut(&id.request) else { return false };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return false };
        if sequence.in_flight > 0 {
            return false;
        }
        let needed = self.config.blocks_for(sequence.len());
        let spare = match running {
            0 => 0,
            _ => self.config.watermark_blocks.max(running).saturating_mul(1 << sequence.preemptions.min(24)),
        };
        // The last token is computed in any case, since its logits are wanted.
        let reusable = (sequence.len() - 1) / block_size;
        let scores = sequence.scores();
        let chain = match live.root {
            Some(root) if !scores => sequence.hash_blocks(root, block_size, reusable),
            _ => &[],
        };
        let room = self.blocks.available();
        if needed.saturating_add(spare) > room {
            let held = self.blocks.held_prefix(chain);
            if (needed - held).saturating_add(spare) > room {
                return false;
            }
        }
        let mut table = self.blocks.acquire(chain);
        let hits = table.len();
        let Some(new) = self.blocks.allocate(needed - hits) else {
            self.blocks.release_table(&table);
            return false;
        };
        table.extend(new);
        sequence.blocks = table;
        sequence.planned = hits * block_size;
        sequence.proven = hits * block_size;
        sequence.published = hits;
        sequence.stay = self.next_stay;
        sequence.phase = Phase::Running;
        self.next_stay += 1;
        self.running.push(id);
        if live.started.is_some() {
            self.suspended.retain(|&other| other != id);
            return true;
        }
        live.started = Some(self.next_start);
        live.cached_tokens = hits * block_size;
        self.updates.push(Update::Started { id: id.request, cached_tokens: live.cached_tokens });
        self.next_start += 1;
        self.counts.cache_hits += (hits * block_size) as u64;
        self.counts.cache_queries += if scores { 0 } else { live.load.tokens as u64 };
        let (key, priority, load) = (live.key, live.priority, live.load);
        let computed = (load.tokens - hits * block_size) as u64;
        self.queue.remove(key, priority, id.request, load);
        self.queue.start(key, computed.saturating_mul(self.config.input_weight));
        true
    }

    /// Appends the next `rows` rows of a sequence to the plan, and charges its key for the token that they draw.
    fn push_rows(&mut self, id: SequenceId, rows: usize, draft: &mut Draft) {
        let Some(live) = self.live.get_mut(&id.request) else { return };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return };
        if rows == 0 {
            return;
        }
        let plan = &mut draft.plan;
        let kv_len = sequence.planned + rows;
        for position in sequence.planned..kv_len {
            let token = sequence.token(position);
            if token.is_none() {
                plan.pending.push(PendingId { row: plan.ids.len(), sample: sequence.last_sample });
            }
            plan.ids.push(token.unwrap_or(0));
        }
        let draws = kv_len == sequence.end(live.run_ahead);
        let scored = sequence.scores();
        sequence.planned = kv_len;
        let blocks = self.config.blocks_for(kv_len);
        plan.sequences.push(PlannedSequence {
            id,
            rows,
            kv_len,
            block_table: sequence.blocks.iter().take(blocks).copied().collect(),
            scored,
        });
        draft.requests.insert((live.arrival, id.request));
        if draws {
            let position = sequence.output.len() + sequence.in_flight;
            sequence.last_sample = plan.samples.len();
            sequence.in_flight += 1;
            self.queue.charge(live.key, self.config.output_weight);
            plan.logit_rows.push(plan.ids.len() - 1);
            plan.samples.push(PlannedSample { sequence: id, position });
            draft.drawings.push(Drawing { id, arrival: live.arrival, stay: sequence.stay, kv_len });
        }
    }
}

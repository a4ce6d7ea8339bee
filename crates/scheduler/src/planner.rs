//! What runs in the next step.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use crate::plan::{BlockCopy, PendingId, PlannedSample, PlannedSequence, StepId, StepPlan};
use crate::request::{SequenceId, Update};
use crate::results::{Drawing, InFlight};
use crate::scheduler::Scheduler;
use crate::sequence::Phase;

/// A plan in the making.
#[derive(Default)]
pub(crate) struct Outline {
    plan: StepPlan,
    requests: BTreeSet<(u64, crate::RequestId)>,
    drawings: Vec<Drawing>,
    /// Sources of copies: held until the plan is complete, so that none becomes a destination.
    pins: Vec<u32>,
    /// Whether a sequence lost its blocks: then nobody is admitted.
    pub(crate) preempted: bool,
    /// Whether somebody waits for blocks.
    pub(crate) wanting: bool,
}

/// What a sequence has to prefill.
#[derive(Clone, Copy)]
pub(crate) struct Prefill {
    id: SequenceId,
    pub(crate) rows: usize,
    /// Whether the logits of all these rows are wanted.
    pub(crate) scored: bool,
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
        let mut outline = Outline::default();
        outline.plan.step = StepId(self.next_step);
        self.sort_running();
        let decoding = self.plan_decode(&mut outline);
        let prefills = self.plan_prefill(&decoding, &mut outline);
        let drafts = self.plan_drafts(&decoding, &prefills, &outline);
        for (id, drafts) in decoding.into_iter().zip(drafts) {
            self.push_rows(id, 1, drafts, &mut outline);
        }
        prefills.into_iter().for_each(|p| self.push_rows(p.id, p.rows, Vec::new(), &mut outline));
        let Outline { mut plan, requests, drawings, pins, .. } = outline;
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

    /// Every sequence that needs just one row to draw its next token, the first in rank first. Whoever finds no block takes those of
    /// the last in rank, and gives up its own if it is that itself. Their keys are charged for the token.
    fn plan_decode(&mut self, outline: &mut Outline) -> Vec<SequenceId> {
        let mut decoding = Vec::new();
        let mut next = 0;
        while let Some(&id) = self.running.get(next) {
            next += 1;
            if self.prefill(id).is_none_or(|prefill| prefill.rows != 1 || prefill.scored) {
                continue;
            }
            while !self.make_writable(id, outline) {
                let Some(&victim) = self.running.last() else { return decoding };
                self.preempt(victim, outline);
                if victim == id {
                    break;
                }
            }
            if self.running.get(next - 1) == Some(&id) {
                self.charge_token(id);
                decoding.push(id);
            }
        }
        decoding
    }

    /// Charges a key for a token that is drawn.
    fn charge_token(&mut self, id: SequenceId) {
        if let Some(live) = self.live.get(&id.request) {
            self.queue.charge(live.key, self.config.output_weight);
        }
    }

    fn preempt(&mut self, id: SequenceId, outline: &mut Outline) {
        self.suspend_or_finish(id, Phase::Suspended);
        outline.preempted = true;
        self.counts.preemptions += 1;
        if let Some(sequence) =
            self.live.get_mut(&id.request).and_then(|l| l.sequences.get_mut(id.choice as usize))
        {
            sequence.preemptions += 1;
        }
    }

    /// Gives a sequence a block of its own for its next position: a new one after a full block, a copy of one that others
    /// read. False when no block is available.
    fn make_writable(&mut self, id: SequenceId, outline: &mut Outline) -> bool {
        let Some(live) = self.live.get_mut(&id.request) else { return false };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return false };
        let index = sequence.planned / self.config.block_size;
        match sequence.blocks.get_mut(index) {
            Some(&mut block) if self.blocks.is_writable(block, pinned(&outline.pins, block)) => true,
            held => {
                let Some(&[new]) = self.blocks.allocate(1).as_deref() else { return false };
                match held {
                    Some(block) => {
                        // A step in flight may be writing to it, behind what is known to be finite.
                        self.blocks.soil(*block);
                        self.blocks.soil(new);
                        outline.plan.copies.push(BlockCopy { source: *block, destination: new });
                        outline.pins.push(std::mem::replace(block, new));
                    }
                    None => sequence.blocks.push(new),
                }
                true
            }
        }
    }

    /// Prefill chunks, and the admission of sequences as long as their chunks have room. Half of the rows are for the first in
    /// rank, the other half for the keys that were served least, short prompts first; what one half leaves the other takes. Of the
    /// rows that may be scored it is the same. Keys are charged for tokens that are drawn at once.
    fn plan_prefill(&mut self, decoding: &[SequenceId], outline: &mut Outline) -> Vec<Prefill> {
        let in_step: BTreeSet<&SequenceId> = decoding.iter().collect();
        let running = self.running.iter().filter(|id| !in_step.contains(id));
        let mut prefills: Vec<Prefill> = running.filter_map(|&id| self.prefill(id)).collect();
        loop {
            prefills.sort_by_cached_key(|prefill| self.rank(prefill.id));
            let (_, mut room) = self.room(decoding.len(), &prefills);
            for prefill in prefills.iter().skip(1) {
                room.take(prefill, 1);
            }
            if outline.preempted || room.rows == 0 || self.running.len() >= self.config.max_running {
                break;
            }
            let Some(id) = self.candidate(room.scored > 0) else { break };
            if !self.admit(id) {
                outline.wanting = true;
                break;
            }
            prefills.extend(self.prefill(id));
        }
        let (half, mut room) = self.room(decoding.len(), &prefills);
        let Some((first, others)) = prefills.split_first_mut() else { return prefills };
        others.sort_by_cached_key(|&Prefill { id, rows, .. }| {
            let (class, started, choice) = self.rank(id);
            let counter = self.live.get(&id.request).map_or(0, |l| self.queue.counter(l.key));
            (class, counter, rows, started, choice)
        });
        let mut chunks: Vec<Prefill> =
            others.iter().map(|p| Prefill { rows: room.take(p, 1), ..*p }).collect();
        let rest = room.take(&Prefill { rows: first.rows - half, ..*first }, 1);
        chunks.insert(0, Prefill { rows: half + rest, ..*first });
        for (chunk, whole) in chunks.iter().zip(&prefills) {
            if chunk.rows == whole.rows {
                self.charge_token(chunk.id);
            }
        }
        chunks.retain(|chunk| chunk.rows > 0);
        chunks
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

    /// Appends the next `rows` rows of a sequence to the plan, and rows of tokens that were drafted to follow them.
    fn push_rows(&mut self, id: SequenceId, rows: usize, drafts: Vec<u32>, outline: &mut Outline) {
        let Some(live) = self.live.get_mut(&id.request) else { return };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return };
        let plan = &mut outline.plan;
        let end = sequence.planned + rows;
        for position in sequence.planned..end {
            let token = sequence.token(position);
            if token.is_none() {
                plan.pending.push(PendingId { row: plan.ids.len(), sample: sequence.last_sample });
            }
            plan.ids.push(token.unwrap_or(0));
        }
        plan.ids.extend(&drafts);
        let draws = end == sequence.end(live.run_ahead);
        let scored = sequence.scores();
        let kv_len = end + drafts.len();
        sequence.planned = kv_len;
        let blocks = self.config.blocks_for(kv_len);
        plan.sequences.push(PlannedSequence {
            id,
            rows: rows + drafts.len(),
            drafts: drafts.len(),
            kv_len,
            block_table: sequence.blocks.iter().take(blocks).copied().collect(),
            scored,
        });
        outline.requests.insert((live.arrival, id.request));
        if draws {
            let (first, samples) = (sequence.output.len() + sequence.in_flight, 1 + drafts.len());
            sequence.in_flight += samples;
            plan.logit_rows.extend(plan.ids.len() - samples..plan.ids.len());
            plan.samples
                .extend((first..first + samples).map(|position| PlannedSample { sequence: id, position }));
            sequence.last_sample = plan.samples.len() - 1;
            let (arrival, stay) = (live.arrival, sequence.stay);
            outline.drawings.push(Drawing { id, arrival, stay, kv_len: end, drafts });
        }
    }
}

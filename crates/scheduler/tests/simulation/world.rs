//! Scheduler, device and clients in one seeded run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use longhaul_scheduler::{
    CacheIdentity, CacheScope, Config, Event, FinishReason, KeyId, NgramConfig, QueueLimits, Request,
    RequestId, SampleResult, Scheduler, SequenceId, StepPlan, StepResults,
};

use crate::ledger::{Ledger, realm, stop_tokens};
use crate::model::{Device, VOCAB};
use crate::rng::Rng;

/// Counts of a run, to show that it was not idle.
#[derive(Debug, Default, Clone)]
pub struct Totals {
    pub requests: u64,
    pub steps: u64,
    pub tokens: u64,
    pub cached_tokens: u64,
    pub scored_tokens: u64,
    pub draft_tokens: u64,
    pub accepted_tokens: u64,
    /// Rows that were not finite, and draws that failed, behind a wrong draft.
    pub in_vain: u64,
    pub copies: u64,
    pub scrubs: u64,
    pub preemptions: u64,
    pub evictions: u64,
    pub pending: u64,
    pub engine_losses: u64,
    pub max_preemptions: u32,
    pub outcomes: BTreeMap<&'static str, u64>,
    /// Steps that the last request took after the faults stopped, over the bound; per mille.
    pub worst_tail: u64,
}

impl Totals {
    pub fn add(&mut self, other: &Totals) {
        self.requests += other.requests;
        self.steps += other.steps;
        self.tokens += other.tokens;
        self.cached_tokens += other.cached_tokens;
        self.scored_tokens += other.scored_tokens;
        self.draft_tokens += other.draft_tokens;
        self.accepted_tokens += other.accepted_tokens;
        self.in_vain += other.in_vain;
        self.copies += other.copies;
        self.scrubs += other.scrubs;
        self.preemptions += other.preemptions;
        self.evictions += other.evictions;
        self.pending += other.pending;
        self.engine_losses += other.engine_losses;
        self.max_preemptions = self.max_preemptions.max(other.max_preemptions);
        self.worst_tail = self.worst_tail.max(other.worst_tail);
        for (outcome, count) in &other.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
    }
}

/// A step that the device has run and whose end the scheduler has not been told.
pub struct Running {
    pub plan: StepPlan,
    samples: Vec<SampleResult>,
    fails: bool,
}

pub struct World {
    rng: Rng,
    pub config: Config,
    pub scheduler: Scheduler,
    device: Device,
    pub ledger: Ledger,
    pub on_device: VecDeque<Running>,
    /// The clock as it reads.
    now: Duration,
    /// The latest that it has read: what the scheduler goes by.
    heard: Duration,
    faults: bool,
    next_id: u64,
    documents: Vec<Vec<u32>>,
    /// Requests per thousand steps.
    load: usize,
    stopped: bool,
    /// Sequences that decoded in the latest step.
    pub decoded: BTreeSet<SequenceId>,
    /// Sequences that were hit behind a wrong draft, and may have to compute anew what was right beside it.
    pub hit_in_vain: BTreeSet<SequenceId>,
    pub preemptions: u64,
    pub next_step: u64,
    totals: Totals,
}

fn config(rng: &mut Rng) -> Config {
    let block_size = [1, 2, 4, 8][rng.below(4)];
    let blocks = rng.range(4, 40);
    let max_running = rng.range(1, 10);
    let limits = |rng: &mut Rng| match rng.below(3) {
        0 => QueueLimits::NONE,
        1 => QueueLimits { requests: rng.range(1, 20), ..QueueLimits::NONE },
        _ => QueueLimits { requests: 30, tokens: rng.range(40, 400), bytes: rng.range(200, 2000) },
    };
    Config {
        max_running,
        max_step_rows: max_running + rng.range(1, 40),
        max_mixed_prefill_rows: rng.range(1, 24),
        max_logit_rows: if rng.permille(500) { max_running + rng.below(12) } else { usize::MAX },
        max_scored_rows: rng.range(1, 16),
        speculation: rng.permille(700).then(|| {
            let min = rng.range(1, 2);
            let (num_speculative_tokens, prompt_lookup_max) = (rng.range(1, 6), min + rng.below(3));
            NgramConfig { num_speculative_tokens, prompt_lookup_max, prompt_lookup_min: min }
        }),
        max_in_flight: rng.range(1, 2),
        watermark_blocks: rng.below(4),
        priority_levels: rng.range(1, 4) as u8,
        aging_interval: Duration::from_millis(rng.range(50, 2000) as u64),
        queue: limits(rng),
        key_queue: limits(rng),
        key_max_started: if rng.permille(300) { rng.range(1, 3) } else { usize::MAX },
        max_choices: 4,
        queue_timeout: rng.permille(400).then(|| Duration::from_millis(rng.range(100, 4000) as u64)),
        max_request_time: rng.permille(300).then(|| Duration::from_millis(rng.range(500, 9000) as u64)),
        prefix_cache: !rng.permille(150),
        cache_identity: CacheIdentity { secret: [rng.below(256) as u8; 32], ..CacheIdentity::default() },
        ..Config::new(blocks, block_size, rng.range(24, 120).min(blocks * block_size * 5 / 4))
    }
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let config = config(&mut rng);
        let documents = (0..3)
            .map(|_| (0..config.max_model_len).map(|_| rng.below(VOCAB as usize) as u32).collect())
            .collect();
        Self {
            scheduler: Scheduler::new(config.clone()).expect("the configuration is in order"),
            device: Device::new(config.blocks, config.block_size),
            ledger: Ledger::new(),
            on_device: VecDeque::new(),
            now: Duration::ZERO,
            heard: Duration::ZERO,
            faults: true,
            next_id: 0,
            documents,
            load: [20, 100, 300, 800][rng.below(4)],
            stopped: false,
            decoded: BTreeSet::new(),
            hit_in_vain: BTreeSet::new(),
            preemptions: 0,
            next_step: 0,
            totals: Totals::default(),
            rng,
            config,
        }
    }

    /// `steps` turns, a part of them with faults; then none, until every request has ended.
    pub fn run(mut self, steps: usize) -> Result<Totals, String> {
        let calm = steps * 7 / 8;
        for turn in 0..calm {
            self.turn(true).map_err(|e| format!("turn {turn}: {e}"))?;
        }
        let stop = self.rng.permille(100);
        if stop {
            self.stopped = true;
            let event = if self.rng.permille(500) { Event::Drain } else { Event::Stop };
            self.advance(vec![event]).map_err(|e| format!("stopping: {e}"))?;
        }
        let bound = self.bound();
        let mut taken = 0;
        while !self.ledger.live.is_empty() || !self.on_device.is_empty() {
            self.turn(false).map_err(|e| format!("calm turn {taken}: {e}"))?;
            taken += 1;
            if taken > bound {
                let live: Vec<_> = self.ledger.live.iter().take(5).collect();
                return Err(format!("{live:?} have not ended {taken} turns after the last fault"));
            }
        }
        // The rest of the run is idle.
        for turn in taken..steps - calm {
            self.turn(false).map_err(|e| format!("idle turn {turn}: {e}"))?;
        }
        self.totals.worst_tail = (1000 * taken / bound.max(1)) as u64;
        self.finish()
    }

    /// Turns in which all that is there has to end: the first in rank always moves, so this is at most what each would take alone,
    /// one after the other, and as much again for what was preempted and computed anew.
    fn bound(&self) -> usize {
        let alone = |row: &crate::ledger::Row| {
            let r = &row.request;
            let rows = match r.scored {
                true => self.config.min_scored_rows(),
                false => self.config.min_prefill_rows(),
            };
            let prefill = 2 * (r.prompt.len() + r.max_tokens).div_ceil(rows);
            r.choices * (prefill + r.max_tokens + 2)
        };
        let all: usize = self.ledger.live.iter().filter_map(|id| self.ledger.rows.get(id)).map(alone).sum();
        // With two steps in flight a token is seen one turn late; a result is delivered in two of three turns.
        16 + 2 * all * 3 * self.config.max_in_flight
    }

    fn turn(&mut self, faults: bool) -> Result<(), String> {
        let mut events = Vec::new();
        self.faults = faults;
        self.tick();
        if self.rng.permille(667) || self.on_device.len() >= self.config.max_in_flight {
            events.extend(self.deliver());
        }
        if faults {
            self.clients(&mut events);
            if self.rng.permille(1) {
                return self.lose_engine(events);
            }
        }
        self.advance(events)
    }

    /// Time passes, jumps ahead, or seems to go back.
    fn tick(&mut self) {
        let step = Duration::from_millis(self.rng.range(1, 30) as u64);
        self.now = match self.faults.then(|| self.rng.below(1000)) {
            Some(0) => self.heard + Duration::from_secs(3600),
            Some(1..20) => self.heard.saturating_sub(Duration::from_secs(50)),
            _ => self.heard + step,
        };
        self.heard = self.heard.max(self.now);
    }

    fn deliver(&mut self) -> Option<Event> {
        let Running { plan, samples, fails } = self.on_device.pop_front()?;
        if fails {
            return Some(Event::StepFailed(plan.step));
        }
        Some(Event::Results(StepResults { step: plan.step, samples }))
    }

    fn clients(&mut self, events: &mut Vec<Event>) {
        let burst = if self.rng.permille(3) { 30 } else { 1 };
        for _ in 0..burst {
            if self.rng.below(1000) < self.load {
                let request = self.request();
                self.ledger.submit(request.clone(), self.heard);
                events.push(Event::Submit(request));
                self.totals.requests += 1;
            }
        }
        let live: Vec<RequestId> = self.ledger.live.iter().copied().collect();
        for id in live {
            let (gone, reads, by_text) =
                (self.rng.permille(2), !id.0.is_multiple_of(7), self.rng.permille(3));
            let choice = self.rng.below(4) as u32;
            let Some(row) = self.ledger.rows.get_mut(&id) else { continue };
            if reads {
                row.unread = 0;
            }
            // A client that does not read is cut off.
            if gone || row.unread > 24 {
                row.blame.cancelled = true;
                events.push(Event::Cancel(id));
            } else if by_text {
                let sequence = SequenceId { request: id, choice };
                let reason = [FinishReason::Stop, FinishReason::ToolCalls][self.rng.below(2)];
                if let Some(choice) = row.choices.get_mut(choice as usize) {
                    choice.by_text = true;
                    events.push(Event::Finish { sequence, reason });
                }
            }
        }
        if self.rng.permille(2) {
            // Of a request that has ended, or never was.
            let id = self.rng.below(self.next_id as usize + 3) as u64;
            if !self.ledger.live.contains(&RequestId(id)) {
                events.push(Event::Cancel(RequestId(id)));
            }
        }
    }

    fn request(&mut self) -> Request {
        let rng = &mut self.rng;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let key = KeyId([0, 0, 0, 1, 1, 2][rng.below(6)]);
        let longest = self.config.max_model_len;
        let document = &self.documents[rng.below(3)];
        let mut prompt = document[..rng.range(0, longest / 2)].to_vec();
        prompt.extend((0..rng.below(6)).map(|_| rng.below(VOCAB as usize) as u32));
        let max_tokens = if rng.permille(15) { rng.below(3 * longest) } else { rng.range(1, longest / 2) };
        let deadline = match rng.below(20) {
            0 => Some(self.heard.saturating_sub(Duration::from_millis(5))),
            1..4 => Some(self.heard + Duration::from_millis(rng.range(1, 4000) as u64)),
            _ => None,
        };
        Request {
            choices: if rng.permille(200) { rng.range(2, 4) } else { 1 },
            stop_tokens: stop_tokens(key.0),
            priority: rng.below(usize::from(self.config.priority_levels)) as u8,
            deadline,
            cache: match rng.below(10) {
                0 => CacheScope::Off,
                1..4 => CacheScope::Shared,
                _ => CacheScope::Key,
            },
            cache_salt: if rng.permille(200) { vec![7] } else { Vec::new() },
            run_ahead: !rng.permille(300),
            scored: rng.permille(150),
            speculate: rng.permille(600),
            ..Request::new(id, key, prompt, max_tokens)
        }
    }

    /// A rank is lost: everything ends at once, and a new process takes over.
    fn lose_engine(&mut self, mut events: Vec<Event>) -> Result<(), String> {
        for id in &self.ledger.live {
            if let Some(row) = self.ledger.rows.get_mut(id) {
                row.blame.failed = true;
            }
        }
        events.push(Event::EngineLost);
        self.on_device.clear();
        self.advance(events)?;
        if !self.ledger.live.is_empty() {
            return Err(format!("{:?} outlive the engine", self.ledger.live));
        }
        self.check_idle()?;
        self.count_scheduler();
        self.totals.engine_losses += 1;
        self.scheduler = Scheduler::new(self.config.clone()).map_err(|e| e.to_string())?;
        self.scheduler.step(self.heard, []).map_err(|e| e.to_string())?;
        self.device = Device::new(self.config.blocks, self.config.block_size);
        (self.preemptions, self.next_step) = (0, 0);
        self.decoded.clear();
        self.hit_in_vain.clear();
        Ok(())
    }

    fn advance(&mut self, events: Vec<Event>) -> Result<(), String> {
        let lost = events.contains(&Event::EngineLost);
        let step = self.scheduler.step(self.now, events).map_err(|e| e.to_string())?;
        for update in &step.updates {
            self.ledger.take(update, &self.config, self.heard, self.stopped)?;
        }
        if self.totals.steps.is_multiple_of(4) {
            self.scheduler.audit()?;
        }
        match step.plan {
            Some(plan) => self.execute(plan)?,
            None if self.on_device.is_empty() && !self.ledger.live.is_empty() && !lost => {
                let snapshot = self.scheduler.snapshot();
                return Err(format!("nothing is planned while requests wait: {snapshot:?}"));
            }
            None => {}
        }
        self.totals.steps += 1;
        Ok(())
    }

    fn execute(&mut self, plan: StepPlan) -> Result<(), String> {
        self.check_plan(&plan)?;
        let poison = (self.faults && self.rng.permille(3)).then(|| self.rng.below(plan.rows()));
        let fails = self.faults && self.rng.permille(2);
        let rows = &self.ledger.rows;
        let realm = |id: SequenceId| rows.get(&id.request).map_or(0, |row| realm(&row.request));
        let mut executed = self.device.run(&plan, realm, poison, fails)?;
        let hit = poison.map(|row| self.owner(&plan, row));
        for id in &executed.poisoned {
            if hit == Some((*id, true)) {
                self.hit_behind_wrong_draft(*id);
                continue;
            }
            let Some(row) = self.ledger.rows.get_mut(&id.request) else { continue };
            // The row that was hit belongs to one sequence; whoever else is hit must be of the same request.
            row.blame.poisoned |= hit == Some((*id, false));
            if !row.blame.poisoned && !row.blame.failed && self.ledger.live.contains(&id.request) {
                return Err(format!("{id:?} reads what is not finite, and was never hit"));
            }
        }
        for id in &executed.trailed {
            let Some(row) = self.ledger.rows.get(&id.request).filter(|row| row.outcome.is_none()) else {
                continue;
            };
            // A copy of what another choice is writing may have such a trail, which nobody reads.
            if row.request.choices == 1 && !row.blame.poisoned && !row.blame.failed {
                return Err(format!("{id:?} has what is not finite behind its last row"));
            }
        }
        let draw_fails =
            (self.faults && self.rng.permille(2)).then(|| self.rng.below(executed.samples.len()));
        if let Some((sample, &row)) =
            draw_fails.and_then(|at| Some((executed.samples.get_mut(at)?, plan.logit_rows.get(at)?)))
        {
            *sample = SampleResult::Failed;
            match self.owner(&plan, row) {
                (id, true) => self.hit_behind_wrong_draft(id),
                (id, false) => {
                    if let Some(row) = self.ledger.rows.get_mut(&id.request) {
                        row.blame.failed = true;
                    }
                }
            }
        }
        if fails {
            for sequence in &plan.sequences {
                if let Some(row) = self.ledger.rows.get_mut(&sequence.id.request) {
                    row.blame.failed = true;
                }
            }
        }
        self.totals.copies += plan.copies.len() as u64;
        self.totals.scrubs += plan.scrub.len() as u64;
        self.totals.pending += plan.pending.len() as u64;
        self.on_device.push_back(Running { plan, samples: executed.samples, fails });
        Ok(())
    }

    /// Whose row it is, and whether it is behind a wrong draft.
    fn owner(&self, plan: &StepPlan, row: usize) -> (SequenceId, bool) {
        let mut end = 0;
        for s in &plan.sequences {
            end += s.rows;
            if row < end {
                let right = self.ledger.right_drafts(s.id, &plan.ids[end - s.drafts..end]);
                return (s.id, row >= end - s.drafts + right);
            }
        }
        unreachable!("row {row} of {}", plan.rows())
    }

    fn hit_behind_wrong_draft(&mut self, id: SequenceId) {
        self.hit_in_vain.insert(id);
        self.totals.in_vain += 1;
    }

    fn count_scheduler(&mut self) {
        let snapshot = self.scheduler.snapshot();
        self.totals.preemptions += snapshot.preemptions;
        self.totals.evictions += snapshot.evictions;
        self.totals.draft_tokens += snapshot.draft_tokens;
        self.totals.accepted_tokens += snapshot.accepted_tokens;
    }

    fn finish(mut self) -> Result<Totals, String> {
        self.check_idle()?;
        self.count_scheduler();
        let open = self.ledger.rows.values().filter(|row| row.outcome.is_none()).count();
        if open > 0 {
            return Err(format!("{open} requests have no outcome"));
        }
        self.totals.tokens = self.ledger.tokens;
        self.totals.cached_tokens = self.ledger.cached_tokens;
        self.totals.scored_tokens = self.ledger.scored_tokens;
        self.totals.max_preemptions = self.ledger.max_preemptions;
        self.totals.outcomes = self.ledger.outcomes.iter().map(|(o, &n)| (o.label(), n)).collect();
        Ok(self.totals)
    }
}

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::blocks::BlockManager;
use crate::config::{Config, ConfigError};
use crate::ngram::{NgramConfig, NgramIndex};
use crate::plan::{ResultsError, StepPlan};
use crate::prefix::{BlockHash, CacheScope, root_hash};
use crate::queue::{Load, Queue};
use crate::request::{
    Event, FinishReason, KeyId, Outcome, Refusal, Request, RequestId, SequenceId, Update, Usage,
};
use crate::results::InFlight;
use crate::sequence::{Phase, Sequence};

/// A request that has not ended.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) key: KeyId,
    pub(crate) priority: u8,
    pub(crate) arrived: Duration,
    /// Order of arrival.
    pub(crate) arrival: u64,
    /// Order of the start; `None` while it waits.
    pub(crate) started: Option<u64>,
    deadline: Option<Duration>,
    queue_deadline: Option<Duration>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) run_ahead: bool,
    /// Where its chain of block hashes begins; `None` when it neither uses nor feeds the cache.
    pub(crate) root: Option<BlockHash>,
    pub(crate) load: Load,
    pub(crate) sequences: Vec<Sequence>,
    /// Whether the choices after the first have begun.
    pub(crate) forked: bool,
    pub(crate) cached_tokens: usize,
    /// The n-grams of the prompt, if drafts are wanted.
    pub(crate) lookup: Option<NgramIndex>,
}

/// Whether requests are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Serving,
    Draining,
    Lost,
}

/// What [`Scheduler::step`] decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// The next step for the device; `None` when there is nothing to do before more events.
    pub plan: Option<StepPlan>,
    /// News for the caller, in order.
    pub updates: Vec<Update>,
}

/// Levels and counts for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// Requests that were not started.
    pub waiting_requests: usize,
    /// Prompt tokens of these.
    pub waiting_tokens: usize,
    /// Sequences that hold blocks.
    pub running: usize,
    /// Sequences that were started and hold none.
    pub suspended: usize,
    /// Steps in flight.
    pub in_flight: usize,
    /// Blocks of the pool.
    pub blocks: usize,
    /// Blocks that can be handed out; all when nothing runs.
    pub blocks_available: usize,
    /// Blocks with a known prefix.
    pub blocks_cached: usize,
    /// Cached blocks given up for others so far.
    pub evictions: u64,
    /// Times that a sequence gave up its blocks for others, so far.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache so far.
    pub cache_queries: u64,
    /// Prompt tokens found there.
    pub cache_hits: u64,
    /// Times that tokens were drafted, of steps whose results are known.
    pub drafts: u64,
    /// Tokens drafted.
    pub draft_tokens: u64,
    /// Of these, drawn.
    pub accepted_tokens: u64,
    /// Of these, at each place of a draft; places beyond [`NgramConfig::num_speculative_tokens`] count none.
    pub accepted_per_position: [u64; NgramConfig::MAX_TOKENS],
    /// Requests submitted so far.
    pub received: u64,
    /// Requests ended so far, as in [`Outcome::ALL`]. Their sum and the live ones are `received`.
    pub finished: [u64; Outcome::ALL.len()],
}

impl Snapshot {
    /// A draft of `tokens` tokens has come back, and the first `accepted` of them were drawn.
    pub(crate) fn count_draft(&mut self, tokens: usize, accepted: usize) {
        self.drafts += 1;
        self.draft_tokens += tokens as u64;
        self.accepted_tokens += accepted as u64;
        self.accepted_per_position.iter_mut().take(accepted).for_each(|count| *count += 1);
    }
}

/// Continuous batching over paged KV blocks as a state machine; see the crate's documentation.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) blocks: BlockManager,
    pub(crate) queue: Queue,
    pub(crate) live: BTreeMap<RequestId, Live>,
    /// Sequences that hold blocks.
    pub(crate) running: Vec<SequenceId>,
    /// Sequences that were started and hold none.
    pub(crate) suspended: Vec<SequenceId>,
    pub(crate) in_flight: VecDeque<InFlight>,
    pub(crate) next_step: u64,
    pub(crate) next_start: u64,
    pub(crate) next_stay: u64,
    pub(crate) counts: Snapshot,
    pub(crate) now: Duration,
    /// When queued and started requests are too late.
    timers: BTreeSet<(Duration, RequestId)>,
    state: State,
    pub(crate) updates: Vec<Update>,
}

impl Scheduler {
    /// A scheduler without requests.
    ///
    /// # Errors
    /// Those of [`Config::check`].
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            blocks: BlockManager::new(config.blocks),
            config,
            queue: Queue::default(),
            live: BTreeMap::new(),
            running: Vec::new(),
            suspended: Vec::new(),
            in_flight: VecDeque::new(),
            next_step: 0,
            next_start: 0,
            next_stay: 1,
            counts: Snapshot::default(),
            now: Duration::ZERO,
            timers: BTreeSet::new(),
            state: State::Serving,
            updates: Vec::new(),
        })
    }

    /// The sizes and limits.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Takes what has happened and plans the next step. `now` is a monotonic clock of the caller; a reading before the latest one
    /// counts as that.
    ///
    /// # Errors
    /// [`ResultsError`], a bug of the caller, at the first event that it concerns. The events after it are not taken.
    pub fn step(
        &mut self,
        now: Duration,
        events: impl IntoIterator<Item = Event>,
    ) -> Result<Step, ResultsError> {
        self.now = self.now.max(now);
        for event in events {
            self.handle(event)?;
        }
        self.expire();
        let plan = self.plan();
        Ok(Step { plan, updates: std::mem::take(&mut self.updates) })
    }

    fn handle(&mut self, event: Event) -> Result<(), ResultsError> {
        match event {
            Event::Submit(request) => self.submit(request),
            Event::Cancel(id) => self.end_request(id, Outcome::ClientGone),
            Event::Finish { sequence, reason } => self.finish_by_text(sequence, reason),
            Event::Results(results) => self.apply(results)?,
            Event::StepFailed(step) => self.fail_step(step)?,
            Event::Drain if self.state == State::Serving => self.state = State::Draining,
            Event::Drain => {}
            Event::Stop => {
                if self.state == State::Serving {
                    self.state = State::Draining;
                }
                self.end_all(Outcome::Drained);
            }
            Event::EngineLost => {
                self.state = State::Lost;
                self.in_flight.clear();
                self.end_all(Outcome::EngineError);
            }
        }
        Ok(())
    }

    fn submit(&mut self, request: Request) {
        self.counts.received += 1;
        if let Err(refusal) = self.check(&request) {
            let usage = Usage { prompt_tokens: request.prompt.len(), ..Usage::default() };
            self.tell_end(request.id, refusal.outcome(), Some(refusal), usage);
            return;
        }
        let Request { id, key, prompt, max_tokens, choices, priority, .. } = request;
        let load = Load::of(prompt.len(), request.bytes);
        let root = (self.config.prefix_cache && request.cache != CacheScope::Off).then(|| {
            let Config { cache_identity, block_size, .. } = &self.config;
            root_hash(cache_identity, *block_size, &request.cache, key, &request.cache_salt)
        });
        let speculation = self.config.speculation.filter(|_| request.speculate);
        let secret = &self.config.cache_identity.secret;
        let lookup = |first| speculation.map(|config| NgramIndex::new(config, secret, first));
        let sequence = |choice| {
            let scored = request.scored && choice == 0;
            let lookup = lookup(prompt.len());
            Sequence::new(SequenceId { request: id, choice }, Arc::clone(&prompt), max_tokens, scored, lookup)
        };
        let latest = self.config.max_request_time.map(|time| self.now.saturating_add(time));
        let deadline = [request.deadline, latest].into_iter().flatten().min();
        let queue_deadline = self.config.queue_timeout.map(|time| self.now.saturating_add(time));
        self.timers.extend([deadline, queue_deadline].into_iter().flatten().map(|at| (at, id)));
        self.queue.push(key, priority, id, load);
        let live = Live {
            key,
            priority,
            arrived: self.now,
            arrival: self.counts.received,
            started: None,
            deadline,
            queue_deadline,
            stop_tokens: request.stop_tokens,
            run_ahead: request.run_ahead && speculation.is_none(),
            root,
            load,
            sequences: (0..choices as u32).map(sequence).collect(),
            forked: choices == 1,
            cached_tokens: 0,
            lookup: lookup(0),
        };
        self.live.insert(id, live);
    }

    /// Refuses at once what can never run, or should not wait.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let config = &self.config;
        let parameter = |field, message: String| Err(Refusal::Parameter { field, message });
        if self.live.contains_key(&request.id) {
            return Err(Refusal::DuplicateId(request.id.0));
        }
        match self.state {
            State::Serving => {}
            State::Draining => return Err(Refusal::Draining),
            State::Lost => return Err(Refusal::EngineLost),
        }
        if request.prompt.is_empty() {
            return parameter("prompt", "has no tokens".into());
        }
        if request.max_tokens == 0 {
            return parameter("max_tokens", "must be at least 1".into());
        }
        if !(1..=config.max_choices).contains(&request.choices) {
            return parameter("n", format!("is {}; must be 1 to {}", request.choices, config.max_choices));
        }
        if request.priority >= config.priority_levels {
            let highest = config.priority_levels - 1;
            return parameter("priority", format!("is {}; must be 0 to {highest}", request.priority));
        }
        let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
        let tokens = prompt.saturating_add(max_tokens);
        if tokens > config.max_model_len {
            let max_model_len = config.max_model_len;
            return Err(Refusal::TooLong { prompt, max_tokens, max_model_len });
        }
        let needed = config.blocks_for(tokens);
        if needed > config.blocks {
            let Config { block_size, blocks, .. } = *config;
            return Err(Refusal::NeverFits { needed, block_size, blocks });
        }
        if request.deadline.is_some_and(|deadline| deadline <= self.now) {
            return Err(Refusal::Late);
        }
        let load = Load::of(prompt, request.bytes);
        match self.queue.refuses(request.key, load, config.key_queue, config.queue) {
            Some((true, bound, limit)) => Err(Refusal::KeyQueueFull { bound, limit }),
            Some((false, bound, limit)) => Err(Refusal::QueueFull { bound, limit }),
            None => Ok(()),
        }
    }

    /// Ends what is too late.
    fn expire(&mut self) {
        while let Some(&(at, id)) = self.timers.first().filter(|(at, _)| *at <= self.now) {
            self.timers.pop_first();
            let Some(live) = self.live.get(&id) else { continue };
            if live.deadline == Some(at) {
                self.end_request(id, Outcome::Deadline);
            } else if live.started.is_none() {
                self.end_request(id, Outcome::ShedEngine);
            }
        }
    }

    fn finish_by_text(&mut self, id: SequenceId, reason: FinishReason) {
        let Some(live) = self.live.get(&id.request) else { return };
        let sequence = live.sequences.get(id.choice as usize);
        if sequence.is_some_and(|s| matches!(s.phase, Phase::Running | Phase::Suspended)) {
            if !live.forked {
                self.fork(id.request);
            }
            self.finish_choice(id, reason, None);
        }
    }

    pub(crate) fn finish_choice(&mut self, id: SequenceId, reason: FinishReason, stop_token: Option<u32>) {
        self.suspend_or_finish(id, Phase::Done(reason));
        self.updates.push(Update::ChoiceFinished { sequence: id, reason, stop_token });
        let Some(live) = self.live.get(&id.request) else { return };
        let mut reasons = live.sequences.iter().map(|s| match s.phase {
            Phase::Done(reason) => Some(reason),
            _ => None,
        });
        // `None` while a choice goes on.
        let first_cut = reasons.try_fold(FinishReason::Stop, |all, reason| match (all, reason?) {
            (FinishReason::Stop, reason) => Some(reason),
            (cut, _) => Some(cut),
        });
        if let Some(reason) = first_cut {
            self.end_request(id.request, Outcome::Complete(reason));
        }
    }

    /// Takes a sequence's blocks, and its place among the running or the suspended. What was written and is not known to be
    /// finite is zeroed before it is used again.
    pub(crate) fn suspend_or_finish(&mut self, id: SequenceId, phase: Phase) {
        self.running.retain(|&other| other != id);
        self.suspended.retain(|&other| other != id);
        let Some(live) = self.live.get_mut(&id.request) else { return };
        let Some(sequence) = live.sequences.get_mut(id.choice as usize) else { return };
        sequence.phase = phase;
        if matches!(phase, Phase::Done(_)) {
            sequence.lookup = None;
        }
        let (proven, planned) = (sequence.proven, sequence.planned);
        let table = sequence.take_blocks();
        if planned > proven {
            let written = table.iter().take(self.config.blocks_for(planned));
            written.skip(proven / self.config.block_size).for_each(|&block| self.blocks.soil(block));
        }
        self.blocks.release_table(&table);
        if phase == Phase::Suspended {
            self.suspended.push(id);
        }
    }

    /// The one place where a request ends. Without effect on one that has ended.
    pub(crate) fn end_request(&mut self, id: RequestId, outcome: Outcome) {
        let Some(live) = self.live.get(&id) else { return };
        let usage = Usage {
            prompt_tokens: live.load.tokens,
            cached_tokens: live.cached_tokens,
            output_tokens: live.sequences.iter().map(|s| s.output.len()).sum(),
            preemptions: live.sequences.iter().map(|s| s.preemptions).sum(),
        };
        let sequences: Vec<(SequenceId, Phase)> = live.sequences.iter().map(|s| (s.id, s.phase)).collect();
        for (sequence, phase) in sequences {
            if matches!(phase, Phase::Running | Phase::Suspended) {
                self.suspend_or_finish(sequence, Phase::New);
            }
        }
        let Some(live) = self.live.remove(&id) else { return };
        for at in [live.deadline, live.queue_deadline].into_iter().flatten() {
            self.timers.remove(&(at, id));
        }
        if live.started.is_none() {
            self.queue.remove(live.key, live.priority, id, live.load);
        }
        self.queue.end(live.key, live.started.is_some());
        self.tell_end(id, outcome, None, usage);
    }

    fn tell_end(&mut self, id: RequestId, outcome: Outcome, refusal: Option<Refusal>, usage: Usage) {
        if let Some(count) =
            Outcome::ALL.iter().position(|&o| o == outcome).and_then(|at| self.counts.finished.get_mut(at))
        {
            *count += 1;
        }
        self.updates.push(Update::Finished { id, outcome, refusal, usage });
    }

    fn end_all(&mut self, outcome: Outcome) {
        let ids: Vec<RequestId> = self.live.keys().copied().collect();
        ids.into_iter().for_each(|id| self.end_request(id, outcome));
    }

    /// Forgets all cached prefixes: the weights or the positions have changed.
    pub fn clear_prefix_cache(&mut self) {
        self.blocks.clear_cache();
    }

    /// Levels and counts as they are now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            waiting_requests: self.queue.total().requests,
            waiting_tokens: self.queue.total().tokens,
            running: self.running.len(),
            suspended: self.suspended.len(),
            in_flight: self.in_flight.len(),
            blocks: self.blocks.total(),
            blocks_available: self.blocks.available(),
            blocks_cached: self.blocks.cached(),
            evictions: self.blocks.evictions(),
            ..self.counts
        }
    }

    /// The priority of a request with what it has gained by its age.
    pub(crate) fn class(&self, live: &Live) -> u8 {
        let waited = self.now.saturating_sub(live.arrived).as_nanos();
        let gained = waited / self.config.aging_interval.as_nanos().max(1);
        let highest = self.config.priority_levels - 1;
        u8::try_from(gained.saturating_add(u128::from(live.priority))).map_or(highest, |c| c.min(highest))
    }

    /// The order among started sequences: priority, then order of start. The first is never preempted.
    pub(crate) fn rank(&self, id: SequenceId) -> (Reverse<u8>, u64, u32) {
        match self.live.get(&id.request) {
            Some(live) => (Reverse(self.class(live)), live.started.unwrap_or(u64::MAX), id.choice),
            None => (Reverse(0), u64::MAX, id.choice),
        }
    }

    pub(crate) fn sequence(&self, id: SequenceId) -> Option<(&Live, &Sequence)> {
        let live = self.live.get(&id.request)?;
        Some((live, live.sequences.get(id.choice as usize)?))
    }

    /// Checks that the books agree; for tests.
    ///
    /// # Errors
    /// The contradiction in words.
    pub fn audit(&self) -> Result<(), String> {
        let sequences = || self.live.values().flat_map(|l| &l.sequences);
        self.blocks.audit(sequences().map(|s| s.blocks.as_slice()))?;
        for s in sequences() {
            let id = s.id;
            if s.blocks.len() < self.config.blocks_for(s.planned) {
                return Err(format!("{id:?} has planned {} tokens in {} blocks", s.planned, s.blocks.len()));
            }
            if s.proven > s.planned || s.published * self.config.block_size > s.planned {
                return Err(format!("{id:?}: proven {}, published {}", s.proven, s.published));
            }
            if (s.phase == Phase::Running) != self.running.contains(&id)
                || (s.phase == Phase::Suspended) != self.suspended.contains(&id)
                || (s.phase != Phase::Running && !s.blocks.is_empty())
            {
                return Err(format!("{id:?} is {:?} with {} blocks", s.phase, s.blocks.len()));
            }
        }
        if self.running.len() > self.config.max_running {
            return Err(format!("{} sequences run", self.running.len()));
        }
        let waiting = self.live.values().filter(|l| l.started.is_none()).count();
        if waiting != self.queue.total().requests {
            return Err(format!("{waiting} wait, the queue counts {}", self.queue.total().requests));
        }
        let ended: u64 = self.counts.finished.iter().sum();
        match self.counts.received == ended + self.live.len() as u64 {
            true => Ok(()),
            false => {
                Err(format!("{} received, {ended} ended, {} live", self.counts.received, self.live.len()))
            }
        }
    }
}

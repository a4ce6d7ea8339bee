//! The step loop: what happens goes to the scheduler, its plans to the device, its news to the clients.

use std::collections::{BTreeMap, VecDeque};
use std::iter::Peekable;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use longhaul_backend::{RowError, SequenceInputs};
use longhaul_engine::{BatchDraw, BatchResults, BatchStep, ScoreRequest};
use longhaul_scheduler as scheduler;
use longhaul_scheduler::{
    FinishReason, Outcome, PlannedSample, RequestId, SampleResult, Scheduler, SequenceId, StepPlan,
    StepResults, Update,
};

use super::device::{Done, Order};
use super::request::{End, Rules, Running};
use super::status::Status;
use super::{Message, New};
use crate::lifecycle::EngineLost;
use crate::log::{Level, event};
use crate::serving::{Failure, PREEMPTIONS, STEP_ROWS, SpeculationCounts, TokenScore};

/// How often deadlines are looked at while nothing else happens.
const TICK: Duration = Duration::from_millis(20);

/// After so many failed steps in a row the device is taken for lost.
const FAILURES: usize = 3;

pub(super) struct StepLoop {
    scheduler: Scheduler,
    inbox: Receiver<Message>,
    /// `None` once the device is lost.
    device: Option<Sender<Order>>,
    status: Arc<Status>,
    rules: Rules,
    epoch: Instant,
    /// Hears why nothing is served any more.
    lost: Box<dyn Fn(EngineLost) + Send>,
    requests: BTreeMap<RequestId, Running>,
    in_flight: VecDeque<Flight>,
    events: Vec<scheduler::Event>,
    failures: usize,
    is_closed: bool,
}

/// What is to be known of a step once its results are there.
struct Flight {
    /// For each sample of the plan: whose, its place, its draw, its scores.
    samples: Vec<Sample>,
    /// Prompt tokens that are scored.
    scored: Vec<ScoredRows>,
}

/// Rows of a prompt whose next tokens are scored.
struct ScoredRows {
    request: RequestId,
    /// Position of the first row.
    first: usize,
    /// The next token of each, and the index of its scores.
    tokens: Vec<(u32, usize)>,
}

struct Sample {
    sequence: SequenceId,
    position: usize,
    draw: usize,
    score: Option<usize>,
}

impl StepLoop {
    pub(super) fn new(
        scheduler: Scheduler,
        inbox: Receiver<Message>,
        device: Sender<Order>,
        status: Arc<Status>,
        rules: Rules,
        epoch: Instant,
        lost: Box<dyn Fn(EngineLost) + Send>,
    ) -> Self {
        Self {
            scheduler,
            inbox,
            device: Some(device),
            status,
            rules,
            epoch,
            lost,
            requests: BTreeMap::new(),
            in_flight: VecDeque::new(),
            events: Vec::new(),
            failures: 0,
            is_closed: false,
        }
    }

    /// Runs until the server is dropped. A panic is the loss of the engine: nobody knows what the state is worth.
    pub(super) fn run(mut self) {
        let steps = AssertUnwindSafe(|| {
            while !self.is_closed {
                self.listen();
                // With two steps in flight, the next one is planned at once.
                while let Some(plan) = self.advance() {
                    self.send(plan);
                }
            }
        });
        if catch_unwind(steps).is_err() {
            self.lose("the step loop panicked".into(), false);
        }
        for (_, request) in std::mem::take(&mut self.requests) {
            request.fail(Failure::Drained);
        }
    }

    /// Waits for something to happen, and takes all of it.
    fn listen(&mut self) {
        let is_idle = self.requests.is_empty() && self.in_flight.is_empty() && self.events.is_empty();
        let first = if is_idle {
            self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            self.inbox.recv_timeout(if self.events.is_empty() { TICK } else { Duration::ZERO })
        };
        match first {
            Ok(message) => self.hear(message),
            Err(RecvTimeoutError::Timeout) => return,
            Err(RecvTimeoutError::Disconnected) => {
                self.is_closed = true;
                return;
            }
        }
        while let Ok(message) = self.inbox.try_recv() {
            self.hear(message);
        }
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Submit(new) => self.submit(*new),
            Message::Look(id) => self.look(id),
            Message::Done(done) => self.done(done),
            Message::Abort => self.events.push(scheduler::Event::Stop),
            Message::Close => self.is_closed = true,
        }
    }

    fn submit(&mut self, new: New) {
        let New { id, key, priority, submission, sink, place } = new;
        let scored = submission.prompt_logprobs.is_some();
        let scores_only = submission.max_tokens == 0;
        let request = Running::new(submission, sink, place, &self.rules);
        let submission = request.submission();
        let prompt = match submission.prompt.split_last() {
            // The last token's row would only draw.
            Some((_, others)) if scores_only => others.into(),
            _ => Arc::clone(&submission.prompt),
        };
        let since = |at: Instant| at.saturating_duration_since(self.epoch);
        let plain = !request.looks_back();
        let submit = scheduler::Request {
            choices: if scores_only { 1 } else { submission.n as usize },
            stop_tokens: request.stop_ids().to_vec(),
            priority,
            deadline: submission.deadline.map(since),
            cache: scheduler::CacheScope::Key,
            cache_salt: submission.cache_salt.as_deref().unwrap_or_default().as_bytes().to_vec(),
            run_ahead: plain,
            speculate: plain,
            scored,
            ..scheduler::Request::new(id, key, prompt, submission.max_tokens.max(1))
        };
        self.requests.insert(id, request);
        self.events.push(scheduler::Event::Submit(submit));
    }

    /// A client left, or stopped a choice.
    fn look(&mut self, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if request.is_cancelled() {
            self.events.push(scheduler::Event::Cancel(id));
            return;
        }
        let finish = |choice| scheduler::Event::Finish {
            sequence: SequenceId { request: id, choice },
            reason: FinishReason::Stop,
        };
        self.events.extend(request.newly_stopped().into_iter().map(finish));
    }

    fn done(&mut self, done: Done) {
        let Some(flight) = self.in_flight.pop_front() else { return };
        match done.result {
            Ok(results) => {
                self.failures = 0;
                let samples = self.take(flight, results);
                let results = StepResults { step: done.id, samples };
                self.events.push(scheduler::Event::Results(results));
            }
            Err(error) => {
                self.failures += 1;
                let reason = error.to_string();
                event(Level::Error, "a step failed", [("reason", reason.as_str().into())]);
                for id in flight.samples.iter().map(|sample| sample.sequence.request) {
                    if let Some(request) = self.requests.get_mut(&id) {
                        request.explain(Failure::Engine(reason.clone()));
                    }
                }
                if error.survived && self.failures < FAILURES {
                    self.events.push(scheduler::Event::StepFailed(done.id));
                } else {
                    self.lose(reason, error.is_device_lost());
                }
            }
        }
    }

    /// Nothing is served any more.
    fn lose(&mut self, reason: String, is_device: bool) {
        self.status.die(&reason);
        self.device = None;
        self.in_flight.clear();
        for request in self.requests.values_mut() {
            request.explain(Failure::Engine(reason.clone()));
        }
        self.events.push(scheduler::Event::EngineLost);
        (self.lost)(EngineLost { reason, is_device });
    }

    /// Hands scores to their requests; the outcome of each sample.
    fn take(&mut self, flight: Flight, results: BatchResults) -> Vec<SampleResult> {
        let BatchResults { draws, mut scores } = results;
        for ScoredRows { request, first, tokens } in flight.scored {
            let Some(request) = self.requests.get_mut(&request) else { continue };
            let score = |(id, index): (u32, usize)| {
                let scores = scores.get_mut(index).map(std::mem::take).unwrap_or_default();
                TokenScore { id, logprob: scores.logprob.unwrap_or(f32::NEG_INFINITY), top: scores.top }
            };
            request.scored(first, tokens.into_iter().map(score).collect());
        }
        let mut outcomes = Vec::with_capacity(flight.samples.len());
        for Sample { sequence, position, draw, score } in flight.samples {
            let request = self.requests.get_mut(&sequence.request);
            outcomes.push(match draws.get(draw) {
                Some(Ok(sampled)) => {
                    if let Some(request) = request {
                        let top = score.and_then(|index| scores.get_mut(index)).map(std::mem::take);
                        let top = top.unwrap_or_default().top;
                        // One token has one score: clients see whether a token was the best one by comparing them.
                        let listed = top.iter().find(|(id, _)| *id == sampled.id);
                        let logprob = listed.map_or(sampled.logprob, |(_, logprob)| *logprob);
                        let token = TokenScore { id: sampled.id, logprob, top };
                        request.drawn(sequence.choice, position, token);
                    }
                    SampleResult::Token(sampled.id)
                }
                Some(Err(RowError::NotFinite)) => SampleResult::NotFinite,
                Some(Err(RowError::NothingAllowed)) | None => {
                    if let Some(request) = request {
                        request.nothing_allowed();
                    }
                    SampleResult::Failed
                }
            });
        }
        outcomes
    }

    /// Lets the scheduler take what has happened, and tells its news.
    fn advance(&mut self) -> Option<StepPlan> {
        let now = self.epoch.elapsed();
        let step = match self.scheduler.step(now, self.events.drain(..)) {
            Ok(step) => step,
            Err(error) => {
                self.lose(format!("the step loop lost count: {error}"), false);
                // What the scheduler does with the loss it does without an error.
                self.scheduler.step(now, self.events.drain(..)).unwrap_or_default()
            }
        };
        let mut updates = step.updates.into_iter().peekable();
        while let Some(update) = updates.next() {
            self.tell(update, &mut updates);
        }
        self.publish();
        step.plan
    }

    fn tell(&mut self, update: Update, rest: &mut Peekable<impl Iterator<Item = Update>>) {
        match update {
            Update::Started { id, cached_tokens } => {
                if let Some(request) = self.requests.get_mut(&id) {
                    request.started(cached_tokens);
                }
            }
            Update::Token { sequence, token } => {
                let is_last = matches!(rest.peek(), Some(Update::ChoiceFinished {
                    sequence: of, reason: FinishReason::Length, stop_token: None,
                }) if *of == sequence);
                self.token(sequence, token, is_last.then_some(End::Length));
            }
            Update::ChoiceFinished { sequence, stop_token: Some(token), .. } => {
                self.token(sequence, token, Some(End::Stop));
            }
            Update::ChoiceFinished { .. } => {}
            Update::Finished { id, outcome, refusal, usage } => {
                if refusal.is_none() {
                    self.preempted(usage.preemptions.into());
                }
                let Some(request) = self.requests.remove(&id) else { return };
                let refusal = refusal.map(|refusal| refusal.to_string());
                match outcome {
                    Outcome::Complete(_) => {}
                    Outcome::ClientGone => {
                        // It may be gone because it failed here.
                        request.fail_if_explained();
                    }
                    Outcome::Deadline => request.fail(Failure::Deadline),
                    Outcome::Drained => request.fail(Failure::Drained),
                    Outcome::NumericError => request.fail(Failure::Numeric),
                    Outcome::EngineError | Outcome::ShedKey | Outcome::ShedEngine | Outcome::Invalid => {
                        let reason = refusal.unwrap_or_else(|| "the step it was in failed".into());
                        request.fail(Failure::Engine(reason));
                    }
                }
            }
        }
    }

    fn token(&mut self, sequence: SequenceId, token: u32, end: Option<End>) {
        let Some(request) = self.requests.get_mut(&sequence.request) else { return };
        if !request.token(sequence.choice, token, end) || request.is_cancelled() {
            self.events.push(scheduler::Event::Cancel(sequence.request));
        }
    }

    /// A request has ended that gave up its blocks so many times.
    fn preempted(&self, times: u64) {
        self.status.update(|snapshot| {
            snapshot.request_preemptions_sum += times;
            count(&mut snapshot.request_preemptions, &PREEMPTIONS, times);
        });
    }

    /// Sends a plan to the device.
    fn send(&mut self, plan: StepPlan) {
        let rows = plan.rows() as u64;
        let (order, flight) = self.order(plan);
        self.in_flight.push_back(flight);
        self.status.update(|snapshot| {
            snapshot.steps += 1;
            snapshot.step_rows_sum += rows;
            count(&mut snapshot.step_rows, &STEP_ROWS, rows);
        });
        if self.device.as_ref().is_none_or(|device| device.send(order).is_err()) {
            self.lose("the device's thread has ended".into(), false);
        }
    }

    /// A plan as the device takes it.
    fn order(&mut self, plan: StepPlan) -> (Order, Flight) {
        let mut step = BatchStep {
            zero: plan.scrub,
            copies: plan.copies.iter().map(|copy| (copy.source, copy.destination)).collect(),
            ids: plan.ids,
            ..BatchStep::default()
        };
        let mut flight = Flight { samples: Vec::with_capacity(plan.samples.len()), scored: Vec::new() };
        let mut samples = plan.logit_rows.iter().copied().zip(plan.samples).peekable();
        let mut end = 0;
        for sequence in plan.sequences {
            let first = end;
            end += sequence.rows;
            let mut request = self.requests.get_mut(&sequence.id.request);
            let mut scored: Option<ScoredRows> = None;
            // Rows that draw are a sequence's last; only of one that is scored do others matter.
            let drawing = samples.peek().map_or(end, |(row, _)| *row).min(end);
            for row in if sequence.scored { first } else { drawing }..end {
                let position = sequence.kv_len - (end - row);
                let sample = samples.next_if(|(of, _)| *of == row).map(|(_, sample)| sample);
                let to_score =
                    request.as_ref().filter(|_| sequence.scored).and_then(|r| r.to_score(position));
                if sample.is_none() && to_score.is_none() {
                    continue;
                }
                let index = step.logit_rows.len();
                step.logit_rows.push(row);
                if let Some((id, top)) = to_score {
                    let rows = || ScoredRows {
                        request: sequence.id.request,
                        first: position,
                        tokens: Vec::with_capacity(end - row),
                    };
                    scored.get_or_insert_with(rows).tokens.push((id, step.scores.len()));
                    step.scores.push(ScoreRequest { row: index, id: Some(id), top });
                }
                let mut draw = BatchDraw::default();
                if let Some(PlannedSample { sequence, position }) = sample {
                    let mut score = None;
                    if let Some(request) = &mut request {
                        let (own, goes_on) = request.draw(sequence.choice, position);
                        draw = own;
                        if !goes_on {
                            self.events.push(scheduler::Event::Cancel(sequence.request));
                        }
                        let top = request.top_logprobs();
                        if top > 0 {
                            score = Some(step.scores.len());
                            step.scores.push(ScoreRequest { row: index, id: None, top });
                        }
                    }
                    flight.samples.push(Sample { sequence, position, draw: index, score });
                }
                step.draws.push(draw);
            }
            flight.scored.extend(scored);
            step.sequences.push(SequenceInputs {
                rows: sequence.rows,
                kv_len: sequence.kv_len,
                block_table: sequence.block_table,
            });
        }
        let samples = flight.samples.iter().map(|sample| sample.draw).collect();
        (Order { id: plan.step, step, pending: plan.pending, samples }, flight)
    }

    fn publish(&self) {
        let now = self.scheduler.snapshot();
        self.status.update(|snapshot| {
            snapshot.running = now.running + now.suspended;
            snapshot.waiting = now.waiting_requests;
            snapshot.waiting_tokens = now.waiting_tokens;
            let held = now.blocks - now.blocks_available.min(now.blocks);
            snapshot.kv_cache_usage = held as f64 / now.blocks.max(1) as f64;
            snapshot.preemptions = now.preemptions;
            snapshot.prefix_queries = now.cache_queries;
            snapshot.prefix_hits = now.cache_hits;
            snapshot.speculation = self.scheduler.config().speculation.map(|config| SpeculationCounts {
                num_speculative_tokens: config.num_speculative_tokens,
                drafts: now.drafts,
                draft_tokens: now.draft_tokens,
                accepted_tokens: now.accepted_tokens,
                accepted_per_position: now.accepted_per_position,
            });
        });
    }
}

/// Counts `value` in its bucket: the first whose bound in `bounds` is not below it, or the last.
fn count(buckets: &mut [u64], bounds: &[u64], value: u64) {
    if let Some(count) = buckets.get_mut(bounds.partition_point(|bound| *bound < value)) {
        *count += 1;
    }
}

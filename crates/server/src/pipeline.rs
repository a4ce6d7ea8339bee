//! A request while it runs: events of one or several submissions, in; pieces of choices, out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;

use serde_json::{Value, json};

use crate::choice::{Choice, Piece, TextOptions};
use crate::error::{ApiError, ApiResult};
use crate::ledger::{Outcome, Ticket};
use crate::metrics::Metrics;
use crate::record::{Record, Times};
use crate::serving::{Event, EventStream, Failure, PromptToken, Refusal, Serving, Submission, TokenScore};

/// What happened last.
#[derive(Debug)]
pub(crate) enum Update {
    /// Scores of the next tokens of prompt `part`.
    Prompt { part: usize, tokens: Vec<PromptToken> },
    /// A choice went on, or ended.
    Piece { index: usize, piece: Piece, token: Option<TokenScore> },
    /// The request failed; nothing follows.
    Failed(ApiError),
    /// Everything has ended.
    Done,
}

/// The submissions of one request.
pub(crate) struct Generation {
    parts: Vec<Part>,
    n: usize,
    next: usize,
    ticket: Option<Ticket>,
    outcome: Outcome,
    metrics: Arc<Metrics>,
    arrived: Instant,
}

struct Part {
    /// None once every choice has ended.
    events: Option<EventStream>,
    choices: Vec<Choice>,
    prompt_tokens: usize,
    cached_tokens: usize,
    submitted: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    last: Vec<Option<Instant>>,
}

impl Generation {
    /// Submits; all or nothing.
    ///
    /// # Errors
    /// The engine's refusal, counted.
    pub(crate) fn submit(
        serving: &dyn Serving,
        submissions: Vec<Submission>,
        options: &TextOptions,
        metrics: Arc<Metrics>,
        arrived: Instant,
    ) -> ApiResult<Self> {
        let mut n = 1;
        let mut parts = Vec::with_capacity(submissions.len());
        for submission in submissions {
            n = submission.n as usize;
            let choices = (0..n).map(|_| Choice::new(options)).collect::<ApiResult<Vec<_>>>()?;
            let prompt_tokens = submission.prompt.len();
            metrics.params_max_tokens.record(submission.max_tokens as f64);
            metrics.params_n.record(f64::from(submission.n));
            let events = if nothing_to_do(&submission) {
                Ok(no_events(&submission))
            } else {
                serving.submit(submission)
            };
            let events = events.inspect_err(|refusal| {
                metrics.rejected(match refusal {
                    Refusal::Field { .. } => "unsupported",
                    Refusal::Quota { .. } => "quota",
                    Refusal::Saturated { .. } => "saturated",
                    Refusal::Unavailable(_) => "unavailable",
                });
            })?;
            parts.push(Part {
                events: Some(events),
                last: vec![None; n],
                choices,
                prompt_tokens,
                cached_tokens: 0,
                submitted: Instant::now(),
                started: None,
                first: None,
            });
        }
        Ok(Self { parts, n, next: 0, ticket: None, outcome: Outcome::Stop, metrics, arrived })
    }

    /// Hands over the request's ticket: its outcome is decided here from now on.
    pub(crate) fn with_ticket(mut self, ticket: Ticket) -> Self {
        self.ticket = Some(ticket);
        self
    }

    fn record(&self) -> Option<&Record> {
        self.ticket.as_ref().and_then(Ticket::record)
    }

    /// Records how far the request came.
    fn note(&self) {
        let Some(record) = self.record() else { return };
        let since = |at: Instant| at.saturating_duration_since(self.arrived);
        let times = Times {
            started: self.parts.iter().filter_map(|part| part.started).min().map(since),
            first: self.parts.iter().filter_map(|part| part.first).min().map(since),
        };
        record.progress(self.usage(), times);
    }

    /// Records what a choice said.
    fn say(&self, index: usize, piece: &Piece) {
        let Some(record) = self.record().filter(|record| record.wants_outputs()) else { return };
        record.said(index, &piece.text);
        for call in &piece.calls {
            if let Some(name) = &call.name {
                record.said(index, &format!("<tool_call>{name} "));
            }
            record.said(index, &call.arguments);
        }
    }

    fn close(&mut self, outcome: Outcome) {
        self.note();
        if let Some(ticket) = &mut self.ticket {
            ticket.finish(outcome);
        }
    }

    /// The server itself failed on this request: it ends.
    pub(crate) fn panicked(&mut self) {
        self.parts.clear();
        self.metrics.panics.fetch_add(1, Ordering::Relaxed);
        self.close(Outcome::EngineError500);
    }

    /// Choices of all prompts together.
    pub(crate) fn choices(&self) -> usize {
        self.parts.len() * self.n
    }

    /// Prompt, completion and cached tokens so far.
    pub(crate) fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for part in &self.parts {
            usage.prompt += part.prompt_tokens;
            usage.cached += part.cached_tokens;
            usage.completion += part.choices.iter().map(Choice::tokens).sum::<usize>();
        }
        usage
    }

    /// Tokens of one choice, with its prompt's.
    pub(crate) fn usage_of(&self, index: usize) -> Usage {
        let part = self.parts.get(index / self.n);
        let choice = part.and_then(|part| part.choices.get(index % self.n));
        Usage {
            prompt: part.map_or(0, |part| part.prompt_tokens),
            cached: part.map_or(0, |part| part.cached_tokens),
            completion: choice.map_or(0, Choice::tokens),
        }
    }

    /// The next update; [`Update::Done`] and [`Update::Failed`] are last.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Update> {
        // Round robin, so that no prompt waits for the end of another.
        let count = self.parts.len();
        let mut open = false;
        for offset in 0..count {
            let index = (self.next + offset) % count;
            while let Some(events) = self.parts.get_mut(index).and_then(|part| part.events.as_mut()) {
                open = true;
                let Poll::Ready(event) = events.poll_next(cx) else { break };
                let event = event
                    .unwrap_or_else(|| Event::Failed(Failure::Engine("it ended without an answer".into())));
                if let Some(update) = self.event(index, event) {
                    self.next = index + 1;
                    return Poll::Ready(update);
                }
            }
        }
        if open && self.parts.iter().any(|part| part.events.is_some()) {
            return Poll::Pending;
        }
        self.close(self.outcome);
        Poll::Ready(Update::Done)
    }

    /// [`Self::poll_next`] as a future.
    pub(crate) async fn next(&mut self) -> Update {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn event(&mut self, index: usize, event: Event) -> Option<Update> {
        let (n, now) = (self.n, Instant::now());
        let metrics = Arc::clone(&self.metrics);
        let part = self.parts.get_mut(index)?;
        match event {
            Event::Started { cached_tokens } => {
                part.started = Some(now);
                part.cached_tokens = cached_tokens;
                metrics.queue.seconds(now - part.submitted);
                metrics.prompt_tokens.fetch_add(part.prompt_tokens as u64, Ordering::Relaxed);
                metrics.cached_tokens.fetch_add(cached_tokens as u64, Ordering::Relaxed);
                metrics.request_prompt_tokens.record(part.prompt_tokens as f64);
                metrics.prefill_computed.record(part.prompt_tokens.saturating_sub(cached_tokens) as f64);
                None
            }
            Event::Prompt(tokens) => Some(Update::Prompt { part: index, tokens }),
            Event::Token { choice, token, finish } => {
                let at = choice as usize;
                let state = part.choices.get_mut(at).filter(|state| !state.ended())?;
                metrics.generation_tokens.fetch_add(1, Ordering::Relaxed);
                let first = part.first.is_none();
                if first {
                    part.first = Some(now);
                    metrics.time_to_first_token.seconds(now - self.arrived);
                    metrics.prefill.seconds(now - part.started.unwrap_or(part.submitted));
                }
                if let Some(before) = part.last.get_mut(at).and_then(|last| last.replace(now)) {
                    metrics.inter_token.seconds(now - before);
                }
                let piece = state.push(token.id, finish);
                if piece.ended.is_some() && finish.is_none() {
                    // A stop string: the engine does not know yet.
                    part.events.iter().for_each(|events| events.stop(choice));
                }
                self.ended(index, at, &piece);
                self.say(index * n + at, &piece);
                Some(Update::Piece { index: index * n + at, piece, token: Some(token) })
            }
            Event::Finished { choice, finish } => {
                let at = choice as usize;
                let state = part.choices.get_mut(at).filter(|state| !state.ended())?;
                let piece = state.finish(finish);
                self.ended(index, at, &piece);
                self.say(index * n + at, &piece);
                Some(Update::Piece { index: index * n + at, piece, token: None })
            }
            Event::Failed(failure) => Some(Update::Failed(self.fail(failure))),
        }
    }

    /// Books the end of a choice, and of its part when it was the last.
    fn ended(&mut self, index: usize, choice: usize, piece: &Piece) {
        let (Some(part), Some(ended)) = (self.parts.get_mut(index), &piece.ended) else { return };
        let (metrics, now) = (&self.metrics, Instant::now());
        // A choice that was cut outweighs one that ended, and a call outweighs both.
        match (self.outcome, ended.outcome()) {
            (Outcome::ToolCalls, _) | (Outcome::Length, Outcome::Stop) => {}
            (_, outcome) => self.outcome = outcome,
        }
        metrics.choice_finished(ended.finish_reason);
        let tokens = part.choices.get(choice).map_or(0, Choice::tokens);
        metrics.request_generation_tokens.record(tokens as f64);
        metrics.e2e.seconds(now - self.arrived);
        metrics.inference.seconds(now - part.started.unwrap_or(part.submitted));
        if let Some(first) = part.first {
            metrics.decode.seconds(now - first);
            if tokens > 1 {
                metrics.per_output_token.record((now - first).as_secs_f64() / (tokens - 1) as f64);
            }
        }
        if part.choices.iter().all(Choice::ended) {
            let most = part.choices.iter().map(Choice::tokens).max().unwrap_or(0);
            metrics.most_generated.record(most as f64);
            part.events = None;
        }
    }

    fn fail(&mut self, failure: Failure) -> ApiError {
        self.parts.iter_mut().for_each(|part| part.events = None);
        self.metrics.choice_finished(match failure {
            Failure::Engine(_) | Failure::Numeric | Failure::Grammar(_) | Failure::NothingAllowed => "error",
            Failure::Deadline | Failure::Drained | Failure::SlowReader => "abort",
        });
        self.close(match failure {
            Failure::Engine(_) => Outcome::EngineError500,
            Failure::Numeric => Outcome::NumericError500,
            Failure::Grammar(_) | Failure::NothingAllowed => Outcome::Invalid4xx,
            Failure::Deadline => Outcome::Deadline,
            Failure::Drained => Outcome::Drained503,
            Failure::SlowReader => Outcome::ClientGone,
        });
        if failure == Failure::Numeric {
            self.metrics.numeric_failures.fetch_add(1, Ordering::Relaxed);
        }
        failure.into()
    }
}

/// A client that leaves closes nothing else.
impl Drop for Generation {
    fn drop(&mut self) {
        self.note();
    }
}

/// Token counts of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) completion: usize,
    pub(crate) cached: usize,
}

impl Usage {
    /// The `usage` object. `details`: with the cached tokens of the prompt.
    pub(crate) fn json(self, details: bool) -> Value {
        let mut usage = json!({
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
        });
        if let (true, Some(map)) = (details, usage.as_object_mut()) {
            map.insert("prompt_tokens_details".into(), json!({"cached_tokens": self.cached}));
        }
        usage
    }
}

/// `echo` with `max_tokens` 0 and no log probabilities needs no engine.
fn nothing_to_do(submission: &Submission) -> bool {
    submission.max_tokens == 0 && submission.prompt_logprobs.is_none()
}

/// The events of a submission that [`nothing_to_do`] holds for.
fn no_events(submission: &Submission) -> EventStream {
    let (sink, stream) = crate::serving::channel(submission.n as usize + 1, || {});
    submission.answer_without_running(&sink);
    stream
}

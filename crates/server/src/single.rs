//! [`Serving`] over an engine that runs one request at a time: a queue with limits, and one thread that empties it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_backend::Error as BackendError;
use longhaul_engine::{Engine, EngineError, Generate, SamplingParams, TokenEnd, TokenObserver, TokenRequest};

use crate::serving::{
    Event, EventSink, EventStream, Failure, Finish, ModelInfo, Refusal, Serving, Snapshot, Submission,
    TokenScore, channel,
};

/// Most alternatives that are reported with a token.
const MAX_LOGPROBS: u32 = 20;

/// When to try again: the mean request is short, and nobody knows better.
const RETRY: Duration = Duration::from_secs(1);

/// Bounds of the queue.
#[derive(Debug, Clone, Copy)]
pub struct QueueLimits {
    /// Requests that wait.
    pub requests: usize,
    /// Prompt tokens that wait.
    pub tokens: usize,
    /// Events of a request that wait for its reader.
    pub events: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { requests: 256, tokens: usize::MAX, events: 4096 }
    }
}

/// Where a request's sampling parameters come from that it leaves out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Defaults {
    /// The checkpoint's `generation_config.json`.
    #[default]
    Checkpoint,
    /// None: temperature 1 and no filter.
    Neutral,
}

/// An engine behind a queue, served in the order of priority, then of arrival.
pub struct SingleSequence {
    model: ModelInfo,
    limits: QueueLimits,
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    running: AtomicUsize,
    steps: AtomicU64,
    aborted: AtomicBool,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    tokens: usize,
    /// Why the engine takes nothing any more.
    dead: Option<String>,
    closed: bool,
}

struct Waiting {
    submission: Submission,
    sink: EventSink,
}

impl Shared {
    /// A queue is whole after every statement, so a panic elsewhere does not spoil it.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SingleSequence {
    /// Starts the thread that runs `engine`. `root` is the model as the user named it.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(
        engine: Engine,
        root: String,
        limits: QueueLimits,
        defaults: Defaults,
    ) -> std::io::Result<Self> {
        let mut model = describe(&engine, root);
        if defaults == Defaults::Neutral {
            model.sampling = SamplingParams { temperature: 1.0, ..SamplingParams::greedy() };
            model.max_new_tokens = None;
        }
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            arrived: Condvar::new(),
            running: AtomicUsize::new(0),
            steps: AtomicU64::new(0),
            aborted: AtomicBool::new(false),
        });
        let worker = Arc::clone(&shared);
        std::thread::Builder::new().name("longhaul-engine".into()).spawn(move || work(engine, &worker))?;
        Ok(Self { model, limits, shared })
    }
}

fn describe(engine: &Engine, root: String) -> ModelInfo {
    let tokenizer = engine.tokenizer().ok().cloned();
    let longest = tokenizer
        .as_ref()
        .map_or(1, |t| (0..t.vocab_size() as u32).map(|id| t.token_bytes(id).len()).max().unwrap_or(1));
    let block_size = engine.block_size().max(1);
    ModelInfo {
        root,
        template: engine.chat_template().cloned(),
        longest_token: longest,
        tokenizer,
        max_model_len: engine.max_model_len(),
        vocab_size: engine.spec().vocab_size,
        sampling: SamplingParams {
            // The API's default is 1, also for a checkpoint whose authors decode greedily.
            temperature: engine.generation_config().temperature.unwrap_or(1.0),
            ..engine.sampling_defaults()
        },
        max_new_tokens: engine.generation_config().max_new_tokens.map(|n| n as usize),
        max_logprobs: MAX_LOGPROBS,
        block_size,
        kv_blocks: engine.max_model_len().div_ceil(block_size),
    }
}

impl Serving for SingleSequence {
    fn model(&self) -> &ModelInfo {
        &self.model
    }

    fn submit(&self, submission: Submission) -> Result<EventStream, Refusal> {
        let mut queue = self.shared.queue();
        if let Some(reason) = &queue.dead {
            return Err(Refusal::Unavailable(reason.clone()));
        }
        if self.shared.aborted.load(Ordering::Acquire) {
            return Err(Refusal::Unavailable("the server is shutting down".into()));
        }
        queue.forget_cancelled();
        let saturated = |reason: String| Err(Refusal::Saturated { reason, retry_after: RETRY });
        if queue.waiting.len() >= self.limits.requests {
            return saturated(format!("{} requests are waiting", queue.waiting.len()));
        }
        let tokens = queue.tokens.saturating_add(submission.prompt.len());
        if tokens > self.limits.tokens && !queue.waiting.is_empty() {
            return saturated(format!("{} prompt tokens are waiting", queue.tokens));
        }
        let events = self.limits.events.saturating_mul(submission.n as usize);
        let waker = Arc::clone(&self.shared);
        let (sink, stream) = channel(events, move || waker.arrived.notify_all());
        queue.tokens = tokens;
        // Lower priorities first; equal ones in the order of arrival.
        let at = queue.waiting.partition_point(|w| w.submission.priority <= submission.priority);
        queue.waiting.insert(at, Waiting { submission, sink });
        drop(queue);
        self.shared.arrived.notify_all();
        Ok(stream)
    }

    fn snapshot(&self) -> Snapshot {
        let running = self.shared.running.load(Ordering::Acquire);
        Snapshot {
            running,
            waiting: self.shared.queue().waiting.len(),
            // The pool belongs to the one request that runs.
            kv_cache_usage: if running > 0 { 1.0 } else { 0.0 },
            steps: self.shared.steps.load(Ordering::Relaxed),
            ..Snapshot::default()
        }
    }

    fn health(&self) -> Result<(), String> {
        self.shared.queue().dead.clone().map_or(Ok(()), Err)
    }

    fn abort_all(&self) {
        self.shared.aborted.store(true, Ordering::Release);
        self.shared.arrived.notify_all();
    }
}

impl Drop for SingleSequence {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.abort_all();
    }
}

impl Queue {
    /// Requests whose clients left wait no longer.
    fn forget_cancelled(&mut self) {
        self.waiting.retain(|waiting| {
            let gone = waiting.sink.is_cancelled();
            if gone {
                self.tokens = self.tokens.saturating_sub(waiting.submission.prompt.len());
            }
            !gone
        });
    }

    fn pop(&mut self) -> Option<Waiting> {
        let next = self.waiting.pop_front()?;
        self.tokens = self.tokens.saturating_sub(next.submission.prompt.len());
        Some(next)
    }

    /// Ends those whose deadline passed in the queue; when the next one passes.
    fn expire(&mut self, now: Instant) -> Option<Instant> {
        let due = |waiting: &Waiting| waiting.submission.deadline.is_some_and(|deadline| deadline <= now);
        for waiting in self.waiting.iter().filter(|waiting| due(waiting)) {
            waiting.sink.send(Event::Failed(Failure::Deadline));
            self.tokens = self.tokens.saturating_sub(waiting.submission.prompt.len());
        }
        self.waiting.retain(|waiting| !due(waiting));
        self.waiting.iter().filter_map(|waiting| waiting.submission.deadline).min()
    }
}

/// Empties the queue until the server is dropped or the engine dies.
fn work(mut engine: Engine, shared: &Shared) {
    while let Some(next) = wait(shared) {
        shared.running.store(1, Ordering::Release);
        let fatal = run(&mut engine, next, shared);
        shared.running.store(0, Ordering::Release);
        if let Some(reason) = fatal {
            let mut queue = shared.queue();
            queue.dead = Some(reason.clone());
            while let Some(waiting) = queue.pop() {
                waiting.sink.send(Event::Failed(Failure::Engine(reason.clone())));
            }
            return;
        }
    }
}

/// The next request; none when there will be no more.
fn wait(shared: &Shared) -> Option<Waiting> {
    let mut queue = shared.queue();
    loop {
        queue.forget_cancelled();
        if shared.aborted.load(Ordering::Acquire) {
            while let Some(waiting) = queue.pop() {
                waiting.sink.send(Event::Failed(Failure::Drained));
            }
        }
        let deadline = queue.expire(Instant::now());
        if let Some(next) = queue.pop() {
            return Some(next);
        }
        if queue.closed {
            return None;
        }
        let patience =
            deadline.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        let waited = shared.arrived.wait_timeout(queue, patience);
        queue = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Runs one request, choice after choice; the reason when the engine is dead afterwards.
fn run(engine: &mut Engine, next: Waiting, shared: &Shared) -> Option<String> {
    let Waiting { submission, sink } = next;
    sink.send(Event::Started { cached_tokens: 0 });
    for choice in 0..submission.n {
        let mut params = submission.sampling.params;
        params.seed = params.seed.wrapping_add(choice.into());
        let request = TokenRequest {
            prompt: &submission.prompt,
            sampling: params,
            max_tokens: submission.max_tokens,
            min_tokens: submission.sampling.min_tokens,
            ignore_eos: submission.sampling.ignore_eos,
            stop_token_ids: &submission.sampling.stop_token_ids,
            bias: &submission.sampling.logit_bias,
            allowed: &submission.sampling.allowed_token_ids,
            top_logprobs: submission.logprobs.unwrap_or(0) as usize,
            // The choices share the prompt: its scores are told once.
            prompt_logprobs: submission.prompt_logprobs.filter(|_| choice == 0).map(|n| n as usize),
        };
        let mut observer =
            Observer { sink: &sink, shared, choice, deadline: submission.deadline, failure: None };
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| engine.tokens(&request, &mut observer)));
        let failure = observer.failure.take();
        match result {
            Ok(Ok(TokenEnd::Cancelled)) => match failure {
                Some(failure) => {
                    sink.send(Event::Failed(failure));
                    return None;
                }
                None if sink.is_cancelled() => return None,
                // A stop string ended this choice alone.
                None => {}
            },
            Ok(Ok(_)) if submission.max_tokens == 0 => {
                sink.send(Event::Finished { choice, finish: Finish::Length });
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                let fatal = is_fatal(&error).then(|| error.to_string());
                sink.send(Event::Failed(failure_of(&error)));
                return fatal;
            }
            Err(_) => {
                let reason = "the engine panicked".to_owned();
                sink.send(Event::Failed(Failure::Engine(reason.clone())));
                return Some(reason);
            }
        }
    }
    None
}

/// After these nothing works any more.
fn is_fatal(error: &EngineError) -> bool {
    match error {
        EngineError::Rank { .. } => true,
        EngineError::Backend(error) => {
            matches!(error, BackendError::DeviceLost(_) | BackendError::Collective(_))
        }
        _ => false,
    }
}

fn failure_of(error: &EngineError) -> Failure {
    match error {
        EngineError::Backend(BackendError::NotFinite { .. }) => Failure::Numeric,
        other => Failure::Engine(other.to_string()),
    }
}

struct Observer<'a> {
    sink: &'a EventSink,
    shared: &'a Shared,
    choice: u32,
    deadline: Option<Instant>,
    failure: Option<Failure>,
}

impl TokenObserver for Observer<'_> {
    fn go_on(&mut self) -> bool {
        self.shared.steps.fetch_add(1, Ordering::Relaxed);
        if self.shared.aborted.load(Ordering::Acquire) {
            self.failure = Some(Failure::Drained);
        } else if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.failure = Some(Failure::Deadline);
        }
        self.failure.is_none() && !self.sink.is_cancelled() && !self.sink.is_stopped(self.choice)
    }

    fn prompt(&mut self, scores: Vec<Option<longhaul_engine::TokenScore>>) {
        self.sink.send(Event::Prompt(scores.into_iter().map(|score| score.map(converted)).collect()));
    }

    fn token(&mut self, token: longhaul_engine::TokenScore, end: Option<TokenEnd>) {
        let finish = match end {
            Some(TokenEnd::EndOfSequence) => Some(Finish::EndOfSequence),
            Some(TokenEnd::StopToken(id)) => Some(Finish::StopToken(id)),
            Some(TokenEnd::Length) => Some(Finish::Length),
            Some(TokenEnd::Cancelled) | None => None,
        };
        self.sink.send(Event::Token { choice: self.choice, token: converted(token), finish });
    }
}

fn converted(score: longhaul_engine::TokenScore) -> TokenScore {
    TokenScore { id: score.id, logprob: score.logprob, top: score.top }
}

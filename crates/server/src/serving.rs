//! The seam between HTTP and whatever runs the model: token ids in, token events out.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use longhaul_engine::SamplingParams;
use longhaul_scheduler::NgramConfig;
use longhaul_text::{ChatTemplate, Tokenizer};
use tokio::sync::mpsc;

/// Runs requests. Text is not its business.
pub trait Serving: Send + Sync + 'static {
    /// The model being served.
    fn model(&self) -> &ModelInfo;

    /// Takes a request into the queue, or refuses it at once. Never blocks.
    ///
    /// # Errors
    /// [`Refusal`]: what the engine cannot do, or has no room for.
    fn submit(&self, submission: Submission) -> Result<EventStream, Refusal>;

    /// Gauges and counters of this moment; cheap enough to be asked for every 50 ms.
    fn snapshot(&self) -> Snapshot;

    /// Whether the engine still makes progress; an error is the reason why not.
    ///
    /// # Errors
    /// The reason, for `/health`.
    fn health(&self) -> Result<(), String>;

    /// Cancels everything that waits or runs: the end of a drain that took too long.
    fn abort_all(&self);
}

/// What a server must know of a model.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// The model as it was asked for: a name, a hub id, a directory's name.
    pub root: String,
    /// Tokenizer, when the checkpoint has one.
    pub tokenizer: Option<Tokenizer>,
    /// Chat template, when the checkpoint has one.
    pub template: Option<ChatTemplate>,
    /// Tokens of prompt and output that fit.
    pub max_model_len: usize,
    /// Bytes of the longest token.
    pub longest_token: usize,
    /// Rows of the embedding: ids from here on do not exist.
    pub vocab_size: usize,
    /// Ids that end a text.
    pub end_tokens: Vec<u32>,
    /// Defaults of requests that leave a parameter out.
    pub sampling: SamplingParams,
    /// Default of `max_tokens` for chats, from the checkpoint.
    pub max_new_tokens: Option<usize>,
    /// Most alternatives whose log probabilities can be reported for a token.
    pub max_logprobs: u32,
    /// Labels of `vllm:cache_config_info`.
    pub block_size: usize,
    /// KV blocks of the pool.
    pub kv_blocks: usize,
}

/// Whose request it is: the unit of fairness, quotas and prefix-cache sharing. Derived from the API key; never the key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Namespace(pub Option<Arc<str>>);

/// How tokens are drawn, beyond [`SamplingParams`].
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Temperature, filters, penalties, seed.
    pub params: SamplingParams,
    /// Added to the logits of these ids; distinct, finite.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only ids that may be drawn, sorted; empty = all.
    pub allowed_token_ids: Vec<u32>,
    /// Sequences of ids that are not said; none is empty.
    pub bad_words: Vec<Vec<u32>>,
    /// Ids that end a choice, besides the end-of-sequence ids.
    pub stop_token_ids: Vec<u32>,
    /// No end before this many tokens; under a grammar, unless the text can only end.
    pub min_tokens: usize,
    /// Go on after an end-of-sequence token; under a grammar, as long as it lets the text go on.
    pub ignore_eos: bool,
}

/// What the text of a choice has to look like: a compiled grammar.
pub trait Grammar: fmt::Debug + Send + Sync {
    /// A matcher at the beginning of the text, one for each choice.
    fn matcher(&self) -> Box<dyn Matcher>;
}

/// Follows one choice through its grammar. Called between the steps of the engine: microseconds, not milliseconds.
pub trait Matcher: Send {
    /// The ids that may come next: bit `id % 32` of word `id / 32`. An end-of-sequence id is among them exactly where the text
    /// may end.
    ///
    /// # Errors
    /// A sentence for the client: the grammar needs more than its budget, or nothing may follow.
    fn allowed(&mut self) -> Result<&[u32], String>;

    /// Takes the id that was drawn.
    ///
    /// # Errors
    /// A sentence for the client: the id may not follow.
    fn accept(&mut self, id: u32) -> Result<(), String>;
}

/// A request as the engine takes it.
#[derive(Debug, Clone)]
pub struct Submission {
    /// For logs; unique per submission.
    pub id: String,
    /// Prompt, at least one token, all ids below [`ModelInfo::vocab_size`].
    pub prompt: Arc<[u32]>,
    /// How tokens are drawn. Choice `i` of `n` draws with seed `seed + i`.
    pub sampling: Sampling,
    /// What the text of each choice has to look like.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// Most tokens a choice; prompt and this fit `max_model_len`. 0: nothing but the prompt's log probabilities.
    pub max_tokens: usize,
    /// Independent continuations of the prompt, 1 to 64.
    pub n: u32,
    /// Report the drawn token's log probability and this many alternatives with each token.
    pub logprobs: Option<u32>,
    /// Report the log probability of each prompt token and this many alternatives.
    pub prompt_logprobs: Option<u32>,
    /// The request fails when it is not done by then.
    pub deadline: Option<Instant>,
    /// Lower is served earlier.
    pub priority: i32,
    /// Cached prefixes are shared within the same salt only.
    pub cache_salt: Option<String>,
    /// Whose request it is.
    pub namespace: Namespace,
}

impl Submission {
    /// The events of a request that draws nothing, and whose prompt has no log probability that must be computed: it has
    /// one token, or they are not wanted.
    pub(crate) fn answer_without_running(&self, sink: &EventSink) {
        sink.send(Event::Started { cached_tokens: 0 });
        if self.prompt_logprobs.is_some() {
            sink.send(Event::Prompt(self.prompt.iter().map(|_| None).collect()));
        }
        for choice in 0..self.n {
            sink.send(Event::Finished { choice, finish: Finish::Length });
        }
    }
}

/// The log probability of a token, and of the most likely ones at its place.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScore {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability under the raw logits.
    pub logprob: f32,
    /// The most likely ids with theirs, best first.
    pub top: Vec<(u32, f32)>,
}

/// A token of the prompt: the first has no score.
pub type PromptToken = Option<TokenScore>;

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token of the model, which is the last token.
    EndOfSequence,
    /// One of the request's `stop_token_ids`, which is the last token.
    StopToken(u32),
    /// `max_tokens`, or the end of the context.
    Length,
}

/// Why a request that had been accepted failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The engine or its device failed.
    #[error("the engine failed: {0}")]
    Engine(String),
    /// The model computed something that is not a number for this request.
    #[error("the model's output is not finite; the request was ended")]
    Numeric,
    /// The grammar of the request leads nowhere.
    #[error("structured output: {0}")]
    Grammar(String),
    /// What the request allows and what it forbids leave no token to draw.
    #[error(
        "allowed_token_ids: nothing of it may be drawn here, by min_tokens or the other rules of the request"
    )]
    NothingAllowed,
    /// The deadline passed.
    #[error("the request took longer than its deadline")]
    Deadline,
    /// The server is shutting down and its drain time is over.
    #[error("the server is shutting down")]
    Drained,
    /// The reader was slower than the engine for too long.
    #[error("the response was read too slowly")]
    SlowReader,
}

/// What happens to a request, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It left the queue; this many tokens of its prompt were found in the cache.
    Started {
        /// Prompt tokens that need not be computed.
        cached_tokens: usize,
    },
    /// Scores of the next prompt tokens.
    Prompt(Vec<PromptToken>),
    /// A token of a choice; with `finish`, its last.
    Token {
        /// Which of the `n`.
        choice: u32,
        /// The token; `top` is empty unless it was asked for.
        token: TokenScore,
        /// Set on the last token.
        finish: Option<Finish>,
    },
    /// A choice ended without a further token: `max_tokens` was 0, or the choice was stopped.
    Finished {
        /// Which of the `n`.
        choice: u32,
        /// Why.
        finish: Finish,
    },
    /// The request failed; nothing follows.
    Failed(Failure),
}

/// Why a request was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A value of a field that this engine cannot serve.
    #[error("{field}: {message}")]
    Field {
        /// The request's field.
        field: &'static str,
        /// What is wrong, and the remedy.
        message: String,
    },
    /// The caller's own quota is used up.
    #[error("{reason}")]
    Quota {
        /// Which quota.
        reason: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// No room in the queue.
    #[error("{reason}")]
    Saturated {
        /// Which limit.
        reason: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// The engine is dead or shutting down.
    #[error("{0}")]
    Unavailable(String),
}

/// Upper bounds of the buckets of rows a step, as vLLM's `iteration_tokens_total` has them.
pub const STEP_ROWS: [u64; 12] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];

/// Upper bounds of the buckets of preemptions a request.
pub const PREEMPTIONS: [u64; 6] = [0, 1, 2, 5, 10, 20];

/// Gauges and counters of the engine.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Snapshot {
    /// Requests being computed.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Prompt tokens of these.
    pub waiting_tokens: usize,
    /// Fraction of the KV blocks in use.
    pub kv_cache_usage: f64,
    /// Requests put back into the queue for want of blocks, ever.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache, ever.
    pub prefix_queries: u64,
    /// Of those, found.
    pub prefix_hits: u64,
    /// Steps computed, ever.
    pub steps: u64,
    /// Of these, by their rows: up to [`STEP_ROWS`], and more.
    pub step_rows: [u64; STEP_ROWS.len() + 1],
    /// Rows of all steps.
    pub step_rows_sum: u64,
    /// Requests that were started and have ended, by how often they gave up blocks: up to [`PREEMPTIONS`], and more.
    pub request_preemptions: [u64; PREEMPTIONS.len() + 1],
    /// How often these did, together.
    pub request_preemptions_sum: u64,
    /// Speculative decoding, where it is on.
    pub speculation: Option<SpeculationCounts>,
}

/// What became of tokens that were guessed ahead of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpeculationCounts {
    /// Most tokens of a draft.
    pub num_speculative_tokens: usize,
    /// Drafts, ever.
    pub drafts: u64,
    /// Tokens of these.
    pub draft_tokens: u64,
    /// Of those, accepted.
    pub accepted_tokens: u64,
    /// Of those, at each place of a draft.
    pub accepted_per_position: [u64; NgramConfig::MAX_TOKENS],
}

#[derive(Default)]
struct Shared {
    cancelled: AtomicBool,
    overflowed: AtomicBool,
    /// Bit i: choice i needs no further tokens.
    stopped: AtomicU64,
}

/// The engine's end of a request.
pub struct EventSink {
    events: mpsc::Sender<Event>,
    shared: Arc<Shared>,
}

/// The server's end of a request. Dropping it cancels the request.
pub struct EventStream {
    events: mpsc::Receiver<Event>,
    shared: Arc<Shared>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// Both ends of a request. At most `capacity` events wait for the server; `wake` is called when the server cancels or
/// stops something, so that an idle engine looks at its sinks.
pub fn channel(capacity: usize, wake: impl Fn() + Send + Sync + 'static) -> (EventSink, EventStream) {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    let shared = Arc::new(Shared::default());
    let sink = EventSink { events: sender, shared: Arc::clone(&shared) };
    (sink, EventStream { events: receiver, shared, wake: Box::new(wake) })
}

impl EventSink {
    /// Hands an event over without waiting. False: nobody listens any more, or the reader is too far behind; the request
    /// is to be cancelled.
    pub fn send(&self, event: Event) -> bool {
        match self.events.try_send(event) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.shared.overflowed.store(true, Ordering::Release);
                self.shared.cancelled.store(true, Ordering::Release);
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    /// Whether the request is to end now.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Acquire) || self.events.is_closed()
    }

    /// Whether choice `choice` needs no further tokens.
    pub fn is_stopped(&self, choice: u32) -> bool {
        self.shared.stopped.load(Ordering::Acquire) >> (choice % 64) & 1 == 1
    }
}

impl EventStream {
    /// The next event; none after the last. A stream whose reader was too slow ends with [`Failure::SlowReader`], one
    /// whose engine vanished with [`Failure::Engine`].
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        match self.events.poll_recv(cx) {
            Poll::Ready(None) if self.shared.overflowed.swap(false, Ordering::AcqRel) => {
                Poll::Ready(Some(Event::Failed(Failure::SlowReader)))
            }
            other => other,
        }
    }

    /// Choice `choice` needs no further tokens: a stop string ended it.
    pub fn stop(&self, choice: u32) {
        self.shared.stopped.fetch_or(1 << (choice % 64), Ordering::AcqRel);
        (self.wake)();
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Release);
        self.events.close();
        (self.wake)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;

    fn token(id: u32) -> Event {
        Event::Token { choice: 0, token: TokenScore { id, logprob: 0.0, top: vec![] }, finish: None }
    }

    #[tokio::test]
    async fn a_reader_too_far_behind_is_cut_with_a_reason() {
        let (sink, mut stream) = channel(2, || {});
        assert!(sink.send(token(1)) && sink.send(token(2)));
        assert!(!sink.send(token(3)));
        assert!(sink.is_cancelled());
        drop(sink);
        let mut events = Vec::new();
        while let Some(event) = poll_fn(|cx| stream.poll_next(cx)).await {
            events.push(event);
        }
        assert_eq!(events, [token(1), token(2), Event::Failed(Failure::SlowReader)]);
    }

    #[test]
    fn dropping_the_stream_cancels_and_wakes() {
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let (sink, stream) = channel(2, move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        assert!(!sink.is_stopped(3) && !sink.is_cancelled());
        stream.stop(3);
        assert!(sink.is_stopped(3) && !sink.is_stopped(2) && !sink.is_cancelled());
        drop(stream);
        assert!(sink.is_cancelled() && !sink.send(token(1)));
        assert_eq!(woken.load(Ordering::SeqCst), 2);
    }
}

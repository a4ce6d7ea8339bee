use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::plan::{StepId, StepResults};
use crate::prefix::CacheScope;

/// Who is billed for a request: an API key. The caller numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct KeyId(pub u64);

/// A request. The caller takes ids from a counter and never uses one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// One sequence of tokens: a choice of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// The request.
    pub request: RequestId,
    /// Index of the choice, `0..n`.
    pub choice: u32,
}

/// What the scheduler has to know of a request. How tokens are drawn is the caller's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Names the request in plans and updates.
    pub id: RequestId,
    /// Who is billed.
    pub key: KeyId,
    /// Token ids of the prompt.
    pub prompt: Arc<[u32]>,
    /// Most tokens of each choice.
    pub max_tokens: usize,
    /// Choices, each a sequence of its own after the prompt (`n`).
    pub choices: usize,
    /// Token ids that end a choice.
    pub stop_tokens: Vec<u32>,
    /// `0..priority_levels`, the highest first.
    pub priority: u8,
    /// When it is too late, on the clock of [`crate::Scheduler::step`].
    pub deadline: Option<Duration>,
    /// Who may reuse its KV blocks.
    pub cache: CacheScope,
    /// Narrows the reuse to requests of the same salt.
    pub cache_salt: Vec<u8>,
    /// Host memory it occupies while it waits, for [`crate::QueueLimits::bytes`].
    pub bytes: usize,
    /// Whether a step may be planned before the host has seen the token that it continues. False for requests whose
    /// sampling depends on the tokens so far (penalties, grammars).
    pub run_ahead: bool,
    /// Whether the logits of all prompt rows are wanted, not the last one's alone (`prompt_logprobs`). The first choice then computes
    /// them all: it reads nothing from the prefix cache before its first token. They come in order, in steps of at most
    /// [`crate::Config::max_scored_rows`], marked by [`crate::PlannedSequence::scored`]. A preemption before the first token
    /// makes them begin again.
    pub scored: bool,
    /// Whether tokens may be drafted for it ([`crate::Config::speculation`]); then its rows wait for the host, as if `run_ahead` were
    /// false. What is drawn from a row must depend on nothing but its logits and its [`crate::PlannedSample::position`]: for requests
    /// with penalties or grammars this is false, unless the caller counts the drafted tokens before a row among those so far.
    /// Several tokens of a choice may be told at once: what follows one that ends it by its text is the caller's to drop.
    pub speculate: bool,
}

impl Request {
    /// A request of one choice with the usual settings.
    pub fn new(id: RequestId, key: KeyId, prompt: impl Into<Arc<[u32]>>, max_tokens: usize) -> Self {
        let prompt = prompt.into();
        let bytes = prompt.len() * size_of::<u32>();
        Self {
            id,
            key,
            prompt,
            max_tokens,
            choices: 1,
            stop_tokens: Vec::new(),
            priority: 0,
            deadline: None,
            cache: CacheScope::Key,
            cache_salt: Vec::new(),
            bytes,
            run_ahead: true,
            scored: false,
            speculate: false,
        }
    }
}

/// Why a choice ended as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FinishReason {
    /// A stop token or stop string.
    Stop,
    /// `max_tokens`.
    Length,
    /// The model has called a tool.
    ToolCalls,
}

/// The one end of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// All choices are complete; of several, the reason of the first that did not stop by itself.
    Complete(FinishReason),
    /// The client has left, or does not read.
    ClientGone,
    /// It would have been, or became, too late.
    Deadline,
    /// Its key has used up its share of the queue (429).
    ShedKey,
    /// The queue is full, or it waited too long in it (503).
    ShedEngine,
    /// The server is stopping (503).
    Drained,
    /// The step that it was in has failed, or the engine is lost (500).
    EngineError,
    /// Its logits were not finite (500).
    NumericError,
    /// It can never run (4xx).
    Invalid,
}

impl Outcome {
    /// All outcomes, in the order of their labels in reports.
    pub const ALL: [Outcome; 11] = [
        Outcome::Complete(FinishReason::Stop),
        Outcome::Complete(FinishReason::Length),
        Outcome::Complete(FinishReason::ToolCalls),
        Outcome::ClientGone,
        Outcome::Deadline,
        Outcome::ShedKey,
        Outcome::ShedEngine,
        Outcome::Drained,
        Outcome::EngineError,
        Outcome::NumericError,
        Outcome::Invalid,
    ];

    /// The label of the counters.
    pub fn label(self) -> &'static str {
        match self {
            Outcome::Complete(FinishReason::Stop) => "stop",
            Outcome::Complete(FinishReason::Length) => "length",
            Outcome::Complete(FinishReason::ToolCalls) => "tool_calls",
            Outcome::ClientGone => "client_gone",
            Outcome::Deadline => "deadline",
            Outcome::ShedKey => "shed_429",
            Outcome::ShedEngine => "shed_503",
            Outcome::Drained => "drained_503",
            Outcome::EngineError => "engine_error_500",
            Outcome::NumericError => "numeric_error_500",
            Outcome::Invalid => "invalid_4xx",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// What of a queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueBound {
    /// Requests.
    Requests,
    /// Prompt tokens.
    Tokens,
    /// Bytes.
    Bytes,
}

impl fmt::Display for QueueBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            QueueBound::Requests => "requests",
            QueueBound::Tokens => "prompt tokens",
            QueueBound::Bytes => "bytes",
        })
    }
}

/// Why a request was not taken at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A parameter that no request may have.
    #[error("{field} {message}")]
    Parameter {
        /// The field of [`Request`].
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// Longer than the model's context.
    #[error(
        "{prompt} prompt tokens and max_tokens {max_tokens} exceed the context of {max_model_len} tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Output tokens asked for.
        max_tokens: usize,
        /// Tokens of the context.
        max_model_len: usize,
    },
    /// It would not fit if it were alone.
    #[error("needs {needed} KV blocks of {block_size} tokens, the pool has {blocks}")]
    NeverFits {
        /// Blocks of prompt and output.
        needed: usize,
        /// Tokens of a block.
        block_size: usize,
        /// Blocks of the pool.
        blocks: usize,
    },
    /// A request of this id is there.
    #[error("request {0} is running already")]
    DuplicateId(u64),
    /// The deadline is over.
    #[error("the deadline has passed")]
    Late,
    /// The key's share of the queue is full.
    #[error("the key has {limit} {bound} in the queue, its most")]
    KeyQueueFull {
        /// What is full.
        bound: QueueBound,
        /// Its limit.
        limit: usize,
    },
    /// The queue is full.
    #[error("the queue is full: at most {limit} {bound}")]
    QueueFull {
        /// What is full.
        bound: QueueBound,
        /// Its limit.
        limit: usize,
    },
    /// The server is stopping.
    #[error("the server is stopping")]
    Draining,
    /// The engine is lost.
    #[error("the engine has failed")]
    EngineLost,
}

impl Refusal {
    /// How a request that was refused counts.
    pub fn outcome(&self) -> Outcome {
        match self {
            Refusal::Parameter { .. }
            | Refusal::TooLong { .. }
            | Refusal::NeverFits { .. }
            | Refusal::DuplicateId(_) => Outcome::Invalid,
            Refusal::Late => Outcome::Deadline,
            Refusal::KeyQueueFull { .. } => Outcome::ShedKey,
            Refusal::QueueFull { .. } | Refusal::EngineLost => Outcome::ShedEngine,
            Refusal::Draining => Outcome::Drained,
        }
    }
}

/// What a request has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache when the request was started.
    pub cached_tokens: usize,
    /// Tokens of all choices, without stop tokens.
    pub output_tokens: usize,
    /// Times that a choice gave up its blocks for others.
    pub preemptions: u32,
}

/// What happens to a scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A request arrives.
    Submit(Request),
    /// The client has left, or does not read. Without effect on a request that has ended.
    Cancel(RequestId),
    /// A choice is complete for a reason that only its text shows: a stop string, a tool call. Without effect on one that
    /// has ended.
    Finish {
        /// The choice.
        sequence: SequenceId,
        /// The reason.
        reason: FinishReason,
    },
    /// A step is done. Steps are done in the order of their plans.
    Results(StepResults),
    /// A step failed as a whole, but its zeroing and copies were done and the device goes on: the requests in it end.
    StepFailed(StepId),
    /// No more requests are taken; those that are there go on.
    Drain,
    /// Whatever is still there ends (after the grace period of a drain).
    Stop,
    /// The device or a rank is lost: everything ends, nothing more is taken.
    EngineLost,
}

/// What a scheduler tells its caller, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// A request has its first blocks. Once for each that is not refused and does not end before.
    Started {
        /// The request.
        id: RequestId,
        /// Tokens of its prompt that were found in the prefix cache.
        cached_tokens: usize,
    },
    /// The next token of a choice. Each is told once, whatever happens to the sequence.
    Token {
        /// The choice.
        sequence: SequenceId,
        /// The token.
        token: u32,
    },
    /// A choice is complete.
    ChoiceFinished {
        /// The choice.
        sequence: SequenceId,
        /// Why.
        reason: FinishReason,
        /// The stop token that ended it; it is not among its tokens.
        stop_token: Option<u32>,
    },
    /// A request has ended. Exactly one for each [`Event::Submit`], and nothing follows it.
    Finished {
        /// The request.
        id: RequestId,
        /// Its end.
        outcome: Outcome,
        /// Why it was refused, if it was.
        refusal: Option<Refusal>,
        /// What it has used.
        usage: Usage,
    },
}

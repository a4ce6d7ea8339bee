//! [`Serving`] by continuous batching: a [`Scheduler`] plans steps over the KV blocks, a thread runs them on the device.
//!
//! Two threads: the *step loop* owns the scheduler and all requests, the *device's thread* the engine. They talk through
//! channels; with two steps in flight the loop plans a step and draws up its masks while the device runs the one before.

mod admission;
mod device;
mod request;
mod status;
mod step_loop;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use longhaul_engine::{Engine, Generate, SamplingParams};
use longhaul_scheduler::{CacheIdentity, Config, ConfigError, KeyId, NgramConfig, RequestId, Scheduler};

pub use admission::QueueLimits;
use admission::{Admission, Place};
use device::Done;
pub use device::StepDevice;
use request::Rules;
use status::Status;
use step_loop::StepLoop;

use crate::lifecycle::EngineLost;
use crate::serving::{self, EventSink, EventStream, ModelInfo, Refusal, Serving, Snapshot, Submission};

/// Most alternatives that are reported with a token.
const MAX_LOGPROBS: u32 = 20;

/// Priorities of the scheduler; requests say 0 for the middle.
const PRIORITY_LEVELS: u8 = 8;

/// Where a request's sampling parameters come from that it leaves out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Defaults {
    /// The checkpoint's `generation_config.json`.
    #[default]
    Checkpoint,
    /// None: temperature 1 and no filter.
    Neutral,
}

/// How requests are batched. `None` = what suits the device.
#[derive(Debug, Clone, Default)]
pub struct BatchOptions {
    /// Bounds of the queue.
    pub queue: QueueLimits,
    /// Most sequences that run at a time.
    pub max_num_seqs: Option<usize>,
    /// Most rows of a step.
    pub max_num_batched_tokens: Option<usize>,
    /// Most prefill rows of a step in which others decode.
    pub max_mixed_prefill_rows: Option<usize>,
    /// Whether the next step is planned while one runs; by default on devices that leave the CPU alone.
    pub async_scheduling: Option<bool>,
    /// How tokens are guessed ahead of the model, for requests whose draws do not depend on earlier tokens. What is drawn is the
    /// same.
    pub speculation: Option<NgramConfig>,
    /// First come, first served: a request's `priority` must be 0.
    pub no_priorities: bool,
    /// Do not keep KV blocks for prompts that begin alike.
    pub no_prefix_cache: bool,
    /// Longest time of a step before the engine counts as stuck; by default what earlier steps suggest.
    pub step_timeout: Option<Duration>,
    /// Events of a request that wait for its reader.
    pub queued_events: usize,
}

/// What can go wrong when batching starts.
#[derive(Debug, thiserror::Error)]
pub enum BatchStartError {
    /// Sizes that make no scheduler.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system has no thread left, or no randomness.
    #[error("batching cannot start: {0}")]
    System(String),
}

/// A model whose requests run together.
pub struct Batched {
    model: ModelInfo,
    queued_events: usize,
    no_priorities: bool,
    next_id: AtomicU64,
    admission: Arc<Admission>,
    status: Arc<Status>,
    inbox: Sender<Message>,
}

/// What the step loop hears.
enum Message {
    Submit(Box<New>),
    /// The client of a request has left, or has stopped a choice.
    Look(RequestId),
    Done(Done),
    Abort,
    Close,
}

/// A request on its way to the step loop.
struct New {
    id: RequestId,
    key: KeyId,
    priority: u8,
    submission: Submission,
    sink: EventSink,
    place: Place,
}

/// What a device must say of itself to be batched.
pub struct Batchable {
    /// Runs the steps.
    pub device: Box<dyn StepDevice>,
    /// The model.
    pub model: ModelInfo,
    /// Ids that the tokenizer does not have.
    pub padding_ids: Vec<u32>,
    /// What its cached KV depends on, in words.
    pub positions: String,
    /// Most rows, sequences, and logit rows of a step.
    pub limits: longhaul_engine::BatchLimits,
    /// Prompt tokens of a step that the device is best with.
    pub prefill_rows: usize,
    /// Whether steps run on the CPU.
    pub is_on_host: bool,
}

impl Batchable {
    /// `root` is the model as the user named it.
    pub fn engine(engine: Engine, root: String, defaults: Defaults) -> Self {
        let mut model = describe(&engine, root);
        if defaults == Defaults::Neutral {
            model.sampling = SamplingParams { temperature: 1.0, ..SamplingParams::greedy() };
            model.max_new_tokens = None;
        }
        Self {
            model,
            padding_ids: engine.padding_ids(),
            positions: format!("{:?}", engine.positions()),
            limits: engine.batch_limits(),
            prefill_rows: engine.prefill_rows(),
            is_on_host: engine.is_on_host(),
            device: Box::new(engine),
        }
    }

    /// The scheduler's sizes.
    fn config(&self, options: &BatchOptions) -> Result<Config, BatchStartError> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|e| BatchStartError::System(e.to_string()))?;
        let model = &self.model;
        let limits = &self.limits;
        let defaults = Config::new(model.kv_blocks, model.block_size, model.max_model_len);
        let max_running = options.max_num_seqs.unwrap_or(defaults.max_running).min(limits.sequences);
        let max_running = max_running.min(limits.logit_rows);
        let rows = options.max_num_batched_tokens.unwrap_or(self.prefill_rows.max(2 * max_running));
        Ok(Config {
            max_running,
            max_step_rows: rows.min(limits.rows),
            max_mixed_prefill_rows: options.max_mixed_prefill_rows.unwrap_or(defaults.max_mixed_prefill_rows),
            max_logit_rows: limits.logit_rows,
            max_in_flight: if options.async_scheduling.unwrap_or(!self.is_on_host) { 2 } else { 1 },
            priority_levels: PRIORITY_LEVELS,
            max_choices: 64,
            speculation: options.speculation,
            prefix_cache: !options.no_prefix_cache,
            cache_identity: CacheIdentity {
                secret,
                model: model.root.clone(),
                positions: self.positions.clone(),
            },
            // What waits is bounded where it can be refused.
            queue: longhaul_scheduler::QueueLimits::NONE,
            ..defaults
        })
    }
}

impl Batched {
    /// Starts the threads. `lost` hears why nothing is served any more, if it comes to that.
    ///
    /// # Errors
    /// [`BatchStartError`].
    pub fn start(
        batchable: Batchable,
        options: &BatchOptions,
        lost: impl Fn(EngineLost) + Send + 'static,
    ) -> Result<Self, BatchStartError> {
        let scheduler = Scheduler::new(batchable.config(options)?)?;
        let Batchable { device, model, padding_ids, .. } = batchable;
        let status = Arc::new(Status::new(options.step_timeout));
        let (inbox, heard) = channel();
        let (orders, ordered) = channel();
        let thread = |name: &str| thread::Builder::new().name(name.into());
        let system = |e: std::io::Error| BatchStartError::System(e.to_string());
        let (results, progress) = (inbox.clone(), Arc::clone(&status));
        thread("longhaul-device")
            .spawn(move || device::run(device, &ordered, &results, &progress))
            .map_err(system)?;
        let rules = Rules::new(&model, padding_ids);
        let epoch = Instant::now();
        let step_loop =
            StepLoop::new(scheduler, heard, orders, Arc::clone(&status), rules, epoch, Box::new(lost));
        thread("longhaul-steps").spawn(move || step_loop.run()).map_err(system)?;
        Ok(Self {
            model,
            queued_events: options.queued_events.max(16),
            no_priorities: options.no_priorities,
            next_id: AtomicU64::new(0),
            admission: Arc::new(Admission::new(options.queue)),
            status,
            inbox,
        })
    }

    fn say(&self, message: Message) {
        // A step loop that has ended shows in the events that end with it.
        let _ = self.inbox.send(message);
    }
}

impl Serving for Batched {
    fn model(&self) -> &ModelInfo {
        &self.model
    }

    fn submit(&self, submission: Submission) -> Result<EventStream, Refusal> {
        self.status.accepts().map_err(Refusal::Unavailable)?;
        if self.no_priorities && submission.priority != 0 {
            return Err(Refusal::Field {
                field: "priority",
                message: "requests are served as they come (--scheduling-policy fcfs); leave it out".into(),
            });
        }
        let (place, key) = self.admission.admit(&submission.namespace, submission.prompt.len())?;
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let events = self.queued_events.saturating_mul(submission.n as usize);
        let inbox = self.inbox.clone();
        let (sink, stream) = serving::channel(events, move || {
            let _ = inbox.send(Message::Look(id));
        });
        if submission.max_tokens == 0 && submission.prompt.len() < 2 {
            submission.answer_without_running(&sink);
            return Ok(stream);
        }
        // Lower is earlier there, higher is earlier here.
        let middle = i32::from(PRIORITY_LEVELS / 2);
        let priority = middle.saturating_sub(submission.priority).clamp(0, i32::from(PRIORITY_LEVELS) - 1);
        let priority = u8::try_from(priority).unwrap_or_default();
        self.say(Message::Submit(Box::new(New { id, key, priority, submission, sink, place })));
        Ok(stream)
    }

    fn snapshot(&self) -> Snapshot {
        self.status.snapshot()
    }

    fn health(&self) -> Result<(), String> {
        self.status.health()
    }

    fn abort_all(&self) {
        self.status.abort();
        self.say(Message::Abort);
    }
}

impl Drop for Batched {
    fn drop(&mut self) {
        self.say(Message::Close);
    }
}

fn describe(engine: &Engine, root: String) -> ModelInfo {
    let tokenizer = engine.tokenizer().ok().cloned();
    let longest = tokenizer
        .as_ref()
        .map_or(1, |t| (0..t.vocab_size() as u32).map(|id| t.token_bytes(id).len()).max().unwrap_or(1));
    ModelInfo {
        root,
        template: engine.chat_template().cloned(),
        longest_token: longest,
        tokenizer,
        // What the pool cannot hold, no request can have.
        max_model_len: engine
            .max_model_len()
            .min(engine.kv_blocks().saturating_mul(engine.block_size().max(1))),
        vocab_size: engine.spec().vocab_size,
        end_tokens: engine.end_tokens(),
        sampling: SamplingParams {
            // The API's default is 1, also for a checkpoint whose authors decode greedily.
            temperature: engine.generation_config().temperature.unwrap_or(1.0),
            ..engine.sampling_defaults()
        },
        max_new_tokens: engine.generation_config().max_new_tokens.map(|n| n as usize),
        max_logprobs: MAX_LOGPROBS,
        block_size: engine.block_size().max(1),
        kv_blocks: engine.kv_blocks(),
    }
}

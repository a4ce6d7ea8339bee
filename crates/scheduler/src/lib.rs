//! Which tokens of which requests run in the next step.
#![forbid(unsafe_code)]

mod blocks;
mod config;
mod plan;
mod planner;
mod prefix;
mod queue;
mod request;
mod scheduler;
mod sequence;

pub use blocks::BlockManager;
pub use config::{CacheIdentity, Config, ConfigError, QueueLimits};
pub use plan::{
    BlockCopy, PendingId, PlannedSample, PlannedSequence, ResultsError, SampleResult, StepId, StepPlan,
    StepResults,
};
pub use prefix::{BlockHash, CacheScope, block_hash, root_hash};
pub use request::{
    Event, FinishReason, KeyId, Outcome, QueueBound, Refusal, Request, RequestId, SequenceId, Update, Usage,
};
pub use scheduler::{Scheduler, Snapshot, Step};

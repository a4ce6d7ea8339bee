//! Requests in, tokens out: the KV block pool, the step loop, sampling parameters, and the assembly of a model from its
//! files ([`Loader`]).
//!
//! Invariant: the engine knows no HTTP and no terminal; progress leaves through [`Observer`].
#![forbid(unsafe_code)]

mod api;
mod batch;
mod blocks;
mod cpu_device;
mod cuda_device;
mod cuda_runner;
mod demo;
mod device;
mod engine;
mod error;
#[cfg(feature = "faults")]
mod faults;
mod gpu;
mod loader;
mod local_ranks;
mod memory_budget;
mod nodes;
mod ranks;
mod runner;
mod step_deadline;

mod watchdog;

pub use api::{Completion, FinishReason, Generate, Observer, Request, SamplingParams, Timings};
pub use batch::{BatchDraw, BatchError, BatchLimits, BatchResults, BatchStep, ScoreRequest, Scores};
pub use device::{
    DEFAULT_GPU_MEMORY_UTILIZATION, Device, DeviceOptions, Kernels, KvCacheDtype, KvPool, Precision,
    kernel_context,
};
pub use engine::{Engine, Seen};
pub use error::{EngineError, Result};
pub use loader::{LoadFormat, Loader, ModelFiles, ModelRef};
pub use longhaul_cuda::driver::EmulatedOptions;
pub use longhaul_cuda::group::AllReduce;
pub use longhaul_model::LongContext;
pub use nodes::NodeOptions;
pub use step_deadline::StepDeadline;

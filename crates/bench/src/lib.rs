//! Measurements of a loaded engine, each printed beside the limit it is a fraction of.
#![forbid(unsafe_code)]

mod bandwidth;
pub mod collectives;
pub mod kernels;
mod latency;
pub mod plan;

pub use bandwidth::{copy_bandwidth, copy_bandwidth_of};
pub use latency::{LatencyConfig, LatencyReport, Spread, latency};

//! The batched engine over the demo: against the engine that answers one request at a time, and against itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod alone;
mod crowd;
mod harness;
mod lost;
mod prefix;

//! Where tensors come from: safetensors checkpoints, the hub cache, dummy weights, and the slices a shard needs.
//!
//! [`Checkpoint`] reads published safetensors files, [`Dummy`] generates weights from a seed; both are a
//! [`TensorSource`], which is all that a model loader sees. [`locate`] turns what the user typed (a directory or a hub
//! id) into a directory.
//!
//! Invariants:
//! * A [`Checkpoint`] exists only if every header, size, name and shape of every file was checked. No tensor byte is
//!   read before that.
//! * Tensor bytes are read with positioned reads into owned buffers, never through a memory map: a mapped file that
//!   another process truncates kills the reader with SIGBUS, a failed read is an error.
//! * Only safetensors is opened. Nothing that can carry code (pickles, Python files) is ever read.
#![forbid(unsafe_code)]

mod checkpoint;
mod dummy;
mod error;
mod expect;
mod header;
mod hub;
mod hub_cache;
mod hub_id;
mod hub_options;
mod index;
mod json_map;
mod progress;
mod slice;
mod source;
mod storage;

pub use checkpoint::Checkpoint;
pub use dummy::Dummy;
pub use error::{Result, WeightsError};
pub use hub::{Wanted, locate, locate_with};
pub use hub_options::HubOptions;
pub use progress::{DownloadProgress, StderrBar};
pub use slice::Slice;
pub use source::{TensorSource, TensorSpec};

//! The one seam between the model and a device.
//!
//! `model` writes the forward pass once against [`Backend`]; a device crate (`cpu`, `cuda`) implements it. The trait is
//! op-level and fused where fusing pays (residual add + norm, rotation + cache write), and nothing below that.
//!
//! Invariant: this crate implements no device and knows no model, no file format and no request. It holds only what both
//! sides must agree on: host tensors, the KV layout, rotation tables, the inputs of one step, sampling rows.
#![forbid(unsafe_code)]

mod collective;
mod error;
mod host;
mod kv;
mod ops;
mod pending;
mod rope;
mod sampling;
mod slices;
mod step;
mod widths;

pub use collective::{Collective, CollectiveError, Single, Values, ValuesMut, check_shares};
pub use error::{Error, Result};
pub use host::{DType, HostTensor};
pub use kv::{HeadGroups, KvLayout};
pub use ops::{Backend, ExpertWeights, Linear, MoeWeights, SharedExpert};
pub use pending::Pending;
pub use rope::{Chunking, KeySegment, RopeTables};
pub use sampling::{Draw, OwnedSamplingRow, RowError, Sampled, SamplingRow, SeenToken, uniform};
pub use slices::{
    Candidate, Largest, MOST_CANDIDATES, MOST_MEMBERS, PARTS, Part, SliceMasses, SliceSummary,
    VocabularySlice, Window, order_key, order_place, sample_slices, score_of_key,
};
pub use step::{SequenceInputs, StepInputs};
pub use widths::Widths;

//! Collective operations over shared memory: [`Threads`] between the threads of a process, [`Processes`] between processes
//! of one machine, [`Spanning`] between threads of processes on several machines. All run one protocol over a slice of 32-bit
//! atomics.
//!
//! The protocol is a sequence of **exchanges**. In exchange `s` a rank writes its part into its slot, publishes `s`, waits
//! until every rank has published `s`, and reads the others' slots. Slots are doubled: exchange `s + 2` writes where `s`
//! did, and a rank gets there only after every rank has published `s + 1`, which each does after it has read what `s`
//! brought. A longer message takes several exchanges. Sums are taken in rank order by whoever takes them, so all ranks hold
//! the same bits.
//!
//! Every exchange carries a description of the call, so ranks that call different things fail instead of mixing data. The
//! first failure (a rank gone, a deadline, a disagreement, an abort) is recorded in the memory and ends the group for all.
//!
//! Invariant: `unsafe` lives in module `mapping` and nowhere else; a peer that writes rubbish can spoil values, not memory.
#![deny(unsafe_code)]

mod element;
mod failure;
mod group;
mod layout;
#[cfg(target_os = "linux")]
mod mapping;
mod operations;
#[cfg(target_os = "linux")]
mod processes;
mod pulse;
mod spanning;
mod threads;
mod wait;

pub use group::Options;
#[cfg(target_os = "linux")]
pub use processes::{Processes, Segment, SegmentError, end_with_parent};
pub use pulse::Pulse;
pub use spanning::{Link, Mirror, Spanning};
pub use threads::Threads;

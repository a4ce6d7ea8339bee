//! `longhaul bench collectives`: latency and bandwidth of every collective operation, beside the limit of what it travels over.
//!
//! Sizes and bandwidths are those of nccl-tests (`doc/PERFORMANCE.md`): the size is that of the whole message, the *algorithm
//! bandwidth* is size over time, and the *bus bandwidth* is that times a factor of the operation, so that it can be
//! compared with the bandwidth of a rank's link for any number of ranks.
//!
//! The limit over shared memory follows from a copy between two buffers of the message's size, one thread a rank: `n` ranks that all
//! send `b` bytes copy `n·b`, whichever way, so a rank's bus bandwidth is at most the copied bytes per second over `n`.

mod measure;
mod peer;
#[cfg(target_os = "linux")]
mod processes;
mod report;

use std::io;

use half::{bf16, f16};
use longhaul_backend::{CollectiveError, Values, ValuesMut};
#[cfg(target_os = "linux")]
use longhaul_collective::SegmentError;
use longhaul_collective::{Options, Threads};
use longhaul_cuda::CudaError;
use serde::{Deserialize, Serialize};

pub use peer::peers;
#[cfg(target_os = "linux")]
pub use processes::{RankCommand, processes, rank_process};
pub use report::{CollectiveFigure, CollectivesReport};

use crate::copy_bandwidth_of;

/// A collective operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// The sum over all ranks, on all ranks.
    AllReduce,
    /// All ranks' shares, on all ranks.
    AllGather,
    /// Of the sum over all ranks, a share on each.
    ReduceScatter,
    /// Rank 0's values, on all ranks.
    Broadcast,
    /// Nothing but the meeting.
    Barrier,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Operation; 5] = [
        Operation::AllReduce,
        Operation::AllGather,
        Operation::ReduceScatter,
        Operation::Broadcast,
        Operation::Barrier,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Operation::AllReduce => "all_reduce",
            Operation::AllGather => "all_gather",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::Broadcast => "broadcast",
            Operation::Barrier => "barrier",
        }
    }

    /// Bus bandwidth over algorithm bandwidth among `ranks`: bytes that the busiest rank sends, over the size of the message.
    /// `None` where nothing is sent.
    pub fn bus_factor(self, ranks: usize) -> Option<f64> {
        let others = ranks.saturating_sub(1) as f64 / ranks.max(1) as f64;
        match self {
            Operation::AllReduce => Some(2.0 * others),
            Operation::AllGather | Operation::ReduceScatter => Some(others),
            Operation::Broadcast => Some(1.0),
            Operation::Barrier => None,
        }
    }

    /// Copies of the whole message among `ranks` that cannot be done without.
    fn copies(self, ranks: usize) -> f64 {
        let others = ranks.saturating_sub(1) as f64;
        match self {
            Operation::AllReduce => 2.0 * others,
            Operation::AllGather | Operation::ReduceScatter | Operation::Broadcast => others,
            Operation::Barrier => 0.0,
        }
    }
}

/// Type of a message's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ElementType {
    /// IEEE binary32.
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE binary16.
    Float16,
    /// 32-bit integers.
    Int32,
}

impl ElementType {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            ElementType::Float32 => "float32",
            ElementType::Bfloat16 => "bfloat16",
            ElementType::Float16 => "float16",
            ElementType::Int32 => "int32",
        }
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            ElementType::Float32 | ElementType::Int32 => 4,
            ElementType::Bfloat16 | ElementType::Float16 => 2,
        }
    }
}

/// One operation on one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// The operation.
    pub operation: Operation,
    /// The message's elements; of no meaning to a barrier.
    pub element: ElementType,
    /// Bytes of the whole message.
    pub bytes: usize,
}

/// The cases of `operations` × `elements` × `sizes`; a barrier, which has no message, once.
pub fn cases(operations: &[Operation], elements: &[ElementType], sizes: &[usize]) -> Vec<Case> {
    let mut cases = Vec::new();
    for &operation in operations {
        if operation == Operation::Barrier {
            cases.push(Case { operation, element: ElementType::Float32, bytes: 0 });
            continue;
        }
        for &element in elements {
            cases.extend(sizes.iter().map(|&bytes| Case { operation, element, bytes }));
        }
    }
    cases
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum CollectivesError {
    /// An operation failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The memory of a group of processes.
    #[cfg(target_os = "linux")]
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// A result is not what it must be.
    #[error(
        "{operation} of {bytes} bytes of {element}: element {index} on rank {rank} is {found}, not {expected}"
    )]
    Wrong {
        /// The operation.
        operation: &'static str,
        /// The message's bytes.
        bytes: usize,
        /// The elements' type.
        element: &'static str,
        /// Index of the element in the rank's result.
        index: usize,
        /// The rank.
        rank: usize,
        /// What it holds.
        found: f32,
        /// What it must hold.
        expected: f32,
    },
    /// No memory for a message.
    #[error("no memory for the buffers of a message of {bytes} bytes; leave out the largest of --sizes")]
    Memory {
        /// The message's bytes.
        bytes: usize,
    },
    /// A rank's process could not be started or spoken to.
    #[error("process of rank {rank}: {source}")]
    Process {
        /// The rank.
        rank: usize,
        /// The system's reason.
        source: io::Error,
    },
    /// A rank's process ended with an error, which it has printed.
    #[error("process of rank {rank} ended with {status}")]
    Ended {
        /// The rank.
        rank: usize,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// A rank's thread panicked.
    #[error("the thread of a rank panicked")]
    Panicked,
    /// The device failed.
    #[error(transparent)]
    Device(#[from] CudaError),
}

/// Hears (cases done, cases in all).
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Measures `cases`, each for about `case_seconds`, among `ranks` (1 to 64) threads of this process.
///
/// # Errors
/// [`CollectivesError`].
pub fn threads(
    ranks: usize,
    cases: &[Case],
    case_seconds: f64,
    progress: Progress<'_>,
) -> Result<Vec<CollectiveFigure>, CollectivesError> {
    let limits = limits(ranks, cases);
    let mut groups = Threads::group(ranks, Options::default())?.into_iter();
    let leader = groups.next();
    let samples = std::thread::scope(|scope| {
        let followers: Vec<_> = groups
            .map(|group| {
                scope.spawn(move || measure::rank(&group, cases, case_seconds, &mut |_, _| {}).map(drop))
            })
            .collect();
        let samples =
            leader.map_or(Ok(Vec::new()), |group| measure::rank(&group, cases, case_seconds, progress));
        let mut failures = followers
            .into_iter()
            .filter_map(|follower| follower.join().unwrap_or(Err(CollectivesError::Panicked)).err());
        // A wrong result on one rank ends the group for the others, which then only say so.
        match failures.find(|error| !matches!(error, CollectivesError::Collective(_))) {
            Some(error) => Err(error),
            None => samples,
        }
    })?;
    Ok(report::figures("threads", ranks, cases, samples, &limits))
}

/// Bytes per second that a copy of each case's message copies with a thread a rank; the same for equal sizes.
fn limits(ranks: usize, cases: &[Case]) -> Vec<(usize, f64)> {
    let mut limits: Vec<(usize, f64)> = Vec::new();
    for bytes in cases.iter().map(|case| case.bytes).filter(|&bytes| bytes > 0) {
        if limits.iter().all(|(known, _)| *known != bytes) {
            // That function counts bytes read plus bytes written.
            limits.push((bytes, copy_bandwidth_of(bytes, ranks, 5) / 2.0));
        }
    }
    limits
}

/// An element type that messages can be made of.
trait Element: Copy + Default {
    /// A small integer, exactly.
    fn small(value: u8) -> Self;
    /// The value.
    fn value(self) -> f32;
    fn values(values: &[Self]) -> Values<'_>;
    fn values_mut(values: &mut [Self]) -> ValuesMut<'_>;
}

macro_rules! element {
    ($element:ty, $small:expr, $value:expr) => {
        impl Element for $element {
            fn small(value: u8) -> Self {
                $small(value)
            }
            fn value(self) -> f32 {
                $value(self)
            }
            fn values(values: &[Self]) -> Values<'_> {
                values.into()
            }
            fn values_mut(values: &mut [Self]) -> ValuesMut<'_> {
                values.into()
            }
        }
    };
}
element!(f32, f32::from, |v| v);
element!(bf16, |v: u8| bf16::from_f32(v.into()), bf16::to_f32);
element!(f16, |v: u8| f16::from_f32(v.into()), f16::to_f32);
element!(i32, i32::from, |v| v as f32);

#[cfg(test)]
mod tests {
    use super::*;

    /// The factors of nccl-tests, and the limit that follows from the copies: a rank's bus bandwidth is at most the
    /// copied bytes over the ranks (a broadcast's root sends to `ranks - 1`).
    #[test]
    fn factors_are_those_of_nccl_tests() {
        for (operation, ranks, factor) in [
            (Operation::AllReduce, 2, Some(1.0)),
            (Operation::AllReduce, 8, Some(1.75)),
            (Operation::AllGather, 4, Some(0.75)),
            (Operation::ReduceScatter, 4, Some(0.75)),
            (Operation::Broadcast, 4, Some(1.0)),
            (Operation::Barrier, 4, None),
            (Operation::AllReduce, 1, Some(0.0)),
        ] {
            assert_eq!(operation.bus_factor(ranks), factor, "{operation:?}, {ranks} ranks");
        }
        for operation in [Operation::AllReduce, Operation::AllGather, Operation::ReduceScatter] {
            let factor = operation.bus_factor(5).unwrap();
            assert!((factor / operation.copies(5) - 1.0 / 5.0).abs() < 1e-12, "{operation:?}");
        }
    }

    #[test]
    fn a_barrier_is_one_case() {
        let all = cases(&Operation::ALL, &[ElementType::Float32, ElementType::Bfloat16], &[1024, 4096]);
        assert_eq!(all.len(), 4 * 2 * 2 + 1);
    }

    #[test]
    fn threads_give_a_figure_a_case() {
        let elements =
            [ElementType::Float32, ElementType::Bfloat16, ElementType::Float16, ElementType::Int32];
        // Below a share a rank, odd, and beyond the exchanges of one slot.
        let cases = cases(&Operation::ALL, &elements, &[4, 1020, 1 << 20]);
        for ranks in [1, 3] {
            let mut done = 0;
            let figures = threads(ranks, &cases, 0.0, &mut |n, all| {
                assert_eq!(all, cases.len());
                done = n;
            })
            .unwrap();
            assert_eq!((figures.len(), done), (cases.len(), cases.len()));
            for (figure, case) in figures.iter().zip(&cases) {
                assert_eq!((figure.ranks, figure.bytes), (ranks, case.bytes));
                let time = figure.microseconds.unwrap();
                assert!(time.min > 0.0 && time.min <= time.median && time.median <= time.max, "{figure:?}");
                assert_eq!(figure.bus_bytes_per_second.is_some(), case.operation != Operation::Barrier);
            }
        }
    }
}

//! The first failure of a group, recorded in its memory for all ranks.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use longhaul_backend::CollectiveError;

use crate::layout::{
    MESSAGE_BYTES, WORD_FAILURE, WORD_FAILURE_BYTES, WORD_FAILURE_KIND, WORD_FAILURE_MESSAGE,
    WORD_FAILURE_MISSING, WORD_FAILURE_RANK,
};

const WRITING: u32 = 1;
const WRITTEN: u32 = 2;

const RANK_FAILED: u32 = 1;
const TIMEOUT: u32 = 2;
const ABORTED: u32 = 3;
const MISMATCH: u32 = 4;
const TRANSPORT: u32 = 5;

/// Names of operations, so that a recorded one can be given back.
pub const OPERATIONS: [&str; 6] =
    ["barrier", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "join"];

/// A failure as numbers and a message, for the memory and for the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub kind: u32,
    pub rank: u32,
    /// Ranks that did not arrive, one bit a rank.
    pub missing: u64,
    /// At most [`MESSAGE_BYTES`].
    pub message: String,
}

impl Record {
    pub fn new(error: &CollectiveError) -> Self {
        let (kind, rank, missing, mut message) = match error {
            CollectiveError::RankFailed { rank, message } => (RANK_FAILED, *rank, 0, message.clone()),
            CollectiveError::Timeout { op, missing, after } => {
                let bit = |rank: usize| 1u64.checked_shl(rank as u32).unwrap_or(0);
                let bits = missing.iter().fold(0, |bits, &rank| bits | bit(rank));
                (TIMEOUT, 0, bits, format!("{} {op}", after.as_millis()))
            }
            CollectiveError::Aborted { rank, message } => (ABORTED, *rank, 0, message.clone()),
            CollectiveError::Mismatch { rank, message } => (MISMATCH, *rank, 0, message.clone()),
            CollectiveError::Transport { op, message } | CollectiveError::Misuse { op, detail: message } => {
                (TRANSPORT, 0, 0, format!("{op} {message}"))
            }
        };
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES));
        Self { kind, rank: rank as u32, missing, message }
    }

    pub fn error(self) -> CollectiveError {
        let (rank, message) = (self.rank as usize, self.message);
        match self.kind {
            RANK_FAILED => CollectiveError::RankFailed { rank, message },
            TIMEOUT => {
                let (after, op) = message.split_once(' ').unwrap_or(("0", ""));
                CollectiveError::Timeout {
                    op: operation(op),
                    missing: (0..64).filter(|rank| self.missing >> rank & 1 == 1).collect(),
                    after: Duration::from_millis(after.parse().unwrap_or(0)),
                }
            }
            ABORTED => CollectiveError::Aborted { rank, message },
            MISMATCH => CollectiveError::Mismatch { rank, message },
            _ => {
                let (op, message) = message.split_once(' ').unwrap_or(("", &message));
                CollectiveError::Transport { op: operation(op), message: message.into() }
            }
        }
    }
}

/// Records `error` unless a failure is there already. Whether it was recorded.
pub fn record(memory: &[AtomicU32], error: &CollectiveError) -> bool {
    let claim = memory[WORD_FAILURE].compare_exchange(0, WRITING, Ordering::AcqRel, Ordering::Acquire);
    if claim.is_err() {
        return false;
    }
    let record = Record::new(error);
    let store = |word: usize, value: u32| memory[word].store(value, Ordering::Relaxed);
    store(WORD_FAILURE_KIND, record.kind);
    store(WORD_FAILURE_RANK, record.rank);
    store(WORD_FAILURE_MISSING, record.missing as u32);
    store(WORD_FAILURE_MISSING + 1, (record.missing >> 32) as u32);
    let bytes = record.message.as_bytes();
    store(WORD_FAILURE_BYTES, bytes.len() as u32);
    for (word, part) in memory[WORD_FAILURE_MESSAGE..].iter().zip(bytes.chunks(4)) {
        let mut quad = [0; 4];
        quad[..part.len()].copy_from_slice(part);
        word.store(u32::from_le_bytes(quad), Ordering::Relaxed);
    }
    memory[WORD_FAILURE].store(WRITTEN, Ordering::Release);
    true
}

/// The recorded failure.
pub fn recorded(memory: &[AtomicU32]) -> Option<CollectiveError> {
    match memory[WORD_FAILURE].load(Ordering::Acquire) {
        0 => return None,
        WRITTEN => {}
        // Whoever writes it is about to finish, or died at it.
        _ => {
            std::thread::sleep(Duration::from_millis(1));
            if memory[WORD_FAILURE].load(Ordering::Acquire) != WRITTEN {
                let message = "a rank died while it reported a failure".into();
                return Some(CollectiveError::Transport { op: "exchange", message });
            }
        }
    }
    let load = |word: usize| memory[word].load(Ordering::Relaxed);
    let length = (load(WORD_FAILURE_BYTES) as usize).min(MESSAGE_BYTES);
    let mut bytes: Vec<u8> =
        (0..length.div_ceil(4)).flat_map(|i| load(WORD_FAILURE_MESSAGE + i).to_le_bytes()).collect();
    bytes.truncate(length);
    let missing = u64::from(load(WORD_FAILURE_MISSING)) | u64::from(load(WORD_FAILURE_MISSING + 1)) << 32;
    let message = String::from_utf8_lossy(&bytes).into_owned();
    Some(Record { kind: load(WORD_FAILURE_KIND), rank: load(WORD_FAILURE_RANK), missing, message }.error())
}

fn operation(name: &str) -> &'static str {
    OPERATIONS.into_iter().find(|known| *known == name).unwrap_or("exchange")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_kept_and_given_back() {
        let errors = [
            CollectiveError::RankFailed { rank: 3, message: "panicked".into() },
            CollectiveError::Timeout {
                op: "all_reduce",
                missing: vec![0, 33, 63],
                after: Duration::from_millis(1500),
            },
            CollectiveError::Aborted { rank: 1, message: "ü".repeat(80) },
            CollectiveError::Mismatch { rank: 2, message: String::new() },
            CollectiveError::Transport { op: "join", message: "no room".into() },
        ];
        for error in errors {
            let memory: Vec<AtomicU32> = (0..128).map(|_| AtomicU32::new(0)).collect();
            assert_eq!(recorded(&memory), None);
            assert!(record(&memory, &error));
            assert!(!record(&memory, &CollectiveError::RankFailed { rank: 9, message: "late".into() }));
            assert_eq!(recorded(&memory), Some(error));
        }
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let memory: Vec<AtomicU32> = (0..128).map(|_| AtomicU32::new(0)).collect();
        record(&memory, &CollectiveError::Aborted { rank: 0, message: "é".repeat(500) });
        let Some(CollectiveError::Aborted { message, .. }) = recorded(&memory) else { panic!() };
        assert_eq!(message, "é".repeat(MESSAGE_BYTES / 2));
    }
}

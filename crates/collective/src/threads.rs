use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use longhaul_backend::{Collective, CollectiveError, Values, ValuesMut};

use crate::group::{Group, JOINED, Options, Unwatched};
use crate::layout::{CONTROL_STATE, MAX_WORLD_SIZE};

/// A rank that is a thread of this process. Dropping it leaves the group; dropping it in a panic ends the group.
pub struct Threads(Group<Words, Unwatched>);

struct Words(Arc<[AtomicU32]>);

impl AsRef<[AtomicU32]> for Words {
    fn as_ref(&self) -> &[AtomicU32] {
        &self.0
    }
}

impl Threads {
    /// The ranks of a group of `world_size` (1 to 64), to be moved to one thread each.
    ///
    /// # Errors
    /// [`CollectiveError::Misuse`] for a world size out of range.
    pub fn group(world_size: usize, options: Options) -> Result<Vec<Threads>, CollectiveError> {
        if !(1..=MAX_WORLD_SIZE).contains(&world_size) {
            let detail = format!("a group of {world_size} ranks; 1 to {MAX_WORLD_SIZE} are possible");
            return Err(CollectiveError::Misuse { op: "join", detail });
        }
        let layout = options.layout(world_size);
        let memory: Arc<[AtomicU32]> = (0..layout.words()).map(|_| AtomicU32::new(0)).collect();
        for rank in 0..world_size {
            memory[layout.control(rank) + CONTROL_STATE].store(JOINED, Ordering::Relaxed);
        }
        Ok((0..world_size)
            .map(|rank| Threads(Group::new(Words(memory.clone()), layout, rank, options.timeout, Unwatched)))
            .collect())
    }
}

crate::operations::delegate!(Threads);

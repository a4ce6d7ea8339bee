use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use longhaul_backend::{Collective, CollectiveError, Values, ValuesMut};

use crate::group::{Group, InMemory, JOINED, Options};
use crate::layout::{CONTROL_STATE, Layout, MAX_WORLD_SIZE};
use crate::pulse::Pulse;

/// A rank that is a thread of this process. Dropping it leaves the group; dropping it in a panic ends the group.
pub struct Threads(Group<Words, InMemory>);

/// The memory of a group in one process.
#[derive(Clone)]
pub struct Words(pub Arc<[AtomicU32]>);

impl Words {
    /// Memory in which all ranks have joined.
    ///
    /// # Errors
    /// [`CollectiveError::Misuse`] for a world size out of range.
    pub fn new(world_size: usize, options: Options) -> Result<(Self, Layout), CollectiveError> {
        if !(1..=MAX_WORLD_SIZE).contains(&world_size) {
            let detail = format!("a group of {world_size} ranks; 1 to {MAX_WORLD_SIZE} are possible");
            return Err(CollectiveError::Misuse { op: "join", detail });
        }
        let layout = options.layout(world_size);
        let memory: Arc<[AtomicU32]> = (0..layout.words()).map(|_| AtomicU32::new(0)).collect();
        for rank in 0..world_size {
            memory[layout.control(rank) + CONTROL_STATE].store(JOINED, Ordering::Relaxed);
        }
        Ok((Self(memory), layout))
    }
}

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
        let (memory, layout) = Words::new(world_size, options)?;
        Ok((0..world_size)
            .map(|rank| Threads(Group::new(memory.clone(), layout, rank, options.timeout, InMemory)))
            .collect())
    }

    /// The group's progress.
    pub fn pulse(&self) -> Pulse {
        let (memory, layout) = self.0.memory();
        Pulse::new(memory.clone(), layout)
    }
}

crate::operations::delegate!(Threads);

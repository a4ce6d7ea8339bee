use std::sync::atomic::Ordering;

use crate::layout::{CONTROL_ARRIVED, Layout};
use crate::threads::Words;

/// The progress of a group, for a watchdog: a rank that is stuck publishes no exchanges, and soon nobody does.
#[derive(Clone)]
pub struct Pulse {
    memory: Words,
    layout: Layout,
}

impl Pulse {
    pub(crate) fn new(memory: Words, layout: Layout) -> Self {
        Self { memory, layout }
    }

    /// How many exchanges each rank has published so far, in rank order (counted modulo 2³²).
    pub fn exchanges(&self) -> Vec<u32> {
        let arrived = |rank| &self.memory.as_ref()[self.layout.control(rank) + CONTROL_ARRIVED];
        (0..self.layout.world_size).map(|rank| arrived(rank).load(Ordering::Relaxed)).collect()
    }
}

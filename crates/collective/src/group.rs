//! A rank's view of a group: exchanges, deadlines, and the end of the group.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_backend::CollectiveError;

use crate::failure::{OPERATIONS, record, recorded};
use crate::layout::{CALL_WORDS, CONTROL_ARRIVED, CONTROL_CALL, CONTROL_SLEEPERS, CONTROL_STATE, Layout};
use crate::wait::{is_slow, pause, publish, wake};

type Result<T> = std::result::Result<T, CollectiveError>;

pub const JOINED: u32 = 1;
pub const LEFT: u32 = 2;

/// How a group works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Longest time a call waits for the other ranks. [`Duration::MAX`] is without end: a watchdog, which sees progress through
    /// a [`crate::Pulse`], aborts instead.
    pub timeout: Duration,
    /// Bytes of a slot; longer messages take several exchanges. The memory of a group is `2 * world_size` slots.
    pub slot_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(30), slot_bytes: 256 << 10 }
    }
}

impl Options {
    /// The layout of a group's memory under these options.
    pub(crate) fn layout(&self, world_size: usize) -> Layout {
        Layout { world_size, slot: (self.slot_bytes / 4).clamp(16, 1 << 26) }
    }
}

/// What a rank knows of the others beside the memory, and what it tells those that do not see its memory.
pub trait Peers: Send + Sync {
    /// What is known of the end of `rank`, if it has ended.
    fn ended(&self, rank: usize) -> Option<String> {
        let _ = rank;
        None
    }

    /// This rank has published an exchange.
    fn published(&self, exchange: &Exchange<'_>) {
        let _ = exchange;
    }

    /// This rank has recorded the group's first failure.
    fn failed(&self, error: &CollectiveError) {
        let _ = error;
    }

    /// This rank has left the group.
    fn left(&self, rank: usize) {
        let _ = rank;
    }
}

/// Ranks that all see one memory, and whose end shows in it: threads.
#[derive(Debug)]
pub struct InMemory;

impl Peers for InMemory {}

/// What a rank publishes in one exchange.
pub struct Exchange<'a> {
    pub rank: usize,
    pub number: u32,
    /// Description of the call.
    pub call: [u32; CALL_WORDS],
    /// The part of its slot that it has written.
    pub words: &'a [AtomicU32],
}

/// What one call looks like to the other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Index into [`OPERATIONS`].
    pub operation: usize,
    /// [`crate::element::Element::CODE`], 0 without elements.
    pub element: u32,
    /// Root of a broadcast.
    pub root: usize,
    /// Elements in all.
    pub elements: usize,
    /// Shares.
    pub counts_hash: u32,
}

impl Call {
    fn words(self) -> [u32; CALL_WORDS] {
        [
            (self.operation as u32) << 8 | self.element,
            self.root as u32,
            self.elements as u32,
            self.counts_hash ^ ((self.elements as u64) >> 32) as u32,
        ]
    }

    fn name(self) -> &'static str {
        OPERATIONS.get(self.operation).copied().unwrap_or("exchange")
    }
}

/// A call in words, for a disagreement.
fn describe(words: [u32; CALL_WORDS]) -> String {
    let name = OPERATIONS.get((words[0] >> 8) as usize).copied().unwrap_or("something else");
    match words[0] & 0xff {
        0 => name.into(),
        element => {
            let element = ["", "f32", "i32", "bf16", "f16"].get(element as usize).copied().unwrap_or("?");
            format!("{name} of {} {element} (root {}, shares {:08x})", words[2], words[1], words[3])
        }
    }
}

/// Records the first failure of a group and wakes its ranks. Whether it is the first.
pub fn end(memory: &[AtomicU32], layout: Layout, error: &CollectiveError) -> bool {
    let first = record(memory, error);
    if first {
        for rank in 0..layout.world_size {
            wake(&memory[layout.control(rank) + CONTROL_ARRIVED]);
        }
    }
    first
}

/// Marks a rank as gone.
pub fn leave(memory: &[AtomicU32], layout: Layout, rank: usize) {
    memory[layout.control(rank) + CONTROL_STATE].store(LEFT, Ordering::SeqCst);
    wake(&memory[layout.control(rank) + CONTROL_ARRIVED]);
}

/// A rank of a group over `memory`.
pub struct Group<M: AsRef<[AtomicU32]>, P: Peers> {
    memory: M,
    layout: Layout,
    rank: usize,
    timeout: Duration,
    peers: P,
    /// Number of the last exchange; a call holds it to the end.
    position: Mutex<u32>,
}

impl<M: AsRef<[AtomicU32]>, P: Peers> Group<M, P> {
    /// Rank `rank`, which has joined, of the group whose initialised memory is `memory`, at least `layout.words()` long.
    pub fn new(memory: M, layout: Layout, rank: usize, timeout: Duration, peers: P) -> Self {
        Self { memory, layout, rank, timeout, peers, position: Mutex::new(0) }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn memory(&self) -> (&M, Layout) {
        (&self.memory, self.layout)
    }

    pub fn world_size(&self) -> usize {
        self.layout.world_size
    }

    /// Elements of `per_word` to a word that fit a slot.
    pub fn slot_elements(&self, per_word: usize) -> usize {
        self.layout.slot * per_word
    }

    fn words(&self) -> &[AtomicU32] {
        self.memory.as_ref()
    }

    fn control(&self, rank: usize, word: usize) -> &AtomicU32 {
        &self.words()[self.layout.control(rank) + word]
    }

    /// Starts a call: one at a time, and only while the group stands.
    pub fn begin(&self, call: Call) -> Result<Exchanges<'_, M, P>> {
        let position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = recorded(self.words()) {
            return Err(error);
        }
        Ok(Exchanges { group: self, call, position, deadline: Instant::now().checked_add(self.timeout) })
    }

    /// Ends the group with `error`, unless it has ended. Returns what it ended with.
    pub fn fail(&self, error: CollectiveError) -> CollectiveError {
        if end(self.words(), self.layout, &error) {
            self.peers.failed(&error);
            return error;
        }
        recorded(self.words()).unwrap_or(error)
    }

    pub fn check(&self) -> Result<()> {
        if let Some(error) = recorded(self.words()) {
            return Err(error);
        }
        match (0..self.world_size()).find_map(|rank| Some((rank, self.end_of(rank)?))) {
            Some((rank, message)) => Err(self.fail(CollectiveError::RankFailed { rank, message })),
            None => Ok(()),
        }
    }

    pub fn abort(&self, message: &str) {
        self.fail(CollectiveError::Aborted { rank: self.rank, message: message.into() });
    }

    /// What is known of the end of another rank.
    fn end_of(&self, rank: usize) -> Option<String> {
        if rank == self.rank {
            None
        } else if self.control(rank, CONTROL_STATE).load(Ordering::SeqCst) == LEFT {
            Some("it left the group".into())
        } else {
            self.peers.ended(rank)
        }
    }

    /// Waits until every rank has published exchange `number`.
    fn wait_for_all(&self, op: &'static str, number: u32, deadline: Option<Instant>) -> Result<()> {
        const NAP: Duration = Duration::from_millis(10);
        let arrived = |rank: usize| {
            let seen = self.control(rank, CONTROL_ARRIVED).load(Ordering::SeqCst);
            (seen, seen.wrapping_sub(number).cast_signed() >= 0)
        };
        for rank in 0..self.world_size() {
            let mut round = 0;
            loop {
                let (seen, done) = arrived(rank);
                if done {
                    break;
                }
                if is_slow(round) {
                    if let Some(error) = recorded(self.words()) {
                        return Err(error);
                    }
                    // Whoever is gone may have published this exchange before.
                    if let Some((gone, message)) = (0..self.world_size())
                        .find_map(|rank| Some((rank, self.end_of(rank)?)))
                        .filter(|(gone, _)| !arrived(*gone).1)
                    {
                        return Err(self.fail(CollectiveError::RankFailed { rank: gone, message }));
                    }
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        let missing: Vec<usize> =
                            (0..self.world_size()).filter(|&rank| !arrived(rank).1).collect();
                        if missing.is_empty() {
                            return Ok(());
                        }
                        return Err(self.fail(CollectiveError::Timeout { op, missing, after: self.timeout }));
                    }
                }
                let word = self.control(rank, CONTROL_ARRIVED);
                pause(round, word, self.control(rank, CONTROL_SLEEPERS), seen, NAP);
                round = round.saturating_add(1);
            }
        }
        Ok(())
    }
}

impl<M: AsRef<[AtomicU32]>, P: Peers> Drop for Group<M, P> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail(CollectiveError::RankFailed { rank: self.rank, message: "its thread panicked".into() });
        }
        leave(self.words(), self.layout, self.rank);
        self.peers.left(self.rank);
    }
}

/// The exchanges of one call.
pub struct Exchanges<'a, M: AsRef<[AtomicU32]>, P: Peers> {
    group: &'a Group<M, P>,
    call: Call,
    position: MutexGuard<'a, u32>,
    deadline: Option<Instant>,
}

impl<M: AsRef<[AtomicU32]>, P: Peers> Exchanges<'_, M, P> {
    fn slot(&self, rank: usize, number: u32) -> &[AtomicU32] {
        let at = self.group.layout.slot_at(rank, (number % 2) as usize);
        &self.group.words()[at..at + self.group.layout.slot]
    }

    /// This rank's slot for the next exchange.
    pub fn outgoing(&self) -> &[AtomicU32] {
        self.slot(self.group.rank, self.position.wrapping_add(1))
    }

    /// What `rank` sent in the last exchange.
    pub fn incoming(&self, rank: usize) -> &[AtomicU32] {
        self.slot(rank, *self.position)
    }

    /// What every rank sent in the last exchange, in rank order.
    pub fn all_incoming(&self) -> impl Iterator<Item = &[AtomicU32]> + Clone {
        (0..self.group.world_size()).map(|rank| self.incoming(rank))
    }

    /// Publishes the outgoing slot, of which the first `words` are written, and waits for those of all ranks.
    pub fn exchange(&mut self, words: usize) -> Result<()> {
        let group = self.group;
        let number = self.position.wrapping_add(1);
        let description = self.call.words();
        let call_at = |rank: usize, word: usize| {
            group.control(rank, CONTROL_CALL + (number % 2) as usize * CALL_WORDS + word)
        };
        for (word, &value) in description.iter().enumerate() {
            call_at(group.rank, word).store(value, Ordering::Relaxed);
        }
        publish(
            group.control(group.rank, CONTROL_ARRIVED),
            group.control(group.rank, CONTROL_SLEEPERS),
            number,
        );
        group.peers.published(&Exchange {
            rank: group.rank,
            number,
            call: description,
            words: self.slot(group.rank, number).get(..words).unwrap_or_default(),
        });
        *self.position = number;
        group.wait_for_all(self.call.name(), number, self.deadline)?;
        for rank in 0..group.world_size() {
            let theirs = std::array::from_fn(|word| call_at(rank, word).load(Ordering::Relaxed));
            if theirs != description {
                let message = format!(
                    "it called {}, rank {} called {}",
                    describe(theirs),
                    group.rank,
                    describe(description)
                );
                return Err(group.fail(CollectiveError::Mismatch { rank, message }));
            }
        }
        Ok(())
    }
}

//! Groups that span several processes which share no memory: nodes.
//!
//! Every node has the group's whole memory. Its own ranks are threads on it; the ranks of other nodes are **mirrored**: what
//! they publish arrives as a message and is written where they would have written it. So a rank cannot tell which ranks are
//! near, and sums are those of one process, bit for bit. Slots are as safe as on one machine: a mirrored rank publishes
//! exchange `s + 2` only after every rank, those of this node too, has published `s + 1`, and so has read `s`.
//!
//! ```text
//! exchange   1 | rank u8 | number u32 | call 4 × u32 | count u32 | count words
//! failure    2 | kind u8 | rank u8 | ranks that are missing u64 | message, UTF-8, at most 240 bytes
//! left       3 | rank u8
//! ```
//! Integers are little-endian. A node gets every message of every other node, in the order in which that node sent them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use longhaul_backend::{Collective, CollectiveError, Values, ValuesMut};

use crate::failure::Record;
use crate::group::{Exchange, Group, LEFT, Options, Peers, end, leave};
use crate::layout::{
    CALL_WORDS, CONTROL_ARRIVED, CONTROL_CALL, CONTROL_SLEEPERS, CONTROL_STATE, Layout, MESSAGE_BYTES,
};
use crate::pulse::Pulse;
use crate::threads::Words;
use crate::wait::publish;

const EXCHANGE: u8 = 1;
const FAILURE: u8 = 2;
const LEAVING: u8 = 3;

/// Carries messages of this node's ranks to all other nodes.
pub trait Link: Send + Sync {
    /// Takes a message for all other nodes. Must not wait for them: a rank calls it in the middle of a step.
    fn send(&self, message: Vec<u8>);
}

struct Linked(Arc<dyn Link>);

impl Peers for Linked {
    fn published(&self, exchange: &Exchange<'_>) {
        let mut message = Vec::with_capacity(2 + 4 * (2 + CALL_WORDS + exchange.words.len()));
        message.extend([EXCHANGE, exchange.rank as u8]);
        message.extend(exchange.number.to_le_bytes());
        message.extend(exchange.call.into_iter().flat_map(u32::to_le_bytes));
        message.extend((exchange.words.len() as u32).to_le_bytes());
        message.extend(exchange.words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()));
        self.0.send(message);
    }

    fn failed(&self, error: &CollectiveError) {
        self.0.send(failure(error));
    }

    fn left(&self, rank: usize) {
        self.0.send(vec![LEAVING, rank as u8]);
    }
}

/// The message that ends the group on other nodes with `error`.
fn failure(error: &CollectiveError) -> Vec<u8> {
    let record = Record::new(error);
    let mut message = vec![FAILURE, record.kind as u8, record.rank as u8];
    message.extend(record.missing.to_le_bytes());
    message.extend(record.message.as_bytes());
    message
}

/// A rank that is a thread of this process, in a group that spans several. Dropping it leaves the group; dropping it in a
/// panic ends the group.
pub struct Spanning(Group<Words, Linked>);

impl Spanning {
    /// The ranks `local` of a group of `world_size` (1 to 64), to be moved to one thread each, and the mirror of the others.
    ///
    /// # Errors
    /// [`CollectiveError::Misuse`] for a world size or ranks out of range.
    pub fn group(
        world_size: usize,
        local: Range<usize>,
        options: Options,
        link: &Arc<dyn Link>,
    ) -> Result<(Vec<Spanning>, Mirror), CollectiveError> {
        let (memory, layout) = Words::new(world_size, options)?;
        if local.is_empty() || local.end > world_size {
            let detail = format!("ranks {local:?} of a group of {world_size}");
            return Err(CollectiveError::Misuse { op: "join", detail });
        }
        let rank =
            |rank| Spanning(Group::new(memory.clone(), layout, rank, options.timeout, Linked(link.clone())));
        let ranks = local.clone().map(rank).collect();
        Ok((ranks, Mirror { memory, layout, local, link: link.clone() }))
    }

    /// The group's progress, on all nodes.
    pub fn pulse(&self) -> Pulse {
        let (memory, layout) = self.0.memory();
        Pulse::new(memory.clone(), layout)
    }
}

crate::operations::delegate!(Spanning);

/// The ranks of other nodes, as this node sees them.
#[derive(Clone)]
pub struct Mirror {
    memory: Words,
    layout: Layout,
    local: Range<usize>,
    link: Arc<dyn Link>,
}

impl Mirror {
    /// Takes a message from a node that may speak for the ranks `of`; messages of one rank must come one after the other.
    ///
    /// # Errors
    /// What is wrong with it, in words. Nothing has been taken then.
    pub fn receive(&self, of: &Range<usize>, message: &[u8]) -> Result<(), String> {
        let mut reader = Reader(message);
        let remote = |rank: u8| {
            let rank = usize::from(rank);
            (of.contains(&rank) && !self.local.contains(&rank) && rank < self.layout.world_size)
                .then_some(rank)
                .ok_or_else(|| format!("a message of rank {rank}, which is not on that node"))
        };
        match reader.byte()? {
            EXCHANGE => {
                let rank = remote(reader.byte()?)?;
                let number = reader.word()?;
                let mut call = [0; CALL_WORDS];
                for word in &mut call {
                    *word = reader.word()?;
                }
                let count = reader.word()? as usize;
                if count > self.layout.slot || reader.0.len() != 4 * count {
                    return Err(format!(
                        "{} bytes for {count} words; a slot holds {}",
                        reader.0.len(),
                        self.layout.slot
                    ));
                }
                self.publish(rank, number, call, reader.0)
            }
            FAILURE => {
                let (kind, rank) = (u32::from(reader.byte()?), u32::from(reader.byte()?));
                let missing = u64::from(reader.word()?) | u64::from(reader.word()?) << 32;
                let message = std::str::from_utf8(reader.0)
                    .ok()
                    .filter(|message| message.len() <= MESSAGE_BYTES)
                    .ok_or("a failure that is no short text")?;
                let error = Record { kind, rank, missing, message: message.into() }.error();
                end(self.memory.as_ref(), self.layout, &error);
                Ok(())
            }
            LEAVING => {
                leave(self.memory.as_ref(), self.layout, remote(reader.byte()?)?);
                Ok(())
            }
            other => Err(format!("a message of kind {other}")),
        }
    }

    /// What `rank` has sent, as if it had written it here.
    fn publish(&self, rank: usize, number: u32, call: [u32; CALL_WORDS], words: &[u8]) -> Result<(), String> {
        let memory = self.memory.as_ref();
        let control = |word: usize| &memory[self.layout.control(rank) + word];
        let last = control(CONTROL_ARRIVED).load(Ordering::SeqCst);
        if number != last.wrapping_add(1) || control(CONTROL_STATE).load(Ordering::SeqCst) == LEFT {
            return Err(format!("exchange {number} of rank {rank} after exchange {last}"));
        }
        let parity = (number % 2) as usize;
        let slot = &memory[self.layout.slot_at(rank, parity)..];
        for (word, bytes) in slot.iter().zip(words.chunks_exact(4)) {
            word.store(bytes.try_into().map(u32::from_le_bytes).unwrap_or(0), Ordering::Relaxed);
        }
        for (word, value) in call.into_iter().enumerate() {
            control(CONTROL_CALL + parity * CALL_WORDS + word).store(value, Ordering::Relaxed);
        }
        publish(control(CONTROL_ARRIVED), control(CONTROL_SLEEPERS), number);
        Ok(())
    }

    /// Ends the group on this node and, unless it has ended already, on the others: a node is lost, or a watchdog has had enough.
    pub fn fail(&self, error: &CollectiveError) {
        if end(self.memory.as_ref(), self.layout, error) {
            self.link.send(failure(error));
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (first, rest) = self.0.split_first_chunk().ok_or("a message that is too short")?;
        self.0 = rest;
        Ok(*first)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.take().map(|[byte]| byte)
    }

    fn word(&mut self) -> Result<u32, String> {
        self.take().map(u32::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nowhere;

    impl Link for Nowhere {
        fn send(&self, _: Vec<u8>) {}
    }

    #[test]
    fn what_is_not_a_message_of_that_node_is_refused() {
        let link: Arc<dyn Link> = Arc::new(Nowhere);
        let options = Options { slot_bytes: 64, ..Options::default() };
        let (ranks, mirror) = Spanning::group(4, 0..2, options, &link).unwrap();
        let exchange = |rank: u8, number: u32, count: u32, words: usize| {
            let mut message = vec![EXCHANGE, rank];
            message.extend(number.to_le_bytes());
            message.extend([0; 16]);
            message.extend(count.to_le_bytes());
            message.extend(vec![7; 4 * words]);
            message
        };
        let cases: [(Vec<u8>, &str); 12] = [
            (vec![], "too short"),
            (vec![9], "of kind 9"),
            (vec![EXCHANGE, 2, 1], "too short"),
            (exchange(1, 1, 0, 0), "rank 1, which is not on that node"),
            (exchange(3, 1, 0, 0), "rank 3, which is not on that node"),
            (exchange(200, 1, 0, 0), "rank 200"),
            (exchange(2, 2, 0, 0), "exchange 2 of rank 2 after exchange 0"),
            (exchange(2, 1, 2, 1), "4 bytes for 2 words"),
            (exchange(2, 1, 17, 17), "a slot holds 16"),
            (vec![LEAVING, 0], "rank 0"),
            ([vec![FAILURE, 1, 2], vec![0; 8], vec![0xff]].concat(), "no short text"),
            ([vec![FAILURE, 1, 2], vec![0; 8], vec![b'x'; 241]].concat(), "no short text"),
        ];
        for (message, words) in cases {
            let error = mirror.receive(&(2..3), &message).unwrap_err();
            assert!(error.contains(words), "{error}\n{words}");
        }
        assert_eq!(ranks[0].pulse().exchanges(), [0; 4]);
        mirror.receive(&(2..3), &exchange(2, 1, 16, 16)).unwrap();
        assert_eq!(ranks[0].pulse().exchanges(), [0, 0, 1, 0]);
        assert!(ranks[0].check().is_ok());
        assert!(Spanning::group(4, 2..5, options, &link).is_err());
        assert!(Spanning::group(4, 2..2, options, &link).is_err());
    }
}

//! The operations of [`Collective`], as exchanges.

use std::ops::Range;
use std::sync::atomic::AtomicU32;

use longhaul_backend::{Collective, CollectiveError, Values, ValuesMut, check_shares};

use crate::element::{Element, load, store, sum};
use crate::group::{Call, Group, Peers};

type Result<T> = std::result::Result<T, CollectiveError>;

const BARRIER: usize = 0;
const ALL_REDUCE: usize = 1;
const REDUCE_SCATTER: usize = 2;
const ALL_GATHER: usize = 3;
const BROADCAST: usize = 4;

/// Elements from which every rank sums only its part of a message and passes the result on (two exchanges), instead of all
/// ranks summing all of it (one exchange).
const TWO_SHOT_FROM: usize = 4096;

/// Parts of `0..length` of `step` elements; one empty part when there is nothing, so that ranks still meet.
fn parts(length: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length.div_ceil(step).max(1)).map(move |i| i * step..length.min((i + 1) * step))
}

/// Words that `length` elements take.
fn words<E: Element>(length: usize) -> usize {
    length.div_ceil(E::PER_WORD)
}

/// Part `rank` of `world_size` equal parts of `length` elements, cut at multiples of 16.
fn even_share(length: usize, rank: usize, world_size: usize) -> Range<usize> {
    let share = length.div_ceil(world_size).next_multiple_of(16);
    (rank * share).min(length)..((rank + 1) * share).min(length)
}

/// Range of each rank's share in the whole.
fn share_ranges(counts: &[usize]) -> impl Iterator<Item = Range<usize>> {
    counts.iter().scan(0, |at, &count| {
        let start = *at;
        *at += count;
        Some(start..*at)
    })
}

/// FNV-1a.
fn hash(counts: &[usize]) -> u32 {
    counts
        .iter()
        .flat_map(|count| count.to_le_bytes())
        .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

impl<M: AsRef<[AtomicU32]>, P: Peers> Group<M, P> {
    fn all_reduce_of<E: Element>(&self, values: &mut [E]) -> Result<()> {
        let call =
            Call { operation: ALL_REDUCE, element: E::CODE, root: 0, elements: values.len(), counts_hash: 0 };
        let mut exchanges = self.begin(call)?;
        for part in parts(values.len(), self.slot_elements(E::PER_WORD)) {
            let values = &mut values[part];
            store(exchanges.outgoing(), values);
            exchanges.exchange(words::<E>(values.len()))?;
            if values.len() < TWO_SHOT_FROM || self.world_size() == 1 {
                sum(exchanges.all_incoming(), 0, values);
                continue;
            }
            let length = values.len();
            let share = |rank| even_share(length, rank, self.world_size());
            let own = share(self.rank());
            let mut sums = vec![E::default(); own.len()];
            sum(exchanges.all_incoming(), own.start, &mut sums);
            store(exchanges.outgoing(), &sums);
            exchanges.exchange(words::<E>(sums.len()))?;
            for rank in 0..self.world_size() {
                let range = share(rank);
                load(exchanges.incoming(rank), 0, &mut values[range]);
            }
        }
        Ok(())
    }

    fn reduce_scatter_of<E: Element>(&self, input: &[E], counts: &[usize], output: &mut [E]) -> Result<()> {
        let call = Call {
            operation: REDUCE_SCATTER,
            element: E::CODE,
            root: 0,
            elements: input.len(),
            counts_hash: hash(counts),
        };
        let own = share_ranges(counts).nth(self.rank()).unwrap_or_default();
        let mut exchanges = self.begin(call)?;
        for part in parts(input.len(), self.slot_elements(E::PER_WORD)) {
            store(exchanges.outgoing(), &input[part.clone()]);
            exchanges.exchange(words::<E>(part.len()))?;
            let (start, end) = (own.start.max(part.start), own.end.min(part.end));
            if start < end {
                sum(
                    exchanges.all_incoming(),
                    start - part.start,
                    &mut output[start - own.start..end - own.start],
                );
            }
        }
        Ok(())
    }

    fn all_gather_of<E: Element>(&self, input: &[E], counts: &[usize], output: &mut [E]) -> Result<()> {
        let call = Call {
            operation: ALL_GATHER,
            element: E::CODE,
            root: 0,
            elements: output.len(),
            counts_hash: hash(counts),
        };
        let longest = counts.iter().copied().max().unwrap_or(0);
        let mut exchanges = self.begin(call)?;
        for part in parts(longest, self.slot_elements(E::PER_WORD)) {
            let cut = |length: usize| part.start.min(length)..part.end.min(length);
            let own = &input[cut(input.len())];
            store(exchanges.outgoing(), own);
            exchanges.exchange(words::<E>(own.len()))?;
            for (rank, whole) in share_ranges(counts).enumerate() {
                let part = cut(whole.len());
                load(
                    exchanges.incoming(rank),
                    0,
                    &mut output[whole.start + part.start..whole.start + part.end],
                );
            }
        }
        Ok(())
    }

    fn broadcast_of<E: Element>(&self, root: usize, values: &mut [E]) -> Result<()> {
        if root >= self.world_size() {
            let detail = format!("root {root} in a group of {}", self.world_size());
            return Err(CollectiveError::Misuse { op: "broadcast", detail });
        }
        let call =
            Call { operation: BROADCAST, element: E::CODE, root, elements: values.len(), counts_hash: 0 };
        let mut exchanges = self.begin(call)?;
        for part in parts(values.len(), self.slot_elements(E::PER_WORD)) {
            let values = &mut values[part];
            let own = if self.rank() == root { &*values } else { &[] };
            store(exchanges.outgoing(), own);
            exchanges.exchange(words::<E>(own.len()))?;
            if self.rank() != root {
                load(exchanges.incoming(root), 0, values);
            }
        }
        Ok(())
    }

    fn mixed(op: &'static str, a: Values<'_>, b: Values<'_>) -> Result<()> {
        let detail = format!("{} and {} in one call", a.element(), b.element());
        Err(CollectiveError::Misuse { op, detail })
    }
}

impl<M: AsRef<[AtomicU32]> + Send + Sync, P: Peers> Collective for Group<M, P> {
    fn rank(&self) -> usize {
        Group::rank(self)
    }

    fn world_size(&self) -> usize {
        Group::world_size(self)
    }

    fn all_reduce(&self, values: ValuesMut<'_>) -> Result<()> {
        match values {
            ValuesMut::F32(values) => self.all_reduce_of(values),
            ValuesMut::Bf16(values) => self.all_reduce_of(values),
            ValuesMut::F16(values) => self.all_reduce_of(values),
            ValuesMut::I32(values) => self.all_reduce_of(values),
        }
    }

    fn reduce_scatter(&self, input: Values<'_>, counts: &[usize], output: ValuesMut<'_>) -> Result<()> {
        const OP: &str = "reduce_scatter";
        check_shares(OP, (Group::rank(self), Group::world_size(self)), counts, input, output.as_values())?;
        match (input, output) {
            (Values::F32(input), ValuesMut::F32(output)) => self.reduce_scatter_of(input, counts, output),
            (Values::Bf16(input), ValuesMut::Bf16(output)) => self.reduce_scatter_of(input, counts, output),
            (Values::F16(input), ValuesMut::F16(output)) => self.reduce_scatter_of(input, counts, output),
            (Values::I32(input), ValuesMut::I32(output)) => self.reduce_scatter_of(input, counts, output),
            (input, output) => Self::mixed(OP, input, output.as_values()),
        }
    }

    fn all_gather(&self, input: Values<'_>, counts: &[usize], output: ValuesMut<'_>) -> Result<()> {
        const OP: &str = "all_gather";
        check_shares(OP, (Group::rank(self), Group::world_size(self)), counts, output.as_values(), input)?;
        match (input, output) {
            (Values::F32(input), ValuesMut::F32(output)) => self.all_gather_of(input, counts, output),
            (Values::Bf16(input), ValuesMut::Bf16(output)) => self.all_gather_of(input, counts, output),
            (Values::F16(input), ValuesMut::F16(output)) => self.all_gather_of(input, counts, output),
            (Values::I32(input), ValuesMut::I32(output)) => self.all_gather_of(input, counts, output),
            (input, output) => Self::mixed(OP, input, output.as_values()),
        }
    }

    fn broadcast(&self, root: usize, values: ValuesMut<'_>) -> Result<()> {
        match values {
            ValuesMut::F32(values) => self.broadcast_of(root, values),
            ValuesMut::Bf16(values) => self.broadcast_of(root, values),
            ValuesMut::F16(values) => self.broadcast_of(root, values),
            ValuesMut::I32(values) => self.broadcast_of(root, values),
        }
    }

    fn barrier(&self) -> Result<()> {
        let call = Call { operation: BARRIER, element: 0, root: 0, elements: 0, counts_hash: 0 };
        self.begin(call)?.exchange(0)
    }

    fn check(&self) -> Result<()> {
        Group::check(self)
    }

    fn abort(&self, message: &str) {
        Group::abort(self, message);
    }
}

/// Implements [`Collective`] for a newtype of [`Group`].
macro_rules! delegate {
    ($rank:ty) => {
        impl Collective for $rank {
            fn rank(&self) -> usize {
                Collective::rank(&self.0)
            }
            fn world_size(&self) -> usize {
                Collective::world_size(&self.0)
            }
            fn all_reduce(&self, values: ValuesMut<'_>) -> Result<(), CollectiveError> {
                self.0.all_reduce(values)
            }
            fn reduce_scatter(
                &self,
                input: Values<'_>,
                counts: &[usize],
                output: ValuesMut<'_>,
            ) -> Result<(), CollectiveError> {
                self.0.reduce_scatter(input, counts, output)
            }
            fn all_gather(
                &self,
                input: Values<'_>,
                counts: &[usize],
                output: ValuesMut<'_>,
            ) -> Result<(), CollectiveError> {
                self.0.all_gather(input, counts, output)
            }
            fn broadcast(&self, root: usize, values: ValuesMut<'_>) -> Result<(), CollectiveError> {
                self.0.broadcast(root, values)
            }
            fn barrier(&self) -> Result<(), CollectiveError> {
                self.0.barrier()
            }
            fn check(&self) -> Result<(), CollectiveError> {
                Collective::check(&self.0)
            }
            fn abort(&self, message: &str) {
                Collective::abort(&self.0, message);
            }
        }
    };
}
pub(crate) use delegate;

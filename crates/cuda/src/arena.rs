//! Memory of a step's tensors.
//!
//! One allocation, taken at start. A tensor takes the lowest range that fits and gives it back when the last handle to it is
//! dropped, so the peak is what is live at once (one layer's temporaries and the residual stream), a step allocates nothing
//! from the driver, and equal sequences of ops get equal addresses, which is what makes recorded launches replayable.
//! Handing a range on at once is safe because all work is ordered on one stream.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::driver::{DevicePtr, Driver, Memory};
use crate::{CudaError, Result};

const ALIGNMENT: usize = 256;

/// See the module's documentation. Cloning shares it.
#[derive(Clone)]
pub struct Arena {
    inner: Arc<Inner>,
}

struct Inner {
    driver: Arc<dyn Driver>,
    memory: Memory,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Free ranges, offset to length.
    free: BTreeMap<usize, usize>,
    used: usize,
    peak: usize,
    /// The first red zone found damaged; reported by the next allocation.
    damage: Option<CudaError>,
}

/// A range of the arena; free again when dropped.
pub struct Range {
    inner: Arc<Inner>,
    offset: usize,
    taken: usize,
    bytes: usize,
    label: &'static str,
}

impl Arena {
    /// Takes `bytes` from `driver`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        let memory = Memory::new(driver, bytes, "step arena")?;
        let state = State { free: BTreeMap::from([(0, bytes)]), ..State::default() };
        Ok(Self { inner: Arc::new(Inner { driver: driver.clone(), memory, state: Mutex::new(state) }) })
    }

    /// Takes a range of `bytes`. `label` names the op it is for.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] when nothing that large is free; (emulated) an earlier op that wrote beyond its tensor.
    pub fn take(&self, bytes: usize, label: &'static str) -> Result<Range> {
        let taken = (bytes.max(1) + self.inner.driver.red_zone_bytes()).next_multiple_of(ALIGNMENT);
        let mut state = self.inner.lock();
        if let Some(damage) = state.damage.take() {
            return Err(damage);
        }
        let found = state.free.iter().find(|&(_, &length)| length >= taken).map(|(&o, &l)| (o, l));
        let Some((offset, length)) = found else {
            return Err(CudaError::OutOfMemory {
                what: format!("{label} in the step arena of {} bytes", self.inner.memory.bytes()),
                bytes: bytes as u64,
                available: (self.inner.memory.bytes() - state.used) as u64,
            });
        };
        state.free.remove(&offset);
        if length > taken {
            state.free.insert(offset + taken, length - taken);
        }
        state.used += taken;
        state.peak = state.peak.max(state.used);
        drop(state);
        let range = Range { inner: self.inner.clone(), offset, taken, bytes, label };
        self.inner.driver.poison(range.address(), bytes);
        Ok(range)
    }

    /// Most bytes that were in use at once.
    pub fn peak(&self) -> usize {
        self.inner.lock().peak
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.inner.lock().used
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Range {
    /// Where it is.
    pub fn address(&self) -> DevicePtr {
        self.inner.memory.address().offset(self.offset)
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        let damage = self.inner.driver.check_red_zone(self.address(), self.bytes, self.label).err();
        let mut state = self.inner.lock();
        if state.damage.is_none() {
            state.damage = damage;
        }
        state.used -= self.taken;
        let (mut offset, mut length) = (self.offset, self.taken);
        if let Some(after) = state.free.remove(&(offset + length)) {
            length += after;
        }
        let before = state.free.range(..offset).next_back().map(|(&o, &l)| (o, l));
        if let Some((start, before)) = before
            && start + before == offset
        {
            state.free.remove(&start);
            offset = start;
            length += before;
        }
        state.free.insert(offset, length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Emulated, EmulatedOptions};

    fn arena(bytes: usize) -> Arena {
        let driver: Arc<dyn Driver> = Arc::new(Emulated::new(EmulatedOptions::default()).unwrap());
        Arena::new(&driver, bytes).unwrap()
    }

    #[test]
    fn equal_sequences_get_equal_addresses() {
        let arena = arena(1 << 16);
        let run = || {
            let a = arena.take(1000, "a").unwrap();
            let b = arena.take(2000, "b").unwrap();
            drop(a);
            let c = arena.take(500, "c").unwrap();
            [b.address(), c.address()]
        };
        assert_eq!(run(), run());
        assert_eq!(arena.used(), 0);
    }

    #[test]
    fn freed_neighbours_merge() {
        let arena = arena(4096);
        let ranges: Vec<_> = (0..4).map(|_| arena.take(512, "part").unwrap()).collect();
        assert!(arena.take(3000, "whole").is_err());
        let mut ranges = ranges.into_iter();
        let (a, b) = (ranges.next(), ranges.next());
        drop(a);
        drop(ranges);
        drop(b);
        arena.take(3000, "whole").unwrap();
    }

    #[test]
    fn a_write_beyond_a_tensor_is_reported() {
        let arena = arena(4096);
        let range = arena.take(100, "guilty").unwrap();
        arena.inner.driver.fill(range.address(), 1, 101).unwrap();
        drop(range);
        let error = arena.take(1, "next").err().unwrap().to_string();
        assert!(error.contains("guilty") && error.contains("byte 100"), "{error}");
    }
}

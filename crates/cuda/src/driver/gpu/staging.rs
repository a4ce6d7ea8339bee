//! Copies between pageable host memory and the device through page-locked memory.

use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Event, Pinned, Stream};
use super::status::{Blame, Status};
use crate::Result;
use crate::driver::DevicePtr;

/// Bytes of one slot: a copy this long is at the bus' full speed.
pub(super) const SLOT_BYTES: usize = 8 << 20;
/// Slots of the ring: the host fills one while others are on their way.
const SLOTS: usize = 4;

/// Uploads: a ring of slots. Small uploads share a slot; a slot is filled again once the stream has passed its copies, so
/// the source of an upload may be reused at once and the host waits only when it is a whole ring ahead.
pub(super) struct Uploads {
    stream: Arc<Stream>,
    slots: Vec<Slot>,
    current: usize,
    /// Bytes of the current slot that are taken.
    filled: usize,
}

struct Slot {
    memory: Pinned,
    /// Behind the slot's last copy.
    passed: Event,
}

impl Uploads {
    /// Takes the ring's memory.
    ///
    /// # Errors
    /// No page-locked memory.
    pub fn new(stream: &Arc<Stream>) -> Result<Self> {
        let slots = (0..SLOTS)
            .map(|_| {
                Ok(Slot { memory: Pinned::new(stream, SLOT_BYTES)?, passed: Event::new(stream, false)? })
            })
            .collect::<Result<_>>()?;
        Ok(Self { stream: stream.clone(), slots, current: 0, filled: 0 })
    }

    /// Queues a copy of `source` to `destination`.
    ///
    /// # Errors
    /// Through `blame` the driver's and those of earlier work.
    pub fn copy(&mut self, destination: DevicePtr, source: &[u8], blame: Blame<'_>) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = source.get(done..).filter(|rest| !rest.is_empty()) {
            // What fits a slot is one copy.
            let room = SLOT_BYTES - self.filled;
            if room == 0 || (rest.len() > room && rest.len() <= SLOT_BYTES) {
                self.next_slot(blame)?;
            }
            let Some(slot) = self.slots.get(self.current) else { return Ok(()) };
            let bytes = rest.len().min(slot.memory.bytes() - self.filled);
            let target = destination.offset(done);
            // SAFETY: `filled + bytes` is within the slot, and no copy in flight reads there; the caller owns
            // `source.len()` bytes at `destination`.
            unsafe {
                let staged = slot.memory.as_ptr().add(self.filled);
                std::ptr::copy_nonoverlapping(rest.as_ptr(), staged, bytes);
                let result = sys::cuMemcpyHtoDAsync_v2(target.0, staged.cast(), bytes, self.stream.raw());
                Status::of(result).map_err(|status| blame("upload", status))?;
            }
            // Copies stay aligned as their sources in pageable memory usually are.
            self.filled = (self.filled + bytes).next_multiple_of(64).min(SLOT_BYTES);
            done += bytes;
        }
        Ok(())
    }

    fn next_slot(&mut self, blame: Blame<'_>) -> Result<()> {
        if let Some(slot) = self.slots.get(self.current) {
            slot.passed.record()?;
        }
        self.current = (self.current + 1) % self.slots.len().max(1);
        self.filled = 0;
        match self.slots.get(self.current) {
            Some(slot) => slot.passed.wait().map_err(|status| blame("upload", status)),
            None => Ok(()),
        }
    }
}

/// Downloads: each waits for the stream.
pub(super) struct Downloads {
    stream: Arc<Stream>,
    memory: Pinned,
}

impl Downloads {
    /// Takes the buffer.
    ///
    /// # Errors
    /// No page-locked memory.
    pub fn new(stream: &Arc<Stream>) -> Result<Self> {
        Ok(Self { stream: stream.clone(), memory: Pinned::new(stream, SLOT_BYTES)? })
    }

    /// Waits for the stream and copies device memory to `destination`.
    ///
    /// # Errors
    /// Through `blame` the driver's and those of earlier work.
    pub fn copy(&mut self, source: DevicePtr, destination: &mut [u8], blame: Blame<'_>) -> Result<()> {
        for (index, chunk) in destination.chunks_mut(self.memory.bytes()).enumerate() {
            let from = source.offset(index * self.memory.bytes());
            let staged = self.memory.as_ptr();
            // SAFETY: the buffer holds a chunk; the caller owns `destination.len()` bytes at `source`.
            let result =
                unsafe { sys::cuMemcpyDtoHAsync_v2(staged.cast(), from.0, chunk.len(), self.stream.raw()) };
            Status::of(result).map_err(|status| blame("download", status))?;
            self.stream.wait().map_err(|status| blame("download", status))?;
            // SAFETY: the copy has ended, so the buffer's first `chunk.len()` bytes are written and nobody writes them.
            unsafe { std::ptr::copy_nonoverlapping(staged, chunk.as_mut_ptr(), chunk.len()) };
        }
        Ok(())
    }
}

//! Shared memory as a slice of atomics. The only module with `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU32;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{SealFlags, fcntl_get_seals};

/// A mapped file whose length cannot change.
pub struct Mapping {
    map: MmapRaw,
    words: usize,
}

impl Mapping {
    /// Maps all of `file`, which must be sealed against shrinking and growing: memory that a peer could cut off would kill
    /// this process on the next access.
    ///
    /// # Errors
    /// No seals, or the system's.
    pub fn new(file: &File) -> io::Result<Self> {
        if !fcntl_get_seals(file)?.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not sealed against changes of its length, so it is not the memory of a group",
            ));
        }
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let map = MmapOptions::new().len(bytes).map_raw(file)?;
        Ok(Self { map, words: bytes / 4 })
    }
}

impl AsRef<[AtomicU32]> for Mapping {
    fn as_ref(&self) -> &[AtomicU32] {
        // SAFETY: the map is aligned to pages, holds `words * 4` bytes for as long as `self` lives, and the seals keep
        // the file behind it as long as it is. Any bits are an `AtomicU32`, and no process has the memory otherwise than
        // through atomics of this size.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast::<AtomicU32>(), self.words) }
    }
}

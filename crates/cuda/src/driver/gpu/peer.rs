//! What devices of one process share: each other's memory, and words of the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::{self, CUcontext};

use super::context::{Pinned, Stream};
use super::status::{Status, check};
use crate::Result;
use crate::driver::{DevicePtr, HostWord, PeerHandle};

/// Maps the memory of `peer` into the context of `stream`. With unified addressing it has the same addresses here (CUDA Driver
/// API, "Peer Context Memory Access").
///
/// # Errors
/// The driver's.
pub(super) fn map(stream: &Stream, peer: &PeerHandle) -> Result<bool> {
    let &PeerHandle::Gpu { context, device } = peer else { return Ok(false) };
    stream.bind()?;
    let mut possible = 0;
    // SAFETY: both devices came from the driver; `possible` is a live local.
    check("cuDeviceCanAccessPeer", unsafe {
        sys::cuDeviceCanAccessPeer(&mut possible, stream.device(), device)
    })?;
    if possible == 0 {
        return Ok(false);
    }
    // SAFETY: the context is retained as long as the peer's driver lives, which the caller holds; flags must be 0.
    match Status::of(unsafe { sys::cuCtxEnablePeerAccess(context as CUcontext, 0) }) {
        Ok(()) => Ok(true),
        Err(Status::PEER_ACCESS_ALREADY_ENABLED) => Ok(true),
        // Devices have a limited number of peers.
        Err(Status::TOO_MANY_PEERS) => Ok(false),
        Err(status) => Err(status.error("cuCtxEnablePeerAccess")),
    }
}

/// A word of page-locked memory: with unified addressing every device reads it at the host's address (CUDA Driver API,
/// "Unified Addressing").
pub(super) struct Word(Pinned);

// SAFETY: the memory is only accessed atomically.
unsafe impl Sync for Word {}

impl Word {
    /// Takes a word, zero. The caller has bound the context.
    ///
    /// # Errors
    /// No page-locked memory.
    pub fn new(stream: &Arc<Stream>) -> Result<Self> {
        let word = Self(Pinned::new(stream, size_of::<u32>())?);
        word.set(0);
        Ok(word)
    }
}

impl HostWord for Word {
    fn address(&self) -> DevicePtr {
        DevicePtr(self.0.as_ptr() as u64)
    }

    fn set(&self, value: u32) {
        // SAFETY: page-aligned memory of four bytes that lives as long as `self`; kernels only read it.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().cast()) }.store(value, Ordering::Release);
    }
}

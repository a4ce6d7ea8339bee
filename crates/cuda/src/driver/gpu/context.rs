//! The primary context of a device, its one stream, and page-locked memory: what every other part of the driver stands on.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUevent, CUstream};

use super::status::{Status, check};
use crate::driver::PeerHandle;
use crate::{CudaError, Result};

/// The primary context of a device and one stream on it. Both end with the last handle.
pub(super) struct Stream {
    device: CUdevice,
    context: CUcontext,
    stream: CUstream,
}

// SAFETY: CUDA handles may be used from any thread; a thread that calls binds the context first.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks the stream itself.
unsafe impl Sync for Stream {}

impl Stream {
    /// Retains the primary context of `device` and creates a stream that does not wait for the default one.
    ///
    /// # Errors
    /// The driver's, as [`CudaError::OutOfMemory`] when others fill the device.
    pub fn new(device: CUdevice) -> Result<Arc<Self>> {
        let mut context = std::ptr::null_mut();
        // SAFETY: the device came from the driver; `context` is a live local.
        check("creating the CUDA context", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let mut this = Self { device, context, stream: std::ptr::null_mut() };
        this.bind()?;
        // SAFETY: the context is current; `this.stream` is live. CU_STREAM_NON_BLOCKING = 1.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut this.stream, 1) })?;
        Ok(Arc::new(this))
    }

    /// Makes the context current on the calling thread.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// The context and device, for another device that maps this one's memory.
    pub fn peer_handle(&self) -> PeerHandle {
        PeerHandle::Gpu { context: self.context as usize, device: self.device }
    }

    /// The driver's number of the device.
    pub fn device(&self) -> CUdevice {
        self.device
    }

    /// The stream.
    pub fn raw(&self) -> CUstream {
        self.stream
    }

    /// Waits for all work of the stream. The status is that of the work.
    pub fn wait(&self) -> std::result::Result<(), Status> {
        // SAFETY: the stream lives as long as `self`.
        Status::of(unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; after a sticky error all of these fail.
        let _ = self.bind();
        // SAFETY: created by `new`, used by nobody any more.
        unsafe {
            if !self.stream.is_null() {
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A point in the stream.
pub(super) struct Event {
    stream: Arc<Stream>,
    event: CUevent,
}

// SAFETY: as for `Stream`.
unsafe impl Send for Event {}

impl Event {
    /// A new event; with `timed`, one that [`Event::milliseconds_until`] takes.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(stream: &Arc<Stream>, timed: bool) -> Result<Self> {
        /// CU_EVENT_DISABLE_TIMING
        const DISABLE_TIMING: u32 = 2;
        let mut event = std::ptr::null_mut();
        // SAFETY: `event` is a live local; the caller has bound the context.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&mut event, if timed { 0 } else { DISABLE_TIMING })
        })?;
        Ok(Self { stream: stream.clone(), event })
    }

    /// Marks this point in the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self) -> Result<()> {
        // SAFETY: both handles live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, self.stream.raw()) })
    }

    /// Waits until the stream has passed the point; returns at once if none was ever marked.
    pub fn wait(&self) -> std::result::Result<(), Status> {
        // SAFETY: the handle lives.
        Status::of(unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// Time from this point to a later one; both must have been passed.
    ///
    /// # Errors
    /// The driver's.
    pub fn milliseconds_until(&self, later: &Event) -> Result<f32> {
        let mut milliseconds = 0f32;
        // SAFETY: both handles live; `milliseconds` is a live local.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime_v2(&mut milliseconds, self.event, later.event)
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.stream.bind();
        // SAFETY: created by `new`, used by nobody any more.
        let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}

/// Page-locked host memory: copies from and to it run beside the host.
pub(super) struct Pinned {
    stream: Arc<Stream>,
    memory: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory owned by this value; the context is bound before it is freed.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Takes `bytes`.
    ///
    /// # Errors
    /// The driver's; [`CudaError::OutOfMemory`] is about host memory.
    pub fn new(stream: &Arc<Stream>, bytes: usize) -> Result<Self> {
        let mut memory: *mut c_void = std::ptr::null_mut();
        // SAFETY: `memory` is a live local; the caller has bound the context.
        let result = unsafe { sys::cuMemHostAlloc(&mut memory, bytes, 0) };
        Status::of(result).map_err(|status| match status {
            Status::OUT_OF_MEMORY => CudaError::OutOfMemory {
                what: "page-locked host memory (see ulimit -l)".into(),
                bytes: bytes as u64,
                available: 0,
            },
            other => other.error("cuMemHostAlloc"),
        })?;
        let memory = NonNull::new(memory.cast()).ok_or_else(|| CudaError::Call {
            call: "cuMemHostAlloc".into(),
            message: "returned no memory".into(),
        })?;
        Ok(Self { stream: stream.clone(), memory, bytes })
    }

    /// Start of the memory.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.stream.bind();
        // SAFETY: taken by `new`; the owner has waited for the copies that use it.
        let _ = unsafe { sys::cuMemFreeHost(self.memory.as_ptr().cast()) };
    }
}

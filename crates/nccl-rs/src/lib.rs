//! A binding to NVIDIA's NCCL, loaded at run time.
//!
//! [`Library::load`] finds `libnccl.so.2`; nothing is linked, so a program with this crate starts on a machine without NCCL
//! and says what is missing. Communicators are **non-blocking**: no call waits inside the library. This crate polls the
//! communicator's state instead, gives up at a deadline, and aborts a communicator that failed (NCCL documentation,
//! "Fault Tolerance"); a watchdog on another thread can abort through [`AbortHandle`]. Dropping never panics and never
//! waits for a peer.
//!
//! Only what is called is declared. Streams and device addresses are raw handles: what they point to is the caller's.

mod communicator;
mod error;
mod ffi;
mod library;

pub use communicator::{AbortHandle, Communicator, Group, Options};
pub use error::{Error, ResultCode};
pub use ffi::UNIQUE_ID_BYTES;
pub use library::{LIBRARIES_VARIABLE, Library, UniqueId, Version, library_folders};

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct DeviceAddress(pub u64);

/// A CUDA stream (`cudaStream_t`, `CUstream`); 0 is the default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Stream(pub usize);

/// Element types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum DataType {
    /// 32-bit integer.
    I32 = 2,
    /// IEEE binary16.
    F16 = 6,
    /// IEEE binary32.
    F32 = 7,
    /// bfloat16.
    Bf16 = 9,
}

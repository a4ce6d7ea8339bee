use std::fmt;
use std::time::Duration;

use crate::Version;

/// What NCCL says of a call (`ncclResult_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultCode {
    /// A CUDA call failed.
    UnhandledCuda,
    /// A system call failed.
    System,
    /// A bug of NCCL, or memory that was overwritten.
    Internal,
    /// An argument that is wrong by itself.
    InvalidArgument,
    /// A call that does not fit those before it.
    InvalidUsage,
    /// A peer is gone.
    Remote,
    /// The library's own deadline.
    Timeout,
    /// A code this crate does not know.
    Other(i32),
}

impl ResultCode {
    pub(crate) fn new(code: i32) -> Self {
        match code {
            1 => ResultCode::UnhandledCuda,
            2 => ResultCode::System,
            3 => ResultCode::Internal,
            4 => ResultCode::InvalidArgument,
            5 => ResultCode::InvalidUsage,
            6 => ResultCode::Remote,
            8 => ResultCode::Timeout,
            other => ResultCode::Other(other),
        }
    }
}

/// What can fail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The library was not found, or could not be loaded.
    #[error(
        "NCCL (libnccl.so.2) was not found; install NVIDIA NCCL or name its folder in {}. Tried: {}",
        crate::LIBRARIES_VARIABLE,
        Attempts(attempts)
    )]
    NotFound {
        /// Each file tried, with the loader's reason.
        attempts: Vec<(String, String)>,
    },
    /// The library lacks a function.
    #[error("{library} has no function {symbol}; NCCL {} or newer is needed", Version::OLDEST)]
    Symbol {
        /// The library.
        library: String,
        /// The function.
        symbol: String,
    },
    /// The library is older than this crate supports.
    #[error("{library} is NCCL {found}; {} or newer is needed", Version::OLDEST)]
    TooOld {
        /// The library.
        library: String,
        /// Its version.
        found: Version,
    },
    /// NCCL reported an error. The communicator, if there is one, has been aborted.
    #[error("{call}: {message}{}{detail}", if detail.is_empty() { "" } else { "; " })]
    Call {
        /// The function.
        call: &'static str,
        /// NCCL's code.
        code: ResultCode,
        /// NCCL's words for the code.
        message: String,
        /// NCCL's last message, which names the cause, or nothing.
        detail: String,
    },
    /// A call was still in progress at the deadline. The communicator has been aborted.
    #[error("{call}: still in progress after {after:?}")]
    Timeout {
        /// The function.
        call: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The communicator was aborted, by [`crate::AbortHandle`] or by an earlier failure.
    #[error("{call}: the communicator has been aborted")]
    Aborted {
        /// The function that was not called.
        call: &'static str,
    },
    /// A call of another thread does not return from the library, so the communicator cannot be aborted: the process must
    /// end.
    #[error("a call of NCCL has not returned for {after:?}")]
    Stuck {
        /// How long was waited for it.
        after: Duration,
    },
    /// Arguments that contradict the communicator.
    #[error("{call}: {detail}")]
    Argument {
        /// The function.
        call: &'static str,
        /// What is wrong.
        detail: String,
    },
}

struct Attempts<'a>(&'a [(String, String)]);

impl fmt::Display for Attempts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (file, reason)) in self.0.iter().enumerate() {
            write!(f, "{}{file} ({reason})", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

use longhaul_backend::{CollectiveError, Error as BackendError};

/// What the device or its driver can fail with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// The device cannot be used at all; `message` ends with the remedy.
    #[error("{message}")]
    Unavailable {
        /// What is missing or wrong, and what to do.
        message: String,
    },
    /// Device memory could not be had.
    #[error("out of device memory: {what}{}; lower --max-model-len, or free the memory that others hold", amounts(*bytes, *available))]
    OutOfMemory {
        /// What was being allocated.
        what: String,
        /// Bytes asked for; 0 where only the driver knows.
        bytes: u64,
        /// Bytes that are free; 0 where that is not known.
        available: u64,
    },
    /// A driver call failed; the context is still usable.
    #[error("{call}: {message}")]
    Call {
        /// The call or kernel.
        call: String,
        /// The driver's message.
        message: String,
    },
    /// A kernel failed in a way that leaves the context unusable (illegal address, trap, uncorrectable memory error): the
    /// process must end and be started again.
    #[error("{kernel}: {message}; the device context is lost, restart the process")]
    Fatal {
        /// The kernel or call that reported it.
        kernel: String,
        /// The driver's message.
        message: String,
    },
    /// Operands that no kernel takes. A bug of the caller.
    #[error("{op}: {detail}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The shapes in words.
        detail: String,
    },
    /// Another rank failed or did not arrive.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Something that the device or this build cannot do.
    #[error("{0}")]
    Unsupported(String),
}

/// Result with [`CudaError`].
pub type Result<T> = std::result::Result<T, CudaError>;

impl CudaError {
    /// A shape error in words.
    pub fn shape(op: &'static str, detail: impl Into<String>) -> Self {
        CudaError::Shape { op, detail: detail.into() }
    }

    /// Whether the device context is lost, so that only a new process can go on.
    pub fn is_fatal(&self) -> bool {
        matches!(self, CudaError::Fatal { .. })
    }
}

fn amounts(bytes: u64, available: u64) -> String {
    match (bytes, available) {
        (0, _) => String::new(),
        (bytes, 0) => format!(" needs {bytes} bytes"),
        (bytes, available) => format!(" needs {bytes} bytes, {available} are free"),
    }
}

impl From<CudaError> for BackendError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::OutOfMemory { what, bytes, available: 0 } => BackendError::OutOfMemory { what, bytes },
            CudaError::OutOfMemory { what, bytes, available } => BackendError::OutOfMemory {
                what: format!("{what} ({available} bytes of the device are free)"),
                bytes,
            },
            CudaError::Shape { op, detail } => BackendError::Shape { op, detail },
            CudaError::Collective(error) => BackendError::Collective(error),
            CudaError::Fatal { .. } => BackendError::DeviceLost(error.to_string()),
            other => BackendError::Device { op: "cuda", message: other.to_string() },
        }
    }
}

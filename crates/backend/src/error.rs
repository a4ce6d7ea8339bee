use crate::{CollectiveError, DType, RowError};

/// What a device can fail with. The request path never panics: every misuse is one of these.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Operand shapes do not fit the op. A bug of the caller, reported with both shapes.
    #[error("{op}: {detail}")]
    Shape {
        /// Name of the [`crate::Backend`] op.
        op: &'static str,
        /// The shapes in words.
        detail: String,
    },
    /// The step plan contradicts itself or the KV pool (row counts, block ids, lengths).
    #[error("step inputs: {0}")]
    Step(String),
    /// KV blocks that cannot be copied, read or written as asked.
    #[error("KV blocks: {0}")]
    Blocks(String),
    /// A dtype that this device cannot hold or compute with.
    #[error("{op}: dtype {dtype} is not supported by this device")]
    UnsupportedDType {
        /// Name of the op.
        op: &'static str,
        /// The dtype asked for.
        dtype: DType,
    },
    /// Memory for weights, KV blocks or a step could not be had.
    #[error("out of memory: {what} needs {bytes} bytes; lower --max-model-len or use a smaller dtype")]
    OutOfMemory {
        /// What was being allocated.
        what: String,
        /// Bytes asked for.
        bytes: u64,
    },
    /// Loading a weight failed in the source that feeds the device.
    #[error("{0}")]
    Load(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A device library reported an error.
    #[error("{op}: {message}")]
    Device {
        /// Name of the op or call.
        op: &'static str,
        /// The library's own message.
        message: String,
    },
    /// The device context is lost (illegal address, trap, uncorrectable memory error): only a new process can go on.
    #[error("{0}")]
    DeviceLost(String),
    /// Another rank of the group failed, or did not arrive: only a new group can go on.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A row drew nothing.
    #[error(transparent)]
    Row(#[from] RowError),
    /// Sampling parameters that no device takes.
    #[error("row {row}: {detail}")]
    Sampling {
        /// Index into the rows handed to `sample`.
        row: usize,
        /// What is wrong.
        detail: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A shape error in words.
    pub fn shape(op: &'static str, detail: impl Into<String>) -> Self {
        Error::Shape { op, detail: detail.into() }
    }
}

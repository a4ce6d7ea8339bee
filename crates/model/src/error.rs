use longhaul_backend::Error as BackendError;
use longhaul_weights::WeightsError;

/// What can be wrong with a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A config file that is not JSON, or not an object.
    #[error("{origin}: {message}")]
    Json {
        /// The file.
        origin: String,
        /// What the parser says.
        message: String,
    },
    /// A field whose value cannot be used.
    #[error("{origin}: {field}: {message}")]
    Field {
        /// The file.
        origin: String,
        /// Path of the field, such as `rope_scaling.factor`.
        field: String,
        /// What was found, what is expected, what to do.
        message: String,
    },
    /// A context length or long-context mode that this model cannot serve.
    #[error("{0}")]
    Context(String),
    /// A model that cannot be dealt over so many ranks, or not in that way.
    #[error("{0}")]
    Shard(String),
    /// A tensor could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Result with this crate's [`ModelError`].
pub type Result<T> = std::result::Result<T, ModelError>;

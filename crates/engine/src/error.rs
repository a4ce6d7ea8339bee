use longhaul_backend::Error as BackendError;
use longhaul_model::ModelError;
use longhaul_nodes::NodesError;
use longhaul_text::TextError;
use longhaul_weights::WeightsError;

/// Why a model could not be loaded or a request not be answered.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A parameter of the request is out of range.
    #[error("{name}: {message}")]
    Parameter {
        /// Its name.
        name: &'static str,
        /// What was found and what is expected.
        message: String,
    },
    /// Prompt and output do not fit the context.
    #[error(
        "the prompt has {prompt} tokens and up to {max_tokens} are to be generated, but the context holds \
         {max_model_len}; shorten the prompt, lower --max-tokens, or raise --max-model-len"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens to generate.
        max_tokens: usize,
        /// Tokens that fit.
        max_model_len: usize,
    },
    /// A model without `tokenizer.json`.
    #[error("{model} has no tokenizer.json, so text cannot be encoded; pass token ids with --ids-file")]
    NoTokenizer {
        /// The model.
        model: String,
    },
    /// A model without a chat template.
    #[error("{model} has no chat_template in tokenizer_config.json; use generate with a plain prompt")]
    NoChatTemplate {
        /// The model.
        model: String,
    },
    /// A model name that is neither a directory, a hub id nor a family member.
    #[error("{0}")]
    UnknownModel(String),
    /// A file of the checkpoint could not be read.
    #[error("{path}: {message}")]
    File {
        /// The file.
        path: String,
        /// What failed, and the remedy.
        message: String,
    },
    /// A device that this build or machine does not have.
    #[error("--device {device}: {message}")]
    Device {
        /// As given.
        device: String,
        /// What is missing.
        message: String,
    },
    /// The model does not fit the device's memory.
    #[error("--device {device}: {message}")]
    Memory {
        /// As given.
        device: String,
        /// The budget, and the remedy.
        message: String,
    },
    /// A rank of a tensor-parallel group failed; the group has ended with it.
    #[error("rank {rank}: {source}")]
    Rank {
        /// The rank.
        rank: usize,
        /// What it failed with.
        source: Box<EngineError>,
    },
    /// The nodes of a group did not come together.
    #[error(transparent)]
    Nodes(#[from] NodesError),
    /// Config or forward pass.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Checkpoint files.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Tokenizer or template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl EngineError {
    /// The device's error, where it is one.
    pub(crate) fn of_backend(&self) -> Option<&BackendError> {
        match self {
            EngineError::Backend(error) | EngineError::Model(ModelError::Backend(error)) => Some(error),
            _ => None,
        }
    }
}

/// Result with this crate's [`EngineError`].
pub type Result<T> = std::result::Result<T, EngineError>;

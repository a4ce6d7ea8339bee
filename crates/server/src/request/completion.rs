//! `POST /v1/completions`.

use serde_json::{Value, json};

use crate::config::Limits;
use crate::error::{ApiError, ApiResult, describe};
use crate::request::sampling::prompt_ids;
use crate::request::{Common, Fields};
use crate::serving::ModelInfo;

/// What the API takes when a request does not say.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A prompt as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// To be tokenized; special tokens in it are special.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// The body of a completion request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CompletionRequest {
    pub(crate) model: Option<String>,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) max_tokens: usize,
    pub(crate) echo: bool,
    pub(crate) logprobs: Option<u32>,
    pub(crate) common: Common,
}

impl CompletionRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// The first field that is wrong or not supported.
    pub(crate) fn read(mut f: Fields, model: &ModelInfo, limits: &Limits) -> ApiResult<Self> {
        let request = Self {
            model: f.string("model")?,
            prompts: prompts(&mut f, model, limits)?,
            max_tokens: f.count("max_tokens", 0, i64::MAX)?.unwrap_or(DEFAULT_MAX_TOKENS),
            echo: f.boolean("echo")?.unwrap_or(false),
            logprobs: f
                .integer("logprobs", 0, model.max_logprobs.into())?
                .and_then(|n| u32::try_from(n).ok()),
            common: Common::read(&mut f, model, limits)?,
        };
        f.only("suffix", &[json!("")])?;
        // The family's tokenizers put nothing around a text, so both values mean the same.
        f.boolean("add_special_tokens")?;
        if request.max_tokens == 0 && !request.echo {
            return Err(f.error("max_tokens", "must be at least 1, or 0 with echo: true"));
        }
        if request.echo && request.common.stream && request.logprobs.is_some() {
            return Err(f.error("echo", "with logprobs is not available with stream: true"));
        }
        let sequences = request.prompts.len().saturating_mul(request.common.n as usize);
        if sequences > limits.prompts {
            let message = format!(
                "{} prompts times n = {} exceed {}",
                request.prompts.len(),
                request.common.n,
                limits.prompts
            );
            return Err(f.error("prompt", message));
        }
        f.end()?;
        Ok(request)
    }
}

fn prompts(f: &mut Fields, model: &ModelInfo, limits: &Limits) -> ApiResult<Vec<Prompt>> {
    let items = match f.take("prompt") {
        None => return Err(f.error("prompt", "is missing")),
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(items)) => items,
        Some(other) => {
            let message = format!(
                "must be a string, a list of strings, token ids, or a list of those, not {}",
                describe(&other)
            );
            return Err(f.error("prompt", message));
        }
    };
    if items.is_empty() {
        return Err(f.error("prompt", "is an empty list"));
    }
    let vocab = model.vocab_size;
    if items.iter().all(Value::is_number) {
        return Ok(vec![Prompt::Ids(prompt_ids(&items, vocab, "prompt")?)]);
    }
    if items.len() > limits.prompts {
        let message = format!("has {} prompts, at most {} are taken", items.len(), limits.prompts);
        return Err(f.error("prompt", message));
    }
    let prompt = |(index, item): (usize, Value)| match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) => Ok(Prompt::Ids(prompt_ids(&ids, vocab, &format!("prompt[{index}]"))?)),
        other => {
            let message = format!("must be a string or a list of token ids, not {}", describe(&other));
            Err(ApiError::field(format!("prompt[{index}]"), message))
        }
    };
    items.into_iter().enumerate().map(prompt).collect()
}

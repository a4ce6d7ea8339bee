//! From text to token ids, off the reactor: a bounded number of texts is tokenized at once.

use std::sync::Arc;

use longhaul_text::{Conversation, SpecialTokens, TextError};
use tokio::sync::Semaphore;

use crate::error::{ApiError, ApiResult};
use crate::request::Prompt;
use crate::serving::{ModelInfo, Serving};

/// Blocking work that a client's text causes.
#[derive(Clone)]
pub(crate) struct TextPool {
    permits: Arc<Semaphore>,
}

/// A prompt as the engine takes it.
#[derive(Debug, Clone)]
pub(crate) struct Encoded {
    pub(crate) ids: Arc<[u32]>,
    /// The prompt's text, for echoes.
    pub(crate) text: String,
}

impl TextPool {
    pub(crate) fn new(at_once: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(at_once.max(1))) }
    }

    /// Runs `work` on a thread for blocking work. A client that leaves meanwhile leaves the work to finish alone; its
    /// permit stays taken until then, so that leaving clients cannot pile up work.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> ApiResult<T> + Send + 'static,
    ) -> ApiResult<T> {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.map_err(|_| ApiError::draining())?;
        let task = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        task.await.unwrap_or_else(|_| Err(ApiError::internal("reading the request failed")))
    }
}

/// Encodes the prompts of a completion.
///
/// # Errors
/// A model without a tokenizer, and texts that cannot fit whatever they tokenize to.
pub(crate) fn encode_prompts(
    serving: &dyn Serving,
    prompts: Vec<Prompt>,
    truncate: Option<usize>,
    echo: bool,
) -> ApiResult<Vec<Encoded>> {
    let model = serving.model();
    let encode = |prompt| {
        let (mut ids, mut text) = match prompt {
            Prompt::Ids(ids) => (ids, None),
            Prompt::Text(text) => {
                check_length(model, text.len(), truncate)?;
                (tokenizer(model)?.encode(&text, SpecialTokens::Parse).map_err(text_error)?, Some(text))
            }
        };
        if let Some(most) = truncate
            && ids.len() > most
        {
            ids.drain(..ids.len() - most);
            text = None;
        }
        let text = match (echo, text) {
            (false, _) => String::new(),
            (true, Some(text)) => text,
            (true, None) => model.tokenizer.as_ref().map(|t| t.decode(&ids, false)).unwrap_or_default(),
        };
        Ok(Encoded { ids: ids.into(), text })
    };
    prompts.into_iter().map(encode).collect()
}

/// Renders and encodes a chat.
///
/// # Errors
/// A model without tokenizer or template, a template that refuses the messages, and chats that cannot fit.
pub(crate) fn encode_chat(
    model: &ModelInfo,
    conversation: &Conversation,
    truncate: Option<usize>,
) -> ApiResult<Encoded> {
    let template = model.template.as_ref().ok_or_else(|| {
        ApiError::bad_request("this model has no chat template; use /v1/completions with a whole prompt")
    })?;
    let mut ids = template.encode_conversation(tokenizer(model)?, conversation).map_err(text_error)?;
    if let Some(most) = truncate
        && ids.len() > most
    {
        ids.drain(..ids.len() - most);
    }
    Ok(Encoded { ids: ids.into(), text: String::new() })
}

/// Refuses a text that has more tokens than fit even if every token were the longest one: tokenizing it would be wasted.
fn check_length(model: &ModelInfo, bytes: usize, truncate: Option<usize>) -> ApiResult<()> {
    let least = bytes / model.longest_token.max(1);
    if truncate.is_none() && least > model.max_model_len { Err(too_long(model, least, true)) } else { Ok(()) }
}

/// Tokens left for the output.
///
/// # Errors
/// An empty prompt, and one that leaves no room for `wanted` (0 or 1) tokens.
pub(crate) fn room(model: &ModelInfo, prompt: usize, wanted: usize) -> ApiResult<usize> {
    if prompt == 0 {
        return Err(ApiError::field("prompt", "has no tokens"));
    }
    match model.max_model_len.checked_sub(prompt) {
        Some(room) if room >= wanted => Ok(room),
        _ => Err(too_long(model, prompt, false)),
    }
}

fn too_long(model: &ModelInfo, tokens: usize, at_least: bool) -> ApiError {
    let at_least = if at_least { "at least " } else { "" };
    let message = format!(
        "This model's maximum context length is {} tokens. However, your prompt contains {at_least}{tokens} input \
             tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input \
             prompt.",
        model.max_model_len
    );
    ApiError::bad_request(message).with_param("input_tokens")
}

/// The model's tokenizer.
///
/// # Errors
/// A model without one.
pub(crate) fn tokenizer(model: &ModelInfo) -> ApiResult<&longhaul_text::Tokenizer> {
    model
        .tokenizer
        .as_ref()
        .ok_or_else(|| ApiError::bad_request("this model has no tokenizer; send token ids as the prompt"))
}

/// What the text crate refuses. Where its message would name a file of the server, only the reason is told.
pub(crate) fn text_error(error: TextError) -> ApiError {
    match error {
        TextError::Template { message, .. } => ApiError::bad_request(format!("chat template: {message}")),
        TextError::TemplateLimit { message, .. } => {
            ApiError::bad_request(format!("chat template: {message}"))
        }
        TextError::TemplateTimeout { .. } => {
            ApiError::internal("the chat template took too long for this conversation")
        }
        TextError::Encode { message, .. } => {
            ApiError::bad_request(format!("the text cannot be tokenized: {message}"))
        }
        TextError::Stop { message, .. } => ApiError::field("stop", message),
        _ => ApiError::internal("the model's tokenizer failed"),
    }
}

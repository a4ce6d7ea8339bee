//! `POST /tokenize` and `POST /detokenize`.

use longhaul_text::Conversation;

use crate::config::Limits;
use crate::error::ApiResult;
use crate::request::{Fields, chat};
use crate::serving::ModelInfo;

/// What is tokenized.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum TokenizeSource {
    /// A text; special tokens in it are special.
    Text(String),
    /// A chat, through the template.
    Chat(Conversation),
}

/// The body of `/tokenize`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) source: TokenizeSource,
    pub(crate) return_token_strs: bool,
}

impl TokenizeRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// The first field that is wrong or not supported.
    pub(crate) fn read(mut f: Fields, limits: &Limits) -> ApiResult<Self> {
        let model = f.string("model")?;
        let return_token_strs = f.boolean("return_token_strs")?.unwrap_or(false);
        let source = if f.has("messages") {
            TokenizeSource::Chat(chat::conversation(&mut f, limits)?.0)
        } else {
            f.boolean("add_special_tokens")?;
            TokenizeSource::Text(f.required_string("prompt")?)
        };
        f.end()?;
        Ok(Self { model, source, return_token_strs })
    }
}

/// The body of `/detokenize`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DetokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Vec<u32>,
}

impl DetokenizeRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// The first field that is wrong or not supported.
    pub(crate) fn read(mut f: Fields, model: &ModelInfo) -> ApiResult<Self> {
        let name = f.string("model")?;
        if !f.has("tokens") {
            return Err(f.error("tokens", "is missing; a list of token ids is expected"));
        }
        // The body's size bounds the list.
        let tokens = f.ids("tokens", model.vocab_size, usize::MAX)?;
        f.end()?;
        Ok(Self { model: name, tokens })
    }
}

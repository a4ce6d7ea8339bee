//! What answers look like: whole bodies and chunks of streams.

mod chat;
mod completion;

pub(crate) use chat::ChatWriter;
pub(crate) use completion::{CompletionOptions, CompletionWriter};

use serde_json::{Map, Value, json};

use crate::choice::Piece;
use crate::pipeline::{Generation, Usage};
use crate::serving::{PromptToken, TokenScore};

/// What every answer of a request has in common.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Cached prompt tokens in the usage.
    pub(crate) details: bool,
}

impl Head {
    /// A body of kind `object` with `choices`.
    fn body(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        Map::from_iter([
            ("id".into(), json!(self.id)),
            ("object".into(), json!(object)),
            ("created".into(), json!(self.created)),
            ("model".into(), json!(self.model)),
            ("choices".into(), Value::Array(choices)),
        ])
    }

    fn chunk(&self, object: &str, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        let mut body = self.body(object, choices);
        if let Some(usage) = usage {
            body.insert("usage".into(), usage.json(self.details));
        }
        Value::Object(body)
    }

    /// The usage of a whole body: without details it says so.
    fn usage(&self, usage: Usage) -> Value {
        let mut json = usage.json(self.details);
        if let (false, Some(map)) = (self.details, json.as_object_mut()) {
            map.insert("prompt_tokens_details".into(), Value::Null);
        }
        json
    }
}

/// Turns updates into the chunks of a stream, or collects them into one body.
pub(crate) trait Writer: Send + 'static {
    /// Scores of prompt tokens, in order.
    fn prompt(&mut self, part: usize, tokens: Vec<PromptToken>);

    /// Chunks that precede the first one of a choice.
    fn opening(&mut self, choices: usize) -> Vec<Value>;

    /// The chunk of a piece.
    fn chunk(&mut self, index: usize, piece: Piece, token: Option<TokenScore>, usage: Option<Usage>)
    -> Value;

    /// The chunk with nothing but the usage.
    fn usage(&self, usage: Usage) -> Value;

    /// Keeps a piece for [`Writer::body`].
    fn keep(&mut self, index: usize, piece: Piece, token: Option<TokenScore>);

    /// The whole answer.
    fn body(&mut self, generation: &Generation) -> Value;
}

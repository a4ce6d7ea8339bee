//! Log probabilities in the two shapes of the API.

use longhaul_text::Tokenizer;
use serde_json::{Map, Value, json};

use crate::serving::{PromptToken, TokenScore};

/// What JSON has for minus infinity, as the rivals write it.
const LOWEST: f32 = -9999.0;

/// How tokens are written in log probabilities.
#[derive(Clone)]
pub(crate) struct TokenWriter {
    tokenizer: Option<Tokenizer>,
    as_ids: bool,
}

impl TokenWriter {
    /// `as_ids`: `token_id:17` instead of text, which no two tokens share.
    pub(crate) fn new(tokenizer: Option<Tokenizer>, as_ids: bool) -> Self {
        Self { tokenizer, as_ids }
    }

    /// The token as text; bytes that are no text become U+FFFD.
    pub(crate) fn text(&self, id: u32) -> String {
        match &self.tokenizer {
            Some(tokenizer) if !self.as_ids => {
                String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned()
            }
            _ => format!("token_id:{id}"),
        }
    }

    fn bytes(&self, id: u32) -> Value {
        match &self.tokenizer {
            Some(tokenizer) => json!(tokenizer.token_bytes(id).as_ref()),
            None => Value::Null,
        }
    }

    fn entry(&self, id: u32, logprob: f32) -> Map<String, Value> {
        Map::from_iter([
            ("token".into(), json!(self.text(id))),
            ("logprob".into(), json!(finite(logprob))),
            ("bytes".into(), self.bytes(id)),
        ])
    }

    /// An element of a chat's `logprobs.content`.
    pub(crate) fn chat(&self, score: &TokenScore) -> Value {
        let mut entry = self.entry(score.id, score.logprob);
        let top: Vec<Value> =
            score.top.iter().map(|(id, logprob)| Value::Object(self.entry(*id, *logprob))).collect();
        entry.insert("top_logprobs".into(), Value::Array(top));
        Value::Object(entry)
    }

    /// An element of `prompt_logprobs`: an object from ids to scores, with ranks.
    pub(crate) fn prompt(&self, token: &PromptToken) -> Value {
        let Some(score) = token else { return Value::Null };
        let entry = |id: u32, logprob: f32, rank: Value| json!({"logprob": finite(logprob), "rank": rank, "decoded_token": self.text(id)});
        let mut map = Map::new();
        for (index, (id, logprob)) in score.top.iter().enumerate() {
            map.insert(id.to_string(), entry(*id, *logprob, json!(index + 1)));
        }
        let own = score.id.to_string();
        if !map.contains_key(&own) {
            map.insert(own, entry(score.id, score.logprob, Value::Null));
        }
        Value::Object(map)
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOWEST }
}

/// The `logprobs` object of a completion, filled token by token.
#[derive(Default)]
pub(crate) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Value>,
    /// Characters of the tokens so far.
    offset: usize,
}

impl CompletionLogprobs {
    /// Adds a token. `id` is the token's where there is no score: the first of a prompt.
    pub(crate) fn push(&mut self, writer: &TokenWriter, id: u32, score: Option<&TokenScore>) {
        let token = writer.text(id);
        self.text_offset.push(self.offset);
        self.offset += token.chars().count();
        self.tokens.push(token);
        self.token_logprobs.push(score.map(|score| finite(score.logprob)));
        self.top_logprobs.push(match score {
            None => Value::Null,
            Some(score) => {
                let own = std::iter::once((writer.text(score.id), json!(finite(score.logprob))));
                let top = score.top.iter().map(|(id, logprob)| (writer.text(*id), json!(finite(*logprob))));
                Value::Object(own.chain(top).collect())
            }
        });
    }

    /// What was added since the last time.
    pub(crate) fn take(&mut self) -> Value {
        let next = Self { offset: self.offset, ..Self::default() };
        let Self { text_offset, token_logprobs, tokens, top_logprobs, .. } = std::mem::replace(self, next);
        json!({
            "text_offset": text_offset,
            "token_logprobs": token_logprobs,
            "tokens": tokens,
            "top_logprobs": top_logprobs,
        })
    }
}

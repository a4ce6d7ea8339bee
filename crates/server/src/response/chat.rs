use serde_json::{Map, Value, json};

use crate::choice::{CallPart, Ended, Piece};
use crate::logprobs::TokenWriter;
use crate::pipeline::{Generation, Usage};
use crate::response::{Head, Writer};
use crate::serving::{PromptToken, TokenScore};

/// Answers of `/v1/chat/completions`.
pub(crate) struct ChatWriter {
    pub(crate) head: Head,
    pub(crate) role: String,
    pub(crate) tokens: TokenWriter,
    pub(crate) logprobs: bool,
    /// Ids of the prompt, when token ids are to be returned.
    pub(crate) prompt_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<Vec<Value>>,
    kept: Vec<Kept>,
    calls: u64,
}

#[derive(Default)]
struct Kept {
    text: String,
    calls: Vec<Value>,
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    ended: Option<Ended>,
}

impl ChatWriter {
    pub(crate) fn new(
        head: Head,
        role: String,
        tokens: TokenWriter,
        logprobs: bool,
        prompt_logprobs: bool,
        prompt_ids: Option<Vec<u32>>,
    ) -> Self {
        let prompt_logprobs = prompt_logprobs.then(Vec::new);
        Self { head, role, tokens, logprobs, prompt_ids, prompt_logprobs, kept: Vec::new(), calls: 0 }
    }

    /// A call as it begins, or the next part of its arguments.
    fn call(&mut self, call: CallPart) -> Value {
        let Some(name) = call.name else {
            return json!({"index": call.index, "function": {"arguments": call.arguments}});
        };
        self.calls += 1;
        let id = format!("chatcmpl-tool-{}-{}", self.head.id.trim_start_matches("chatcmpl-"), self.calls);
        let function = json!({"name": name, "arguments": call.arguments});
        json!({"index": call.index, "id": id, "type": "function", "function": function})
    }

    fn scores(&self, token: Option<&TokenScore>) -> Value {
        match token {
            Some(score) if self.logprobs => json!({"content": [self.tokens.chat(score)]}),
            _ => Value::Null,
        }
    }
}

/// Adds the next part of a choice's calls.
fn keep_call(calls: &mut Vec<Value>, mut part: Value) {
    const ARGUMENTS: &str = "/function/arguments";
    if part.get("id").is_none() {
        let more = part.pointer(ARGUMENTS).and_then(Value::as_str).unwrap_or_default();
        if let Some(Value::String(whole)) = calls.last_mut().and_then(|call| call.pointer_mut(ARGUMENTS)) {
            whole.push_str(more);
        }
        return;
    }
    if let Some(map) = part.as_object_mut() {
        map.shift_remove("index");
    }
    calls.push(part);
}

const CHUNK: &str = "chat.completion.chunk";

impl Writer for ChatWriter {
    fn prompt(&mut self, _part: usize, tokens: Vec<PromptToken>) {
        if let Some(all) = &mut self.prompt_logprobs {
            all.extend(tokens.iter().map(|token| self.tokens.prompt(token)));
        }
    }

    fn opening(&mut self, choices: usize) -> Vec<Value> {
        let role = |index| {
            let delta = json!({"role": self.role, "content": ""});
            let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
            let mut chunk = self.head.chunk(CHUNK, vec![choice], None);
            if let (Some(ids), Some(map)) = (&self.prompt_ids, chunk.as_object_mut()) {
                map.insert("prompt_token_ids".into(), json!(ids));
            }
            chunk
        };
        (0..choices).map(role).collect()
    }

    fn chunk(
        &mut self,
        index: usize,
        piece: Piece,
        token: Option<TokenScore>,
        usage: Option<Usage>,
    ) -> Value {
        let mut delta = Map::new();
        if !piece.text.is_empty() || piece.calls.is_empty() {
            delta.insert("content".into(), json!(piece.text));
        }
        if !piece.calls.is_empty() {
            let calls = piece.calls.into_iter().map(|call| self.call(call)).collect();
            delta.insert("tool_calls".into(), Value::Array(calls));
        }
        let mut choice = Map::from_iter([
            ("index".into(), json!(index)),
            ("delta".into(), Value::Object(delta)),
            ("logprobs".into(), self.scores(token.as_ref())),
            ("finish_reason".into(), json!(piece.ended.as_ref().map(|ended| ended.finish_reason))),
        ]);
        if let Some(ended) = piece.ended {
            choice.insert("stop_reason".into(), ended.stop_reason);
        }
        if self.prompt_ids.is_some() {
            let ids: Vec<u32> = token.iter().map(|score| score.id).collect();
            choice.insert("token_ids".into(), json!(ids));
        }
        self.head.chunk(CHUNK, vec![Value::Object(choice)], usage)
    }

    fn usage(&self, usage: Usage) -> Value {
        self.head.chunk(CHUNK, Vec::new(), Some(usage))
    }

    fn keep(&mut self, index: usize, piece: Piece, token: Option<TokenScore>) {
        let parts: Vec<Value> = piece.calls.into_iter().map(|call| self.call(call)).collect();
        let score = token.as_ref().filter(|_| self.logprobs).map(|score| self.tokens.chat(score));
        if self.kept.len() <= index {
            self.kept.resize_with(index + 1, Kept::default);
        }
        let Some(kept) = self.kept.get_mut(index) else { return };
        kept.text.push_str(&piece.text);
        parts.into_iter().for_each(|part| keep_call(&mut kept.calls, part));
        kept.logprobs.extend(score);
        kept.ids.extend(token.map(|token| token.id));
        kept.ended = piece.ended.or(kept.ended.take());
    }

    fn body(&mut self, generation: &Generation) -> Value {
        let mut kept = std::mem::take(&mut self.kept);
        kept.resize_with(generation.choices(), Kept::default);
        let choice = |(index, kept): (usize, Kept)| {
            let content =
                if kept.text.is_empty() && !kept.calls.is_empty() { Value::Null } else { json!(kept.text) };
            let ended = kept.ended.unwrap_or(Ended { finish_reason: "stop", stop_reason: Value::Null });
            json!({
                "index": index,
                "message": {
                    "role": self.role,
                    "content": content,
                    "refusal": null,
                    "annotations": null,
                    "audio": null,
                    "function_call": null,
                    "tool_calls": kept.calls,
                },
                "logprobs": if self.logprobs { json!({"content": kept.logprobs}) } else { Value::Null },
                "finish_reason": ended.finish_reason,
                "stop_reason": ended.stop_reason,
                "token_ids": self.prompt_ids.as_ref().map(|_| kept.ids),
            })
        };
        let choices = kept.into_iter().enumerate().map(choice).collect();
        let mut body = self.head.body("chat.completion", choices);
        body.extend([
            ("service_tier".into(), Value::Null),
            ("system_fingerprint".into(), Value::Null),
            ("usage".into(), self.head.usage(generation.usage())),
            ("prompt_logprobs".into(), json!(self.prompt_logprobs.take())),
            ("prompt_token_ids".into(), json!(self.prompt_ids.take())),
            ("kv_transfer_params".into(), Value::Null),
        ]);
        Value::Object(body)
    }
}

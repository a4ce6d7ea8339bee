//! What a chat template is rendered over.

use serde_json::{Map, Value};

use crate::{Message, TextError};

/// Names of variables that a caller cannot set: what a template gets from the conversation, from the checkpoint, and the
/// options of Hugging Face's `apply_chat_template` that are none of a template's business.
pub const RESERVED_VARIABLES: [&str; 18] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "chat_template",
    "conversation",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "tokenizer_kwargs",
];

/// Messages with everything else that a template may look at.
///
/// Message, tool and document are the JSON objects of the OpenAI API, handed to the template as they are; `content` must be
/// a string or null. Tool-call arguments should be objects, as templates print them with `tojson`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// Objects with `role` and `content`, and for assistants `tool_calls`.
    pub messages: Vec<Value>,
    /// The tools that the model may call; none is the absence of tools.
    pub tools: Option<Vec<Value>>,
    /// Documents, for templates that know them.
    pub documents: Option<Vec<Value>>,
    /// Further variables of the template. A name of [`RESERVED_VARIABLES`] that the conversation itself sets is without
    /// effect here.
    pub variables: Map<String, Value>,
    /// End with the start of an assistant's turn.
    pub add_generation_prompt: bool,
    /// End within the last message, for the model to go on with it. Excludes `add_generation_prompt`.
    pub continue_final_message: bool,
}

impl Conversation {
    /// A conversation of plain messages.
    pub fn new(messages: &[Message], add_generation_prompt: bool) -> Self {
        let messages = messages.iter().map(|m| serde_json::json!({"role": m.role, "content": m.content}));
        Self { messages: messages.collect(), add_generation_prompt, ..Self::default() }
    }

    fn lists(&self) -> impl Iterator<Item = &Value> {
        let tools = self.tools.iter().flatten();
        self.messages.iter().chain(tools).chain(self.documents.iter().flatten())
    }

    /// Messages, tools and documents together.
    pub(crate) fn entries(&self) -> usize {
        self.lists().count()
    }

    /// Bytes of all texts, with a few for every value that is none.
    pub(crate) fn bytes(&self) -> usize {
        self.lists().chain(self.variables.values()).map(bytes).sum()
    }

    /// Hands every text to `visit`, keys of objects included.
    pub(crate) fn visit<'a>(&'a self, visit: &mut impl FnMut(&'a str)) {
        self.lists().chain(self.variables.values()).for_each(|value| each(value, visit));
    }

    /// The conversation with every text replaced, keys below the messages' own fields included.
    pub(crate) fn map(&self, replace: &impl Fn(&str) -> String) -> Self {
        let list = |items: &[Value]| items.iter().map(|item| map_fields(item, replace)).collect::<Vec<_>>();
        Self {
            messages: list(&self.messages),
            tools: self.tools.as_deref().map(list),
            documents: self.documents.as_deref().map(list),
            variables: self.variables.iter().map(|(k, v)| (k.clone(), map_all(v, replace))).collect(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
        }
    }

    /// `rendered` up to the end of the last message's content, when the conversation is to be continued there.
    pub(crate) fn cut(&self, mut rendered: String, origin: &str) -> Result<String, TextError> {
        if !self.continue_final_message {
            return Ok(rendered);
        }
        let content = self.messages.last().and_then(|m| m.get("content")?.as_str()).unwrap_or_default();
        let error = |message: &str| TextError::Template {
            origin: origin.to_owned(),
            line: None,
            message: format!("continue_final_message: {message}"),
        };
        let trimmed = content.trim();
        if trimmed.is_empty() {
            return Err(error("the last message has no text to continue"));
        }
        let start =
            rendered.rfind(trimmed).ok_or_else(|| error("the template changed the last message's text"))?;
        // Whitespace at the end of the text belongs to it where the template kept it.
        let kept = content.trim_start();
        let length =
            if rendered.get(start..).is_some_and(|rest| rest.starts_with(kept)) { kept } else { trimmed }
                .len();
        rendered.truncate(start + length);
        Ok(rendered)
    }
}

fn bytes(value: &Value) -> usize {
    const OTHER: usize = 8;
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(bytes).sum::<usize>() + OTHER,
        Value::Object(map) => map.iter().map(|(key, value)| key.len() + bytes(value)).sum::<usize>() + OTHER,
        _ => OTHER,
    }
}

fn each<'a>(value: &'a Value, visit: &mut impl FnMut(&'a str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| each(item, visit)),
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            visit(key);
            each(value, visit);
        }),
        _ => {}
    }
}

/// Replaces texts below `value`, but not the names of its own fields, by which templates find them.
fn map_fields(value: &Value, replace: &impl Fn(&str) -> String) -> Value {
    match value {
        Value::Object(map) => {
            Value::Object(map.iter().map(|(key, value)| (key.clone(), map_all(value, replace))).collect())
        }
        other => map_all(other, replace),
    }
}

fn map_all(value: &Value, replace: &impl Fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(replace(text)),
        Value::Array(items) => Value::Array(items.iter().map(|item| map_all(item, replace)).collect()),
        Value::Object(map) => {
            Value::Object(map.iter().map(|(k, v)| (replace(k), map_all(v, replace))).collect())
        }
        other => other.clone(),
    }
}

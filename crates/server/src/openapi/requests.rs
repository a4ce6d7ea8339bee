//! What the routes take, with the bounds that this server enforces.
//!
//! Lengths of strings count bytes where the schema can only count characters. What is a matter of several fields (`top_logprobs`
//! needs `logprobs`) is left to the answer, a 400 that says so.

use longhaul_text::RESERVED_VARIABLES;
use serde_json::{Map, Value, json};

use crate::config::Limits;
use crate::request::bounds;
use crate::serving::ModelInfo;

/// Every schema of a request.
pub(super) fn schemas(limits: &Limits, model: Option<&ModelInfo>) -> Map<String, Value> {
    let bounds = Bounds { limits, model };
    Map::from_iter([
        ("Chat".into(), bounds.chat()),
        ("Completion".into(), bounds.completion()),
        ("Tokenize".into(), bounds.tokenize()),
        ("Detokenize".into(), bounds.detokenize()),
    ])
}

struct Bounds<'a> {
    limits: &'a Limits,
    model: Option<&'a ModelInfo>,
}

/// An object with `fields`, of which `required` must be there, and no others.
fn object(fields: Value, required: &[&str]) -> Value {
    json!({"type": "object", "properties": fields, "required": required, "additionalProperties": false})
}

fn extend(fields: &mut Value, more: Value) {
    if let (Some(fields), Value::Object(more)) = (fields.as_object_mut(), more) {
        fields.extend(more);
    }
}

/// `null` is the same as leaving a field out.
fn or_null(mut schema: Value) -> Value {
    match schema.get_mut("type") {
        Some(Value::String(kind)) => {
            let kinds = json!([kind.as_str(), "null"]);
            extend(&mut schema, json!({"type": kinds}));
            schema
        }
        _ => json!({"anyOf": [schema, {"type": "null"}]}),
    }
}

fn boolean() -> Value {
    json!({"type": ["boolean", "null"]})
}

fn number(min: f64, max: f64) -> Value {
    json!({"type": ["number", "null"], "minimum": min, "maximum": max})
}

/// Above 0 as an f32.
fn above_zero(max: f32) -> Value {
    number(f64::from(f32::from_bits(1)), f64::from(max))
}

fn integer(min: i64, max: i64) -> Value {
    json!({"type": ["integer", "null"], "minimum": min, "maximum": max})
}

/// A count that is cut to what fits.
fn count(min: i64) -> Value {
    integer(min, i64::MAX)
}

fn label() -> Value {
    json!({"type": ["string", "null"], "maxLength": bounds::LABEL_BYTES})
}

/// A field that is known for one value, which means nothing.
fn only(values: Value) -> Value {
    let mut values = values.as_array().cloned().unwrap_or_default();
    values.push(Value::Null);
    json!({"enum": values})
}

fn text() -> Value {
    json!({"type": ["string", "null"]})
}

/// A JSON schema, or one as text.
fn schema() -> Value {
    json!({"type": ["object", "boolean", "string", "null"], "description": "A JSON schema, or one as text"})
}

fn choices() -> Value {
    json!({"type": ["array", "null"], "items": {"type": "string"}, "minItems": 1, "maxItems": bounds::CHOICES})
}

fn response_format() -> Value {
    let named = object(
        json!({
            "name": {"type": ["string", "null"], "maxLength": bounds::SCHEMA_NAME_BYTES},
            "description": {"type": ["string", "null"], "maxLength": bounds::SCHEMA_DESCRIPTION_BYTES},
            "strict": boolean(),
            "schema": {"type": ["object", "boolean"]},
        }),
        &["schema"],
    );
    json!({"anyOf": [
        object(json!({"type": {"enum": ["text", "json_object"]}}), &["type"]),
        object(json!({"type": {"const": "json_schema"}, "json_schema": named}), &["type", "json_schema"]),
        {"type": "null"},
    ]})
}

/// At most one of the forms; white space for JSON only.
fn structured_outputs() -> Value {
    let fields = json!({
        "json": schema(),
        "json_object": boolean(),
        "regex": text(),
        "grammar": text(),
        "choice": choices(),
        "disable_any_whitespace": boolean(),
        "whitespace_pattern": text(),
    });
    object(fields, &[])
}

impl Bounds<'_> {
    fn id(&self) -> Value {
        match self.model {
            Some(model) => json!({"type": "integer", "minimum": 0, "exclusiveMaximum": model.vocab_size}),
            None => json!({"type": "integer", "minimum": 0}),
        }
    }

    fn ids(&self, most: Option<usize>) -> Value {
        let mut list = json!({"type": "array", "items": self.id()});
        if let Some(most) = most {
            extend(&mut list, json!({"maxItems": most}));
        }
        list
    }

    /// Alternatives that log probabilities are reported for.
    fn alternatives(&self) -> Value {
        integer(0, self.model.map_or(i64::MAX, |model| model.max_logprobs.into()))
    }

    /// Ids that may be drawn: rows that pad the embedding decode to nothing.
    fn allowed(&self) -> Value {
        let Some(model) = self.model else { return or_null(self.ids(None)) };
        let known =
            model.tokenizer.as_ref().map_or(model.vocab_size, |t| t.vocab_size().min(model.vocab_size));
        let id = json!({"type": "integer", "minimum": 0, "exclusiveMaximum": known});
        json!({"type": ["array", "null"], "items": id, "minItems": 1, "maxItems": model.vocab_size})
    }

    /// The fields that chats and completions share, and `own`.
    fn generation(&self, own: Value) -> Value {
        let stop = json!({"type": "string", "minLength": 1, "maxLength": bounds::STOP_BYTES});
        let mut fields = json!({
            "model": {"type": ["string", "null"], "description": "One of the names of /v1/models; the first if left out"},
            "temperature": number(0.0, 2.0),
            "top_p": above_zero(1.0),
            "top_k": integer(-1, u32::MAX.into()),
            "min_p": number(0.0, 1.0),
            "presence_penalty": number(-2.0, 2.0),
            "frequency_penalty": number(-2.0, 2.0),
            "repetition_penalty": above_zero(f32::MAX),
            "seed": integer(i64::MIN, i64::MAX),
            "n": integer(1, self.limits.n.into()),
            "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": self.limits.stops}, {"type": "null"}]},
            "stop_token_ids": or_null(self.ids(Some(bounds::STOP_TOKEN_IDS))),
            "include_stop_str_in_output": boolean(),
            "ignore_eos": boolean(),
            "min_tokens": count(0),
            "logit_bias": {
                "type": ["object", "null"],
                "description": "By token id",
                "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                "maxProperties": self.limits.logit_bias,
            },
            "allowed_token_ids": self.allowed(),
            "skip_special_tokens": boolean(),
            "stream": boolean(),
            "stream_options": {
                "anyOf": [object(json!({
                    "include_usage": boolean(),
                    "continuous_usage_stats": boolean(),
                    "include_obfuscation": only(json!([false])),
                }), &[]), {"type": "null"}],
                "description": "With stream: true only",
            },
            "prompt_logprobs": self.alternatives(),
            "return_tokens_as_token_ids": boolean(),
            "return_token_ids": boolean(),
            "truncate_prompt_tokens": {"anyOf": [
                {"const": -1},
                or_null(json!({"type": "integer", "minimum": 1, "maximum": self.model.map_or(usize::MAX >> 1, |m| m.max_model_len)})),
            ]},
            "truncation_side": only(json!(["left"])),
            "add_special_tokens": boolean(),
            "priority": integer(i32::MIN.into(), i32::MAX.into()),
            "cache_salt": {"type": ["string", "null"], "minLength": 1, "maxLength": bounds::LABEL_BYTES},
            "request_id": {"type": ["string", "null"], "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
            "user": label(),
            "safety_identifier": label(),
            "prompt_cache_key": label(),
            "metadata": {"type": ["object", "null"], "additionalProperties": {"type": "string"}, "maxProperties": bounds::METADATA},
        });
        let forms = json!({
            "bad_words": {
                "type": ["array", "null"],
                "items": {"type": "string", "minLength": 1, "maxLength": bounds::STOP_BYTES},
                "maxItems": self.limits.bad_words,
            },
            "response_format": response_format(),
            "structured_outputs": or_null(structured_outputs()),
            "guided_json": schema(),
            "guided_regex": text(),
            "guided_choice": choices(),
            "guided_grammar": text(),
        });
        extend(&mut fields, forms);
        for (field, values) in bounds::neutral() {
            extend(&mut fields, json!({field: only(Value::Array(values))}));
        }
        extend(&mut fields, own);
        fields
    }

    fn completion(&self) -> Value {
        let most = self.limits.prompts;
        let mut ids = self.ids(None);
        extend(&mut ids, json!({"minItems": 1}));
        let text = json!({"type": "string", "minLength": 1});
        let prompts =
            |items: &Value| json!({"type": "array", "items": items, "minItems": 1, "maxItems": most});
        let fields = self.generation(json!({
            "prompt": {
                "anyOf": [text, ids, prompts(&text), prompts(&ids)],
                "description": format!("Prompts times n are at most {most}"),
            },
            "max_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": i64::MAX, "default": 16},
            "echo": boolean(),
            "logprobs": self.alternatives(),
            "suffix": only(json!([""])),
        }));
        object(fields, &["prompt"])
    }

    fn message(&self) -> Value {
        let part = object(json!({"type": {"const": "text"}, "text": {"type": "string"}}), &["type", "text"]);
        let content = json!({"anyOf": [{"type": "string"}, {"type": "array", "items": part}]});
        let arguments = json!({
            "anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}],
            "description": "A JSON object, or one as text",
        });
        let function = object(json!({"name": {"type": "string"}, "arguments": arguments}), &["name"]);
        let call = object(
            json!({
                "id": {"type": ["string", "null"]},
                "type": only(json!(["function"])),
                "index": count(0),
                "function": function,
            }),
            &["function"],
        );
        let calls = |least: usize| json!({"type": "array", "items": call, "minItems": least, "maxItems": bounds::ENTRIES});
        let mut fields = json!({
            "role": {"type": "string", "minLength": 1, "maxLength": bounds::ROLE_BYTES},
            "name": {"type": ["string", "null"]},
            "tool_call_id": {"type": ["string", "null"]},
        });
        for field in bounds::EMPTY_IN_MESSAGES {
            extend(&mut fields, json!({field: only(json!([[], ""]))}));
        }
        let with = |own: Value, required: &[&str]| {
            let mut fields = fields.clone();
            extend(&mut fields, own);
            object(fields, required)
        };
        // Calls may come without a text.
        json!({"anyOf": [
            with(json!({"content": content, "tool_calls": or_null(calls(0))}), &["role", "content"]),
            with(json!({"content": or_null(content.clone()), "tool_calls": calls(1)}), &["role", "tool_calls"]),
        ]})
    }

    /// The fields that a template looks at.
    fn conversation(&self) -> Value {
        let name = json!({"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"});
        let function = object(
            json!({
                "name": name,
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
                "strict": boolean(),
            }),
            &["name"],
        );
        let tool =
            object(json!({"type": {"const": "function"}, "function": function}), &["type", "function"]);
        json!({
            "messages": {"type": "array", "minItems": 1, "maxItems": self.limits.messages, "items": self.message()},
            "tools": {"type": ["array", "null"], "items": tool, "maxItems": self.limits.tools},
            "tool_choice": {"anyOf": [
                {"enum": ["auto", "none", "required", null]},
                object(json!({"type": {"const": "function"}, "function": object(json!({"name": name}), &["name"])}), &["type", "function"]),
            ]},
            "documents": {"type": ["array", "null"], "items": {"type": "object"}, "maxItems": self.limits.messages},
            "chat_template_kwargs": {
                "type": ["object", "null"],
                "propertyNames": {"not": {"enum": RESERVED_VARIABLES}},
                "maxProperties": bounds::ENTRIES,
            },
            "add_generation_prompt": boolean(),
            "continue_final_message": boolean(),
            "add_special_tokens": boolean(),
        })
    }

    fn chat(&self) -> Value {
        let mut fields = self.generation(self.conversation());
        extend(
            &mut fields,
            json!({
                "max_tokens": count(1),
                "max_completion_tokens": count(1),
                "logprobs": boolean(),
                "top_logprobs": self.alternatives(),
                "parallel_tool_calls": boolean(),
                "echo": only(json!([false])),
                "reasoning_effort": only(json!(["none"])),
                "modalities": only(json!([["text"]])),
            }),
        );
        object(fields, &["messages"])
    }

    fn tokenize(&self) -> Value {
        let flags = json!({
            "model": {"type": ["string", "null"]},
            "add_special_tokens": boolean(),
            "return_token_strs": boolean(),
        });
        let with = |more: Value, required: &[&str]| {
            let mut fields = flags.clone();
            extend(&mut fields, more);
            object(fields, required)
        };
        json!({"anyOf": [
            with(json!({"prompt": {"type": "string"}}), &["prompt"]),
            with(self.conversation(), &["messages"]),
        ]})
    }

    fn detokenize(&self) -> Value {
        object(json!({"model": {"type": ["string", "null"]}, "tokens": self.ids(None)}), &["tokens"])
    }
}

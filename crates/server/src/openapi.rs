//! `/openapi.json`: the routes and what they take, as this server takes it.

use serde_json::{Map, Value, json};

use crate::router::{Access, ROUTES};

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let mut item = Map::new();
        for method in methods(route.path) {
            item.insert((*method).into(), operation(route.path, route.access));
        }
        paths.insert(route.path.into(), Value::Object(item));
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Longhaul", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Chat": chat(), "Completion": completion(), "Tokenize": tokenize(), "Detokenize": detokenize(), "Error": error()},
        },
    })
}

fn methods(path: &str) -> &'static [&'static str] {
    match schema(path) {
        Some(_) => &["post"],
        None if path == "/ping" => &["get", "post"],
        None => &["get"],
    }
}

/// The body that a route takes.
fn schema(path: &str) -> Option<&'static str> {
    match path {
        "/v1/chat/completions" | "/v1/chat/completions/render" => Some("Chat"),
        "/v1/completions" => Some("Completion"),
        "/tokenize" => Some("Tokenize"),
        "/detokenize" => Some("Detokenize"),
        _ => None,
    }
}

fn summary(path: &str) -> &'static str {
    match path {
        "/health" | "/ping" => "200 while requests are served and the engine makes progress",
        "/ready" => "200 while new requests should come here; otherwise why not",
        "/live" => "200 while the process answers",
        "/version" => "The version",
        "/load" => "Requests in flight",
        "/metrics" => "Metrics in the Prometheus text format",
        "/openapi.json" => "This document",
        "/v1/models" => "The model, once for each of its names",
        "/v1/chat/completions" => "Continue a chat",
        "/v1/chat/completions/render" => "The prompt of a chat, as text and token ids, without running it",
        "/v1/completions" => "Continue prompts",
        "/tokenize" => "Text or a chat to token ids",
        "/detokenize" => "Token ids to text",
        _ => "",
    }
}

fn operation(path: &str, access: Access) -> Value {
    let mut responses = Map::from_iter([("200".into(), success(path))]);
    let failure = |description: &str| {
        let schema = json!({"$ref": "#/components/schemas/Error"});
        json!({"description": description, "content": {"application/json": {"schema": schema}}})
    };
    let mut fail = |status: &str, description: &str| {
        responses.insert(status.into(), failure(description));
    };
    fail("400", "The request is wrong; the message names the field");
    if schema(path).is_some() {
        fail("404", "No such model");
        fail("408", "The body did not arrive in time");
        fail("413", "The body is too large");
        fail("415", "The body is compressed");
        fail("429", "The caller's quota is used up");
        fail("500", "The server or the engine failed");
        fail("504", "The request took too long");
    }
    fail("503", "Not loaded yet, no room, or shutting down");
    let mut operation = Map::from_iter([("summary".into(), json!(summary(path)))]);
    if access == Access::Key {
        let unauthorized = json!({"type": "object", "properties": {"error": {"const": "Unauthorized"}}});
        let content = json!({"application/json": {"schema": unauthorized}});
        responses.insert("401".into(), json!({"description": "A key is needed", "content": content}));
        operation.insert("security".into(), json!([{"key": []}, {}]));
    }
    if let Some(name) = schema(path) {
        let schema = json!({"$ref": format!("#/components/schemas/{name}")});
        let body = json!({"required": true, "content": {"application/json": {"schema": schema}}});
        operation.insert("requestBody".into(), body);
    }
    operation.insert("responses".into(), Value::Object(responses));
    Value::Object(operation)
}

fn success(path: &str) -> Value {
    let content = match path {
        "/health" | "/ping" | "/live" => return json!({"description": "Yes; the body is empty"}),
        "/metrics" => json!({"text/plain": {"schema": {"type": "string"}}}),
        "/v1/chat/completions" | "/v1/completions" => json!({
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        }),
        _ => json!({"application/json": {"schema": {"type": "object"}}}),
    };
    json!({"description": "Done", "content": content})
}

/// An object with `fields`, of which `required` must be there.
fn object(fields: Value, required: &[&str]) -> Value {
    json!({"type": "object", "properties": fields, "required": required, "additionalProperties": false})
}

/// The fields that chats and completions share, and `own`.
fn generation(own: Value) -> Value {
    let number = |min: f64, max: f64| json!({"type": ["number", "null"], "minimum": min, "maximum": max});
    let above = |max: Value| json!({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": max});
    let integer = |min: i64| json!({"type": ["integer", "null"], "minimum": min});
    let boolean = json!({"type": ["boolean", "null"]});
    let text = json!({"type": ["string", "null"], "maxLength": 512});
    let ids = json!({"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}});
    let stop = json!({"type": "string", "minLength": 1, "maxLength": 256});
    let mut fields = json!({
        "model": {"type": ["string", "null"]},
        "temperature": number(0.0, 2.0),
        "top_p": above(json!(1)),
        "top_k": integer(-1),
        "min_p": number(0.0, 1.0),
        "presence_penalty": number(-2.0, 2.0),
        "frequency_penalty": number(-2.0, 2.0),
        "repetition_penalty": above(json!(f32::MAX)),
        "seed": {"type": ["integer", "null"]},
        "n": {"type": ["integer", "null"], "minimum": 1},
        "stop": {"anyOf": [stop, {"type": "array", "items": stop}, {"type": "null"}]},
        "stop_token_ids": ids,
        "include_stop_str_in_output": boolean,
        "ignore_eos": boolean,
        "min_tokens": integer(0),
        "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        "allowed_token_ids": ids,
        "skip_special_tokens": boolean,
        "stream": boolean,
        "stream_options": {"anyOf": [
            object(json!({"include_usage": boolean, "continuous_usage_stats": boolean}), &[]), {"type": "null"},
        ]},
        "prompt_logprobs": integer(0),
        "return_tokens_as_token_ids": boolean,
        "return_token_ids": boolean,
        "truncate_prompt_tokens": integer(-1),
        "add_special_tokens": boolean,
        "priority": {"type": ["integer", "null"]},
        "cache_salt": text,
        "request_id": text,
        "user": text,
        "metadata": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
    });
    if let (Some(fields), Value::Object(own)) = (fields.as_object_mut(), own) {
        fields.extend(own);
    }
    fields
}

fn completion() -> Value {
    let ids = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    let fields = generation(json!({
        "prompt": {"anyOf": [
            {"type": "string"}, ids, {"type": "array", "items": {"type": "string"}}, {"type": "array", "items": ids},
        ]},
        "max_tokens": {"type": ["integer", "null"], "minimum": 0, "default": 16},
        "echo": {"type": ["boolean", "null"]},
        "logprobs": {"type": ["integer", "null"], "minimum": 0},
    }));
    object(fields, &["prompt"])
}

/// The fields that a template looks at.
fn conversation() -> Value {
    let message = json!({"type": "object", "properties": {
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]},
        "name": {"type": ["string", "null"]},
        "tool_calls": {"type": ["array", "null"]},
        "tool_call_id": {"type": ["string", "null"]},
    }, "required": ["role"]});
    json!({
        "messages": {"type": "array", "minItems": 1, "items": message},
        "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_choice": {"enum": ["auto", "none", null]},
        "documents": {"type": ["array", "null"], "items": {"type": "object"}},
        "chat_template_kwargs": {"type": ["object", "null"]},
        "add_generation_prompt": {"type": ["boolean", "null"]},
        "continue_final_message": {"type": ["boolean", "null"]},
    })
}

fn chat() -> Value {
    let mut fields = generation(conversation());
    if let Some(fields) = fields.as_object_mut() {
        let limit = json!({"type": ["integer", "null"], "minimum": 1});
        fields.insert("max_tokens".into(), limit.clone());
        fields.insert("max_completion_tokens".into(), limit);
        fields.insert("logprobs".into(), json!({"type": ["boolean", "null"]}));
        fields.insert("top_logprobs".into(), json!({"type": ["integer", "null"], "minimum": 0}));
        fields.insert("parallel_tool_calls".into(), json!({"type": ["boolean", "null"]}));
    }
    object(fields, &["messages"])
}

fn tokenize() -> Value {
    let flags = json!({
        "model": {"type": ["string", "null"]},
        "add_special_tokens": {"type": ["boolean", "null"]},
        "return_token_strs": {"type": ["boolean", "null"]},
    });
    let with = |more: Value, required: &[&str]| {
        let mut fields = flags.clone();
        if let (Some(fields), Value::Object(more)) = (fields.as_object_mut(), more) {
            fields.extend(more);
        }
        object(fields, required)
    };
    json!({"anyOf": [with(json!({"prompt": {"type": "string"}}), &["prompt"]), with(conversation(), &["messages"])]})
}

fn detokenize() -> Value {
    let tokens = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    object(json!({"model": {"type": ["string", "null"]}, "tokens": tokens}), &["tokens"])
}

fn error() -> Value {
    let fields = json!({
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"]},
        "code": {"type": "integer"},
    });
    json!({"type": "object", "properties": {"error": {"type": "object", "properties": fields}}, "required": ["error"]})
}

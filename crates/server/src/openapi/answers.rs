//! What the routes answer, by status.

use serde_json::{Map, Value, json};

use crate::router::Access;

/// The schema `name` of the document.
pub(super) fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// The responses of a route; `body`: it takes one.
pub(super) fn responses(path: &str, access: Access, body: bool) -> Map<String, Value> {
    let generates = matches!(path, "/v1/chat/completions" | "/v1/completions");
    let mut responses = Map::from_iter([("200".into(), success(path))]);
    let mut fail = |status: &str, description: &str| {
        responses.insert(status.into(), failure(description));
    };
    fail("400", "The request is wrong; the message names the field, or what is odd about the request's head");
    fail("500", "The server or the engine failed");
    if body {
        fail("404", "No such model");
        fail("408", "The body did not arrive in time");
        fail("413", "The body is too large");
        fail("415", "The body is compressed");
        fail("429", "The caller's quota is used up");
    }
    if generates {
        fail("504", "The request took longer than the server allows");
    }
    if body || path == "/v1/models" {
        fail("503", "Not loaded yet, no room, or shutting down");
    }
    for status in ["429", "503"] {
        if let Some(Value::Object(response)) = responses.get_mut(status) {
            let after = json!({"description": "Seconds after which to try again", "schema": {"type": "integer", "minimum": 1}});
            response.insert("headers".into(), json!({"Retry-After": after}));
        }
    }
    match path {
        "/health" | "/ping" => {
            responses.insert("503".into(), json!({"description": "No; the body is empty"}));
        }
        "/ready" => {
            let content = json!({"application/json": {"schema": reference("Ready")}});
            responses.insert("503".into(), json!({"description": "No, and why", "content": content}));
        }
        _ => {}
    }
    if access == Access::Key {
        let content = json!({"application/json": {"schema": reference("Unauthorized")}});
        let headers = json!({"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": true}});
        let response = json!({"description": "A key is needed", "content": content, "headers": headers});
        responses.insert("401".into(), response);
    }
    responses
}

fn failure(description: &str) -> Value {
    json!({"description": description, "content": {"application/json": {"schema": reference("Error")}}})
}

fn success(path: &str) -> Value {
    let name = match path {
        "/health" | "/ping" | "/live" => return json!({"description": "Yes; the body is empty"}),
        "/metrics" => {
            let content = json!({"text/plain": {"schema": {"type": "string"}}});
            return json!({"description": "Done", "content": content});
        }
        "/openapi.json" => {
            let content = json!({"application/json": {"schema": {"type": "object"}}});
            return json!({"description": "Done", "content": content});
        }
        "/ready" => "Ready",
        "/version" => "Version",
        "/load" => "Load",
        "/v1/models" => "Models",
        "/v1/chat/completions" => "ChatAnswer",
        "/v1/completions" => "CompletionAnswer",
        "/v1/chat/completions/render" => "Rendered",
        "/tokenize" => "Tokens",
        _ => "Text",
    };
    let chunk = match name {
        "ChatAnswer" => Some("ChatChunk"),
        "CompletionAnswer" => Some("CompletionChunk"),
        _ => None,
    };
    let mut content = json!({"application/json": {"schema": reference(name)}});
    if let (Some(content), Some(chunk)) = (content.as_object_mut(), chunk) {
        content.insert("text/event-stream".into(), json!({"schema": event(chunk)}));
    }
    json!({"description": "Done", "content": content})
}

/// A server-sent event of a stream: a chunk or an error as JSON, at the end `[DONE]`.
fn event(chunk: &str) -> Value {
    let content = json!({"anyOf": [reference(chunk), reference("Error")]});
    let data = json!({"type": "string", "contentMediaType": "application/json", "contentSchema": content});
    json!({
        "type": "object",
        "description": "With stream: true, each event",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    })
}

/// An object with exactly these fields, all of which are there.
fn exactly(fields: Value) -> Value {
    let required: Vec<&String> = fields.as_object().map(|fields| fields.keys().collect()).unwrap_or_default();
    json!({"type": "object", "required": required, "properties": fields, "additionalProperties": false})
}

fn or_null(schema: Value) -> Value {
    json!({"anyOf": [schema, {"type": "null"}]})
}

fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

/// Every schema of an answer.
pub(super) fn schemas() -> Map<String, Value> {
    let text = json!({"type": "string"});
    let count = json!({"type": "integer", "minimum": 0});
    let nothing = json!({"type": "null"});
    let error = exactly(json!({
        "message": text,
        "type": text,
        "param": {"type": ["string", "null"]},
        "code": {"type": "integer", "minimum": 400, "maximum": 599},
    }));
    let ready = json!({
        "type": "object",
        "required": ["status"],
        "properties": {
            "status": {"enum": ["ready", "loading", "unhealthy", "draining"]},
            "reason": text,
            "loaded_bytes": count,
            "total_bytes": count,
            "requests": count,
        },
        "additionalProperties": false,
    });
    let rendered = exactly(json!({
        "model": text, "prompt": text, "token_ids": list(count.clone()), "count": count, "max_model_len": count,
    }));
    let tokens = exactly(json!({
        "count": count, "max_model_len": count, "tokens": list(count.clone()), "token_strs": or_null(list(text.clone())),
    }));
    let unauthorized = exactly(json!({"error": {"const": "Unauthorized"}}));
    let chat = answer(
        "chat.completion",
        chat_choice(),
        json!({
            "prompt_logprobs": or_null(list(prompt_score())),
            "prompt_token_ids": or_null(list(count.clone())),
            "kv_transfer_params": nothing,
        }),
    );
    let completion = answer("text_completion", completion_choice(), json!({"kv_transfer_params": nothing}));
    Map::from_iter([
        ("Error".into(), exactly(json!({"error": error}))),
        ("Unauthorized".into(), unauthorized),
        ("Ready".into(), ready),
        ("Version".into(), exactly(json!({"version": text}))),
        ("Load".into(), exactly(json!({"server_load": count}))),
        ("Models".into(), exactly(json!({"object": {"const": "list"}, "data": list(model())}))),
        ("Rendered".into(), rendered),
        ("Tokens".into(), tokens),
        ("Text".into(), exactly(json!({"prompt": text}))),
        ("Usage".into(), usage()),
        ("ChatAnswer".into(), chat),
        ("CompletionAnswer".into(), completion),
        (
            "ChatChunk".into(),
            chunk("chat.completion.chunk", chat_chunk_choice(), json!({"prompt_token_ids": ids()})),
        ),
        ("CompletionChunk".into(), chunk("text_completion", completion_chunk_choice(), json!({}))),
    ])
}

fn model() -> Value {
    let text = json!({"type": "string"});
    exactly(json!({
        "id": text,
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": text,
        "root": text,
        "parent": {"type": "null"},
        "max_model_len": {"type": "integer", "minimum": 1},
        "permission": list(json!({"type": "object"})),
    }))
}

fn usage() -> Value {
    let count = json!({"type": "integer", "minimum": 0});
    let details = or_null(exactly(json!({"cached_tokens": count})));
    let counts = exactly(json!({"prompt_tokens": count, "total_tokens": count, "completion_tokens": count}));
    with_optional(counts, json!({"prompt_tokens_details": details}))
}

/// A whole answer of kind `object`.
fn answer(object: &str, choice: Value, own: Value) -> Value {
    let mut fields = json!({
        "id": {"type": "string"},
        "object": {"const": object},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": list(choice),
        "service_tier": {"type": "null"},
        "system_fingerprint": {"type": "null"},
        "usage": reference("Usage"),
    });
    if let (Some(fields), Value::Object(own)) = (fields.as_object_mut(), own) {
        fields.extend(own);
    }
    exactly(fields)
}

/// A chunk of a stream, with the fields of `own` if they were asked for. The one with the usage alone has no choices.
fn chunk(object: &str, choice: Value, own: Value) -> Value {
    let base = json!({
        "id": {"type": "string"},
        "object": {"const": object},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": list(choice),
    });
    let usage = json!({"usage": reference("Usage")});
    with_optional(with_optional(exactly(base), usage), own)
}

/// `schema` with fields that need not be there.
fn with_optional(mut schema: Value, more: Value) -> Value {
    if let (Some(fields), Value::Object(more)) =
        (schema.get_mut("properties").and_then(Value::as_object_mut), more)
    {
        fields.extend(more);
    }
    schema
}

fn reason(reasons: &[&str]) -> (Value, Value) {
    // A stop string, or a stop token's id.
    (json!({"enum": reasons}), json!({"type": ["string", "integer", "null"]}))
}

/// A log probability: at most 0, but for rounding.
fn logprob() -> Value {
    json!({"type": "number", "maximum": 0.001})
}

/// A token with its score, and what else there is of `own`.
fn scored(own: Value) -> Value {
    let bytes = or_null(list(json!({"type": "integer", "minimum": 0, "maximum": 255})));
    let mut fields = json!({"token": {"type": "string"}, "logprob": logprob(), "bytes": bytes});
    if let (Some(fields), Value::Object(own)) = (fields.as_object_mut(), own) {
        fields.extend(own);
    }
    exactly(fields)
}

/// An element of `prompt_logprobs`: scores by token id.
fn prompt_score() -> Value {
    let entry = exactly(json!({
        "logprob": logprob(), "rank": {"type": ["integer", "null"], "minimum": 1}, "decoded_token": {"type": "string"},
    }));
    or_null(json!({"type": "object", "additionalProperties": entry}))
}

fn ids() -> Value {
    list(json!({"type": "integer", "minimum": 0}))
}

fn chat_logprobs() -> Value {
    let token = scored(json!({"top_logprobs": list(scored(json!({})))}));
    or_null(exactly(json!({"content": list(token)})))
}

fn completion_logprobs() -> Value {
    let scores = json!({"type": "object", "additionalProperties": logprob()});
    or_null(exactly(json!({
        "text_offset": ids(),
        "token_logprobs": list(or_null(logprob())),
        "tokens": list(json!({"type": "string"})),
        "top_logprobs": list(or_null(scores)),
    })))
}

fn chat_chunk_choice() -> Value {
    let text = json!({"type": "string"});
    let function = with_optional(exactly(json!({})), json!({"name": text, "arguments": text}));
    let call = with_optional(
        exactly(json!({"index": {"type": "integer", "minimum": 0}, "function": function})),
        json!({"id": text, "type": {"const": "function"}}),
    );
    let delta =
        with_optional(exactly(json!({})), json!({"role": text, "content": text, "tool_calls": list(call)}));
    let (finish, stop) = reason(&["stop", "length", "tool_calls"]);
    let choice = exactly(json!({
        "index": {"type": "integer", "minimum": 0},
        "delta": delta,
        "logprobs": chat_logprobs(),
        "finish_reason": or_null(finish),
    }));
    with_optional(choice, json!({"stop_reason": stop, "token_ids": ids()}))
}

fn completion_chunk_choice() -> Value {
    let (finish, stop) = reason(&["stop", "length"]);
    let choice = exactly(json!({
        "index": {"type": "integer", "minimum": 0},
        "text": {"type": "string"},
        "logprobs": completion_logprobs(),
        "finish_reason": or_null(finish),
        "stop_reason": stop,
    }));
    with_optional(choice, json!({"prompt_token_ids": ids(), "token_ids": ids()}))
}

fn chat_choice() -> Value {
    let nothing = json!({"type": "null"});
    let function = exactly(json!({"name": {"type": "string"}, "arguments": {"type": "string"}}));
    let call =
        exactly(json!({"id": {"type": "string"}, "type": {"const": "function"}, "function": function}));
    let message = exactly(json!({
        "role": {"type": "string"},
        "content": {"type": ["string", "null"]},
        "refusal": nothing,
        "annotations": nothing,
        "audio": nothing,
        "function_call": nothing,
        "tool_calls": list(call),
    }));
    let (finish, stop) = reason(&["stop", "length", "tool_calls"]);
    exactly(json!({
        "index": {"type": "integer", "minimum": 0},
        "message": message,
        "logprobs": chat_logprobs(),
        "finish_reason": finish,
        "stop_reason": stop,
        "token_ids": or_null(ids()),
    }))
}

fn completion_choice() -> Value {
    let (finish, stop) = reason(&["stop", "length"]);
    exactly(json!({
        "index": {"type": "integer", "minimum": 0},
        "text": {"type": "string"},
        "logprobs": completion_logprobs(),
        "finish_reason": finish,
        "stop_reason": stop,
        "token_ids": or_null(ids()),
        "prompt_logprobs": or_null(list(prompt_score())),
        "prompt_token_ids": or_null(ids()),
    }))
}

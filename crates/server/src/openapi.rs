//! `/openapi.json`: the routes, what they take and what they answer, as this server with its limits and its model does.

mod answers;
mod requests;

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::router::{Access, ROUTES};
use crate::serving::ModelInfo;

/// The document. What depends on the model is left open while there is none.
pub(crate) fn document(config: &Config, model: Option<&ModelInfo>) -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let mut item = Map::new();
        for method in methods(route.path) {
            item.insert((*method).into(), operation(route.path, method, route.access, config));
        }
        paths.insert(route.path.into(), Value::Object(item));
    }
    let mut schemas = requests::schemas(&config.limits, model);
    schemas.extend(answers::schemas());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Longhaul",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Requests are HTTP/1.1; another version is answered with 505, a request line beyond 64 KiB with 414, more \
                than 64 headers with 431, a path that is no route with 404 (401 without a key), and another method than the ones \
                listed with 405.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas,
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

fn operation(path: &str, method: &str, access: Access, config: &Config) -> Value {
    let id: String = path.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let mut operation = Map::from_iter([
        ("operationId".into(), json!(format!("{method}{id}"))),
        ("summary".into(), json!(summary(path))),
    ]);
    if access == Access::Key {
        let keys = if config.api_keys.is_empty() { json!([]) } else { json!([{"key": []}]) };
        operation.insert("security".into(), keys);
        let id = json!({
            "name": "X-Request-Id",
            "in": "header",
            "description": "An id for the answer and the logs. One that does not match [A-Za-z0-9._:-]{1,128} is replaced.",
            "schema": {"type": "string"},
        });
        operation.insert("parameters".into(), json!([id]));
    }
    if let Some(name) = schema(path) {
        let body =
            json!({"required": true, "content": {"application/json": {"schema": answers::reference(name)}}});
        operation.insert("requestBody".into(), body);
    }
    operation
        .insert("responses".into(), Value::Object(answers::responses(path, access, schema(path).is_some())));
    Value::Object(operation)
}

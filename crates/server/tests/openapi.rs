//! `/openapi.json` says what happens: its routes, statuses, fields and bounds, each tried on the server.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Mock, Reply, Running, model};
use longhaul_server::{ApiKeys, Config, Limits, Refusal};
use serde_json::{Value, json};

fn server(config: Config) -> (Arc<Mock>, Running) {
    let mock = Arc::new(Mock::saying("ok<|im_end|>"));
    let server = Running::start(&mock, config);
    (mock, server)
}

fn document(server: &Running) -> Value {
    server.get("/openapi.json").json()
}

/// A body that each route with a body takes.
fn good(path: &str) -> Option<Value> {
    Some(match path {
        "/v1/completions" => json!({"prompt": "x"}),
        "/v1/chat/completions" | "/v1/chat/completions/render" => {
            json!({"messages": [{"role": "user", "content": "x"}]})
        }
        "/tokenize" => json!({"prompt": "x"}),
        "/detokenize" => json!({"tokens": [5]}),
        _ => return None,
    })
}

/// The response that the document has for a reply: its status, its type, and the names of its fields.
fn check(document: &Value, method: &str, path: &str, reply: &Reply) {
    let responses = &document["paths"][path][method.to_lowercase()]["responses"];
    let response = &responses[reply.status.to_string()];
    assert!(response.is_object(), "{method} {path} has no status for {reply:?}");
    let Some(content) = response["content"].as_object() else {
        assert_eq!(reply.body, "", "{method} {path}: a body is not documented");
        return;
    };
    let kind = reply.header("content-type").unwrap().split(';').next().unwrap();
    let media = content.get(kind).unwrap_or_else(|| panic!("{method} {path}: {kind} is not documented"));
    let schema = resolve(document, &media["schema"]);
    if kind == "application/json" && path != "/openapi.json" {
        let body = reply.json();
        for required in schema["required"].as_array().unwrap() {
            assert!(body.get(required.as_str().unwrap()).is_some(), "{method} {path}: {required} in {body}");
        }
        for field in body.as_object().unwrap().keys() {
            assert!(schema["properties"].get(field).is_some(), "{method} {path}: {field} is not documented");
        }
    }
}

fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(path) => document.pointer(path.trim_start_matches('#')).unwrap(),
        None => schema,
    }
}

#[test]
fn every_answer_is_a_documented_one() {
    let keys = ApiKeys::new(["sesame"]).unwrap();
    let (_, server) = server(Config { api_keys: keys, ..Config::default() });
    let document = document(&server);
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 14);
    let key = ("Authorization", "Bearer sesame");
    for (path, item) in paths {
        for method in item.as_object().unwrap().keys().map(|method| method.to_uppercase()) {
            let ask = |headers: &[(&str, &str)], body: Option<&str>| {
                let reply = server.request(&method, path, headers, body);
                check(&document, &method, path, &reply);
                reply.status
            };
            let Some(body) = good(path) else {
                assert_eq!(ask(&[key], None), 200, "{path}");
                continue;
            };
            let body = body.to_string();
            let with_model = |model: &str| body.replacen('{', &format!("{{\"model\": {model}, "), 1);
            assert_eq!(ask(&[key], Some(&body)), 200, "{path}");
            assert_eq!(ask(&[], Some(&body)), 401, "{path}");
            assert_eq!(ask(&[key], Some("{")), 400, "{path}");
            assert_eq!(ask(&[key], Some(&with_model("5"))), 400, "{path}");
            assert_eq!(ask(&[key, ("Content-Type", "text/plain")], Some(&body)), 400, "{path}");
            assert_eq!(ask(&[key], Some(&with_model("\"other\""))), 404, "{path}");
            assert_eq!(ask(&[key, ("Content-Encoding", "gzip")], Some(&body)), 415, "{path}");
            assert_eq!(ask(&[key], Some(&" ".repeat(2 << 20))), 413, "{path}");
        }
    }
}

#[test]
fn refusals_of_the_engine_are_documented() {
    let (mock, server) = server(Config::default());
    let document = document(&server);
    let refusals = [
        (Refusal::Quota { reason: "yours".into(), retry_after: Duration::from_secs(2) }, 429),
        (Refusal::Saturated { reason: "all".into(), retry_after: Duration::from_secs(2) }, 503),
        (Refusal::Unavailable("dead".into()), 503),
        (Refusal::Field { field: "seed", message: "is odd".into() }, 400),
    ];
    for (refusal, status) in refusals {
        mock.refuse(Some(refusal));
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let reply = server.post(path, &good(path).unwrap());
            assert_eq!(reply.status, status);
            check(&document, "POST", path, &reply);
            if reply.header("retry-after").is_some() {
                let headers = &document["paths"][path]["post"]["responses"][status.to_string()]["headers"];
                assert!(headers["Retry-After"].is_object());
            }
        }
    }
}

#[test]
fn a_server_that_loads_or_is_ill_answers_as_documented() {
    let (mock, sick) = server(Config::default());
    mock.sicken();
    for server in [Running::unloaded(Config::default()), sick] {
        let document = document(&server);
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys().map(|method| method.to_uppercase()) {
                let body = good(path).map(|body| body.to_string());
                let reply = server.request(&method, path, &[], body.as_deref());
                check(&document, &method, path, &reply);
                let probe = ["/health", "/ping", "/ready"].contains(&path.as_str());
                assert!(!probe || reply.status == 503, "{path}: {reply:?}");
            }
        }
    }
}

/// Every field that is documented is known, and no other is: a wrong value of it is never complained of as an unknown field.
#[test]
fn documented_fields_are_the_known_ones() {
    let (_, server) = server(Config::default());
    let schemas = &document(&server)["components"]["schemas"];
    for (name, path) in [("Completion", "/v1/completions"), ("Chat", "/v1/chat/completions")] {
        let fields = schemas[name]["properties"].as_object().unwrap();
        assert!(fields.len() > 40);
        for field in fields.keys() {
            let mut body = good(path).unwrap();
            if body.get(field).is_none() {
                body[field] = json!([{"odd": [1]}, 2.5, "x"]);
            }
            let reply = server.post(path, &body);
            assert!(!reply.body.contains("not a field"), "{name}.{field}: {reply:?}");
        }
        assert!(server.post(path, &json!({"nonsense": 1})).status == 400);
    }
}

/// The numbers in the document are those at which the server changes its mind.
#[test]
fn documented_bounds_are_the_enforced_ones() {
    let limits =
        Limits { n: 3, stops: 2, prompts: 4, logit_bias: 5, messages: 3, tools: 2, ..Limits::default() };
    let (_, server) = server(Config { limits, ..Config::default() });
    let document = document(&server);
    for (name, path) in [("Completion", "/v1/completions"), ("Chat", "/v1/chat/completions")] {
        let schema = &document["components"]["schemas"][name];
        let mut tried = 0;
        for (field, schema) in schema["properties"].as_object().unwrap() {
            let status = |value: Value| {
                let mut body = good(path).unwrap();
                body["max_tokens"] = json!(2);
                // What these fields need beside them.
                match field.as_str() {
                    "max_tokens" if name == "Completion" => body["echo"] = json!(true),
                    "top_logprobs" => body["logprobs"] = json!(true),
                    "min_tokens" => body["ignore_eos"] = json!(true),
                    _ => {}
                }
                body[field] = value;
                server.post(path, &body).status
            };
            for (bound, outward) in [("minimum", -1), ("maximum", 1)] {
                let Some(limit) = schema.get(bound) else { continue };
                if field != "min_tokens" || bound == "minimum" {
                    assert_ne!(status(limit.clone()), 400, "{name}.{field}: {bound} {limit}");
                }
                let beyond = match limit.as_i64() {
                    Some(i64::MIN | i64::MAX) => json!(outward as f64 * 1e19),
                    Some(limit) => json!(limit + outward),
                    None => match limit.as_f64().unwrap() {
                        least if least as f32 == f32::from_bits(1) => json!(0),
                        most if most as f32 == f32::MAX => json!(1e39),
                        limit => json!(limit + outward as f64),
                    },
                };
                assert_eq!(status(beyond.clone()), 400, "{name}.{field}: {beyond} is beyond {bound} {limit}");
                tried += 1;
            }
            if let Some(most) = schema.get("maxLength").and_then(Value::as_u64) {
                assert_eq!(status(json!("x".repeat(most as usize))), 200, "{name}.{field}");
                assert_eq!(status(json!("x".repeat(most as usize + 1))), 400, "{name}.{field}");
                tried += 1;
            }
        }
        assert!(tried >= 30, "{name}: {tried}");
    }
    let schemas = &document["components"]["schemas"];
    let text = |pointer: &str| schemas.pointer(pointer).cloned().unwrap_or_default();
    assert_eq!(text("/Completion/properties/n/maximum"), json!(3));
    assert_eq!(text("/Completion/properties/stop/anyOf/1/maxItems"), json!(2));
    assert_eq!(text("/Completion/properties/logit_bias/maxProperties"), json!(5));
    assert_eq!(text("/Chat/properties/messages/maxItems"), json!(3));
    assert_eq!(text("/Chat/properties/tools/maxItems"), json!(2));
    assert_eq!(text("/Detokenize/properties/tokens/items/exclusiveMaximum"), json!(model().vocab_size),);
}

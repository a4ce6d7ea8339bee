//! Requests as spans.

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;

use common::{Mock, PATIENCE, Running};
use longhaul_server::{Config, TraceError, Tracer};
use serde_json::{Value, json};

#[test]
fn requests_are_spans_of_their_callers_traces() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    let (sender, received) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in collector.incoming() {
            let mut stream = stream.unwrap();
            let mut bytes = Vec::new();
            let mut buffer = [0; 1 << 14];
            let body = loop {
                let size = stream.read(&mut buffer).unwrap();
                bytes.extend_from_slice(&buffer[..size]);
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let length = head.lines().find_map(|line| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case("content-length").then(|| value.parse::<usize>().unwrap())
                });
                if length == Some(body.len()) {
                    break (head.lines().next().unwrap().to_owned(), body.to_owned());
                }
            };
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}").unwrap();
            sender.send(body).unwrap();
        }
    });
    let tracer = Tracer::start(&endpoint, "test").unwrap();
    let mock = Arc::new(Mock::saying("fine<|im_end|>"));
    let server = Running::start(&mock, Config { tracer: Some(tracer), ..Config::default() });
    let body = json!({"prompt": "x", "temperature": 0.5, "max_tokens": 9}).to_string();
    for parent in [
        // Not sampled: its caller does not want a span.
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ] {
        let headers = [("traceparent", parent), ("X-Request-Id", "traced")];
        assert_eq!(server.request("POST", "/v1/completions", &headers, Some(&body)).status, 200);
    }
    let (request, body) = received.recv_timeout(PATIENCE).unwrap();
    assert!(request.starts_with("POST /v1/traces "), "{request}");
    let message: Value = serde_json::from_str(&body).unwrap();
    let spans = message["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap();
    assert_eq!(spans.len(), 1, "{message}");
    let span = &spans[0];
    assert_eq!(span["traceId"], "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(span["parentSpanId"], "00f067aa0ba902b7");
    assert_eq!((&span["name"], &span["kind"]), (&json!("llm_request"), &json!(2)));
    let attribute = |key: &str| {
        let attributes = span["attributes"].as_array().unwrap();
        let found = attributes.iter().find(|attribute| attribute["key"] == key);
        found.unwrap_or_else(|| panic!("{key} in {span}"))["value"].clone()
    };
    assert_eq!(attribute("gen_ai.request.id"), json!({"stringValue": "traced"}));
    assert_eq!(attribute("gen_ai.request.n"), json!({"intValue": "1"}));
    assert_eq!(attribute("gen_ai.request.max_tokens"), json!({"intValue": "9"}));
    assert_eq!(attribute("gen_ai.request.temperature"), json!({"doubleValue": 0.5}));
    assert_eq!(attribute("gen_ai.response.model"), json!({"stringValue": "mock"}));
    assert_eq!(attribute("gen_ai.usage.prompt_tokens"), json!({"intValue": "1"}));
    for key in [
        "gen_ai.request.top_p",
        "gen_ai.usage.completion_tokens",
        "gen_ai.latency.e2e",
        "gen_ai.latency.time_in_queue",
        "gen_ai.latency.time_to_first_token",
        "gen_ai.latency.time_in_model_prefill",
        "gen_ai.latency.time_in_model_decode",
        "gen_ai.latency.time_in_model_inference",
    ] {
        attribute(key);
    }
    assert_eq!(server.metric("longhaul_trace_spans_dropped_total"), 0.0);
    assert!(matches!(Tracer::start("grpc://x:4317", "test"), Err(TraceError::Endpoint(_))));
}

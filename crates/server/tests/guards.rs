//! Who may call, how requests are framed, and how large, slow and many they may be.

mod common;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::{Mock, PATIENCE, Running, encode, parse_reply, read_reply};
use longhaul_server::{ApiKeys, Config, Limits, Server, ServerError};
use serde_json::json;

const PUBLIC: [&str; 8] =
    ["/health", "/ping", "/ready", "/live", "/version", "/load", "/metrics", "/openapi.json"];
const KEYED: [&str; 6] = [
    "/v1/models",
    "/v1/chat/completions",
    "/v1/chat/completions/render",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
];

fn start(config: Config) -> (Arc<Mock>, Running) {
    let mock = Arc::new(Mock::saying("ok<|im_end|>"));
    let server = Running::start(&mock, config);
    (mock, server)
}

fn with_keys() -> Config {
    Config { api_keys: ApiKeys::new(["sesame-1", "sesame-2"]).unwrap(), ..Config::default() }
}

fn with_limits(limits: Limits) -> Config {
    Config { limits, ..Config::default() }
}

#[test]
fn without_a_key_only_probes_answer() {
    let (mock, server) = start(with_keys());
    let body = json!({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}).to_string();
    let unknown = [
        "/",
        "/v1",
        "/v1/",
        "/v1/models/",
        "/v1/engines",
        "/admin",
        "/v1/embeddings",
        "/collective_rpc",
        "/invocations",
        "//v1/models",
        "/v1/../v1/models",
        "/v1/%6dodels",
        "/V1/MODELS",
        "/health/../v1/models",
        "/health%2f..%2fv1/models",
        "/metrics/",
        "/v1/models?key=sesame-1",
        "/v1/models;/health",
        "/.",
        "/v1//completions",
    ];
    let mut tried = 0;
    for path in KEYED.iter().chain(&unknown) {
        for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"] {
            for headers in [
                &[][..],
                &[("Authorization", "Bearer wrong")],
                &[("Authorization", "sesame-1")],
                &[("Authorization", "Bearer sesame-1"), ("Authorization", "Bearer wrong")],
                &[("X-Api-Key", "sesame-1")],
                &[("Host", "localhost:80")],
            ] {
                let reply =
                    server.request(method, path, headers, (method == "POST").then_some(body.as_str()));
                assert_eq!(reply.status, 401, "{method} {path} {headers:?}: {reply:?}");
                if method != "HEAD" {
                    assert_eq!(reply.body, r#"{"error":"Unauthorized"}"#);
                }
                tried += 1;
            }
        }
    }
    assert!(tried > 1000);
    // What looks like another host is no host at all.
    for host in ["x/v1?", "x#", "user@localhost", "localhost/health", "a b", "[::1"] {
        for path in KEYED {
            assert_eq!(server.request("GET", path, &[("Host", host)], None).status, 400, "{host}");
        }
    }
    for path in PUBLIC {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert!(mock.submissions.lock().unwrap().is_empty());
    for key in ["sesame-1", "sesame-2"] {
        let authorization = format!("Bearer {key}");
        let headers = [("Authorization", authorization.as_str())];
        let body = json!({"prompt": "x"}).to_string();
        assert_eq!(server.request("POST", "/v1/completions", &headers, Some(&body)).status, 200);
        // With a key one learns what exists.
        assert_eq!(server.request("GET", "/v1/engines", &headers, None).status, 404);
        assert_eq!(server.request("GET", "/v1/completions", &headers, None).status, 405);
    }
    let submissions = mock.submissions.lock().unwrap();
    assert_ne!(submissions[0].namespace, submissions[1].namespace, "a key is a namespace of its own");
    assert!(!format!("{submissions:?}").contains("sesame"));
    assert!(!server.get("/metrics").body.contains("sesame"));
}

#[test]
fn an_open_server_must_be_asked_for() {
    let everywhere: SocketAddr = "0.0.0.0:0".parse().unwrap();
    let bind = |config: Config| Server::bind(everywhere, config).map(drop);
    assert!(matches!(bind(Config::default()), Err(ServerError::Unauthenticated { .. })));
    assert!(bind(Config { allow_unauthenticated: true, ..Config::default() }).is_ok());
    assert!(bind(with_keys()).is_ok());
    // The port of another server.
    let (_, server) = start(Config::default());
    let error = Server::bind(server.address, Config::default()).map(drop).unwrap_err();
    assert!(matches!(error, ServerError::Bind { .. }), "{error}");
    assert!(error.to_string().contains("--port"), "{error}");
}

#[test]
fn hosts_and_request_lines() {
    let (_, server) = start(Config::default());
    // A page that has a name resolve to 127.0.0.1 sends that name.
    for (host, status) in [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]", 200),
        ("evil.example", 400),
    ] {
        assert_eq!(server.request("GET", "/v1/models", &[("Host", host)], None).status, status, "{host}");
    }
    for (request, status) in [
        ("GET /live HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        ("GET /live HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
        ("GET http://evil.example/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
        ("GET /live HTTP/1.0\r\nHost: localhost\r\n\r\n", 505),
        ("GET /live\r\n\r\n", 400),
        ("GET /live HTTP/1.1\r\nHost : localhost\r\nConnection: close\r\n\r\n", 400),
        (
            "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2\r\nConnection: close\r\n\r\n{}",
            400,
        ),
        (
            "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\nConnection: close\r\n\r\n{}",
            400,
        ),
        (
            "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, identity\r\nConnection: close\r\n\r\n0\r\n\r\n",
            400,
        ),
    ] {
        assert_eq!(server.raw(request).status, status, "{request}");
    }
    let all = Config { allowed_hosts: vec!["api.example".into()], ..with_keys() };
    let (_, server) = start(all);
    assert_eq!(server.request("GET", "/live", &[("Host", "api.example:443")], None).status, 200);
    assert_eq!(server.request("GET", "/live", &[("Host", "localhost")], None).status, 400);
}

#[test]
fn heads_are_bounded() {
    let (_, server) = start(Config::default());
    let many = |n: usize| (0..n).map(|i| format!("X-{i}: y\r\n")).collect::<String>();
    // An answer to a head that is still being sent may be lost to the reset that follows it.
    let refused = |status: u16| [0, 414, 431].contains(&status);
    let send = |headers: &str| {
        server.try_raw(format!("GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n"))
    };
    assert_eq!(send(&many(60)), 200);
    assert!(refused(send(&many(100))));
    assert_eq!(send(&format!("X: {}\r\n", "y".repeat(30_000))), 200);
    assert!(refused(send(&format!("X: {}\r\n", "y".repeat(300_000)))));
    assert!(refused(
        server.try_raw(format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "y".repeat(70_000)))
    ));
}

#[test]
fn bodies_are_bounded_to_the_byte() {
    let limit = 6 * 4096 + (1 << 20);
    let (_, server) = start(Config::default());
    let body = |bytes: usize| {
        let empty = json!({"prompt": "x", "user": ""}).to_string();
        // White space is legal JSON and costs no tokens.
        format!("{empty}{}", " ".repeat(bytes - empty.len()))
    };
    assert_eq!(server.request("POST", "/v1/completions", &[], Some(&body(limit))).status, 200);
    let reply = server.request("POST", "/v1/completions", &[], Some(&body(limit + 1)));
    assert_eq!(reply.status, 413);
    assert!(reply.error().contains(&limit.to_string()), "{reply:?}");
    // The same without a declared length.
    let chunked = |bytes: usize| {
        let mut request =
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
            Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
                .to_vec();
        for chunk in body(bytes).as_bytes().chunks(10_000) {
            request.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            request.extend_from_slice(chunk);
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"0\r\n\r\n");
        server.raw(request).status
    };
    assert_eq!(chunked(limit), 200);
    assert_eq!(chunked(limit + 1), 413);
}

#[test]
fn bodies_together_are_bounded() {
    let limits = Limits { inflight_body_bytes: 8 << 10, ..Limits::default() };
    let (_, server) = start(with_limits(limits));
    let text = |bytes: usize| format!("{}{}", json!({"prompt": "x"}), " ".repeat(bytes));
    assert_eq!(server.request("POST", "/v1/completions", &[], Some(&text(4 << 10))).status, 200);
    // Another client holds most of it.
    let mut slow = server.connect();
    let half = encode("POST", "/v1/completions", &[], Some(&text(7 << 10)));
    slow.write_all(&half[..half.len() - 512]).unwrap();
    common::until(|| server.metric("longhaul_body_bytes") == f64::from(7 << 10));
    let reply = server.request("POST", "/v1/completions", &[], Some(&text(4 << 10)));
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")), "{reply:?}");
    slow.write_all(&half[half.len() - 512..]).unwrap();
    assert_eq!(read_reply(slow).status, 200);
    assert_eq!(
        server.request("POST", "/v1/completions", &[], Some(&text(4 << 10))).status,
        200,
        "the bytes came back"
    );
}

#[test]
fn only_plain_json_is_read() {
    let (_, server) = start(Config::default());
    let body = json!({"prompt": "x"}).to_string();
    let send =
        |headers: &[(&str, &str)]| server.request("POST", "/v1/completions", headers, Some(&body)).status;
    assert_eq!(send(&[("Content-Type", "application/json; charset=utf-8")]), 200);
    assert_eq!(send(&[("Content-Type", "text/plain")]), 400);
    assert_eq!(send(&[("Content-Encoding", "gzip")]), 415);
    assert_eq!(send(&[("Content-Encoding", "identity")]), 200);
    for body in [
        "",
        "{",
        "[]",
        "null",
        "\"x\"",
        "{\"prompt\": NaN}",
        "{\"prompt\": \"\\ud800\"}",
        &"[".repeat(100_000),
    ] {
        let reply = server.request("POST", "/v1/completions", &[], Some(body));
        assert_eq!(reply.status, 400, "{reply:?}");
        assert!(reply.error().len() < 500);
    }
}

#[test]
fn slow_clients_are_let_go() {
    let short = Duration::from_millis(150);
    let (_, heads) = start(with_limits(Limits { header_time: short, ..Limits::default() }));
    let (_, bodies) = start(with_limits(Limits { body_idle: short, ..Limits::default() }));
    let whole = encode("POST", "/v1/completions", &[], Some(&json!({"prompt": "x"}).to_string()));
    let head = whole.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    for (server, sent, answered) in [(&heads, 0, false), (&heads, head / 2, false), (&bodies, head + 8, true)]
    {
        let mut client = server.connect();
        client.write_all(&whole[..sent]).unwrap();
        let mut answer = Vec::new();
        // The server ends the connection; the client's patience is far longer.
        client.read_to_end(&mut answer).unwrap();
        match answered {
            true => assert_eq!(parse_reply(&answer).status, 408),
            false => assert!(!answer.starts_with(b"HTTP/1.1 2"), "{:?}", String::from_utf8_lossy(&answer)),
        }
    }
}

#[test]
fn connections_are_bounded_and_the_rest_wait() {
    let (_, server) = start(with_limits(Limits { connections: 2, ..Limits::default() }));
    let held: Vec<_> = (0..2)
        .map(|_| {
            let mut client = server.connect();
            // One whole exchange shows that the connection was accepted.
            client.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            let mut first = [0; 12];
            client.read_exact(&mut first).unwrap();
            assert_eq!(&first, b"HTTP/1.1 200");
            client
        })
        .collect();
    let mut third = server.connect();
    third.write_all(&encode("GET", "/live", &[], None)).unwrap();
    third.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(third.read(&mut [0; 1]).is_err(), "no third connection is served");
    drop(held);
    third.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(read_reply(third).status, 200);
}

#[test]
fn request_ids_are_harmless_or_replaced() {
    let (_, server) = start(Config { request_id_headers: true, ..Config::default() });
    let ask = |id: &str| {
        let body = json!({"prompt": "x"}).to_string();
        server.request("POST", "/v1/completions", &[("X-Request-Id", id)], Some(&body))
    };
    let reply = ask("client-7");
    assert_eq!(
        (reply.header("x-request-id"), &reply.json()["id"]),
        (Some("client-7"), &json!("cmpl-client-7"))
    );
    for bad in ["a b", &"x".repeat(129), "{\"a\":1}", "ü"] {
        let reply = ask(bad);
        let id = reply.header("x-request-id").unwrap();
        assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
        assert_eq!(reply.json()["id"], json!(format!("cmpl-{id}")));
    }
}

#[test]
fn errors_tell_nothing_of_the_server() {
    let (_, server) = start(Config::default());
    let mut bodies = String::new();
    for body in [
        json!({"prompt": {"a": "/etc/passwd"}}),
        json!({"messages": "x"}),
        json!({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"mood": {"a": 1}}}),
        json!({"messages": [{"role": "user", "content": " "}], "continue_final_message": true}),
        json!({"prompt": "x", "stop": ["y".repeat(100_000)]}),
        json!({"prompt": "x", ("z".repeat(100_000)): 1}),
        json!({"prompt": "x", "model": "m".repeat(100_000)}),
    ] {
        for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
            let reply = server.post(path, &body);
            assert!(reply.status < 500, "{reply:?}");
            assert!(reply.body.len() < 2_000, "{reply:?}");
            bodies += &reply.body;
        }
    }
    for leak in ["src/", "mock.jinja", ".rs:", "0x", "/root", "tokenizer.json"] {
        assert!(!bodies.contains(leak), "{leak} in {bodies}");
    }
}

/// An answer that came before the body's end closes the connection, and says so; others keep it.
#[test]
fn a_connection_that_ends_is_announced() {
    let (_, server) = start(with_keys());
    let ask = |path: &str, headers: &str, content_length: usize, body: &str| {
        let mut stream = server.connect();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {content_length}\r\n{headers}\r\n"
        );
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while !answer.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
            let count = stream.read(&mut buffer).unwrap();
            assert!(count > 0, "{path}: no answer");
            answer.extend_from_slice(&buffer[..count]);
        }
        let answer = String::from_utf8(answer).unwrap().to_ascii_lowercase();
        (answer[9..12].parse::<u16>().unwrap(), answer.contains("connection: close"))
    };
    let key = "Authorization: Bearer sesame-1\r\n";
    let json = format!("{key}Content-Type: application/json\r\n");
    // Ten bytes are announced, and none has come.
    assert_eq!(ask("/v1/completions", "", 10, ""), (401, true));
    assert_eq!(ask("/v1/embeddings", key, 10, ""), (404, true));
    assert_eq!(ask("/v1/models", key, 10, ""), (405, true));
    assert_eq!(ask("/v1/completions", &format!("{key}Content-Type: text/plain\r\n"), 10, ""), (400, true));
    assert_eq!(ask("/v1/completions", &format!("{json}Content-Encoding: gzip\r\n"), 10, ""), (415, true));
    // Read to its end, or none there.
    assert_eq!(ask("/v1/completions", &json, 1, "{"), (400, false));
    assert_eq!(ask("/v1/completions", &json, 15, "{\"prompt\": \"x\"}"), (200, false));
    assert_eq!(ask("/v1/embeddings", key, 0, ""), (404, false));
}

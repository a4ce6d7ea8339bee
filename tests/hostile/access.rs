//! Keys, hosts, targets and methods.

use serde_json::Value;

use crate::Status;
use crate::common::serve::get;
use crate::corpus::{Corpus, exchange};

pub const KEY: &str = "canary-7f3a9c51";

/// Routes that answer everybody.
const PUBLIC: [&str; 8] =
    ["/health", "/ping", "/ready", "/live", "/version", "/load", "/metrics", "/openapi.json"];

/// Routes that need a key, and paths that other servers have, had, or had by mistake.
const OTHERS: [&str; 34] = [
    "/v1/models",
    "/v1/chat/completions",
    "/v1/chat/completions/render",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/",
    "/v1",
    "/v1/",
    "/v2/embed",
    "/invocations",
    "/pause",
    "/update_weights",
    "/collective_rpc",
    "/server_info",
    "/start_profile",
    "/stop_profile",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/responses",
    "/v1/embeddings",
    "/generate",
    "/flush_cache",
    "/get_server_info",
    "/api/tags",
    "/api/pull",
    "/debug/pprof",
    "/admin",
    "/.env",
    "/docs",
    "/favicon.ico",
];

/// A request without a key and without a body.
fn bare(method: &str, target: &str, host: &str) -> Vec<u8> {
    format!("{method} {target} HTTP/1.1\r\n{host}Connection: close\r\n\r\n").into_bytes()
}

pub fn routes_by_targets_and_hosts(corpus: &mut Corpus) {
    let host = "Host: localhost\r\n";
    for path in PUBLIC.into_iter().chain(OTHERS) {
        let is_public = PUBLIC.contains(&path);
        let here: &[Status] = if is_public { &[200] } else { &[401] };
        // As it should be, with what a public path may carry and what must not make a path public.
        for (what, target) in [
            ("plain", path.to_owned()),
            ("query", format!("{path}?next=/health")),
            ("fragment", format!("{path}#/health")),
        ] {
            corpus.case("access: targets", what, &bare("GET", &target, host), here);
        }
        // Paths that only look like it.
        for target in [
            format!("/{path}"),
            format!("{path}/../health"),
            format!("/health/..{path}"),
            format!("/health/%2e%2e{path}"),
            format!("{path}%00"),
            format!("{path};/health"),
            format!("/.{path}"),
            format!("{}//", path.trim_end_matches('/')),
            format!("{}.", path.trim_end_matches('/')),
            format!("{}/x", path.trim_end_matches('/')),
            format!("{}Q", path.to_ascii_uppercase()),
            format!("/%{:02x}{}", path.as_bytes().get(1).unwrap_or(&b'x'), path.get(2..).unwrap_or("")),
        ] {
            // The root's own variants are no paths at all.
            let expected: &[Status] = if target.starts_with('/') { &[401] } else { &[400] };
            corpus.case("access: odd targets", &target, &bare("GET", &target, host), expected);
        }
        // Hosts that are none.
        for host in [
            "",
            "Host: localhost\r\nHost: localhost\r\n",
            "Host: \r\n",
            "Host: localhost/v1/models?\r\n",
            "Host: localhost#\r\n",
            "Host: user@localhost\r\n",
            "Host: localhost:80:80\r\n",
            "Host: localhost:\r\n",
            "Host: [::1\r\n",
            "Host: a b\r\n",
            "Host: localhost?\r\n",
            "Host: localhost\\\r\n",
        ] {
            corpus.case("access: odd hosts", host, &bare("GET", path, host), &[400]);
        }
        for target in [
            format!("http://localhost{path}"),
            format!("https://evil.example{path}"),
            format!("http://user:key@localhost{path}"),
        ] {
            corpus.case("access: absolute targets", &target, &bare("GET", &target, host), &[400]);
        }
        // What proxies add must not open anything.
        for header in [
            "X-Original-URL: /health",
            "X-Rewrite-URL: /health",
            "X-Forwarded-For: 127.0.0.1",
            "X-HTTP-Method-Override: GET",
        ] {
            let request = bare("GET", path, &format!("{host}{header}\r\n"));
            corpus.case("access: proxy headers", header, &request, here);
        }
    }
}

pub fn methods(corpus: &mut Corpus) {
    let host = "Host: localhost\r\n";
    let keyed = format!("{host}Authorization: Bearer {KEY}\r\n");
    for path in &OTHERS[..6] {
        let allowed = if *path == "/v1/models" { &["GET", "HEAD"][..] } else { &["POST"][..] };
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "PRI", "X"]
        {
            corpus.case("access: methods", method, &bare(method, path, host), &[401]);
            let expected: &[Status] = match allowed.contains(&method) {
                // A body is missing.
                true if method == "POST" => &[400],
                true => &[200],
                false => &[405],
            };
            corpus.case("access: methods", method, &bare(method, path, &keyed), expected);
        }
    }
    for path in PUBLIC {
        for method in ["PUT", "PATCH", "DELETE", "TRACE", "get", "X"] {
            corpus.case("access: methods", method, &bare(method, path, host), &[405]);
        }
    }
    for target in ["localhost:80", "*", "/health"] {
        // hyper knows no target for it.
        corpus.case("access: methods", target, &bare("CONNECT", target, host), &[0, 400, 401, 405]);
    }
    corpus.case("access: methods", "asterisk", &bare("OPTIONS", "*", host), &[400, 401]);
}

pub fn keys(corpus: &mut Corpus) {
    let half = &KEY[..8];
    let upper = KEY.to_ascii_uppercase();
    let long = KEY.repeat(2000);
    for path in OTHERS {
        let wrong = [
            String::new(),
            "Authorization: \r\n".into(),
            "Authorization: Bearer\r\n".into(),
            "Authorization: Bearer \r\n".into(),
            format!("Authorization: {KEY}\r\n"),
            format!("Authorization: Bearer {half}\r\n"),
            format!("Authorization: Bearer {KEY}x\r\n"),
            format!("Authorization: Bearer {upper}\r\n"),
            format!("Authorization: Bearer  {KEY}\r\n"),
            format!("Authorization: Bearer \"{KEY}\"\r\n"),
            format!("Authorization: Basic {KEY}\r\n"),
            format!("Authorization: Bearer {KEY}, Bearer {KEY}\r\n"),
            format!("Authorization: Bearer {KEY}\r\nAuthorization: Bearer {KEY}\r\n"),
            format!("Authorization: Bearer \u{fc}{KEY}\r\n"),
            format!("Authorization: Bearer {long}\r\n"),
            format!("Proxy-Authorization: Bearer {KEY}\r\n"),
            format!("X-Api-Key: {KEY}\r\n"),
            format!("Cookie: Authorization=Bearer {KEY}\r\n"),
        ];
        for header in &wrong {
            let request = bare("GET", path, &format!("Host: localhost\r\n{header}"));
            corpus.case("access: keys", header, &request, &[401]);
        }
    }
    // The key itself opens, also where a client writes the scheme in its own way.
    for scheme in ["Bearer", "bearer", "BEARER"] {
        let header = format!("Host: localhost\r\nAuthorization: {scheme} {KEY}\r\n");
        corpus.case("access: keys", scheme, &bare("GET", "/v1/models", &header), &[200]);
        corpus.case("access: keys", scheme, &bare("GET", "/admin", &header), &[404]);
    }
    let query = format!("/v1/models?api_key={KEY}");
    corpus.case("access: keys", "in the query", &bare("GET", &query, "Host: localhost\r\n"), &[401]);
}

pub fn every_documented_route_is_classified(corpus: &mut Corpus) {
    let document: Value = exchange(&corpus.server, &get("/openapi.json")).json();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 14, "{}", paths.len());
    for (path, item) in paths {
        for (method, operation) in item.as_object().unwrap() {
            let request = bare(&method.to_ascii_uppercase(), path, "Host: localhost\r\n");
            let expected: &[Status] = match PUBLIC.contains(&path.as_str()) {
                true => &[200],
                false => &[401],
            };
            let answer = corpus.case("access: documented routes", path, &request, expected);
            let documented = &operation["responses"][answer.status.to_string()];
            assert!(documented.is_object(), "{method} {path}: {} is not documented", answer.status);
        }
    }
}

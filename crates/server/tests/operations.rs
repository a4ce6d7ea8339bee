//! What operators set up: quotas, browsers, paths of proxies, defaults of templates; and the metrics, read strictly.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Mock, Reply, Running, encode, ids, until};
use longhaul_server::{ApiKeys, Config, Cors, STEP_ROWS, Snapshot};
use serde_json::{Map, Value, json};

fn start(config: Config) -> (Arc<Mock>, Running) {
    let mock = Arc::new(Mock::saying("one two three four<|im_end|>"));
    let server = Running::start(&mock, config);
    (mock, server)
}

fn post(server: &Running, key: &str, body: &Value) -> Reply {
    let bearer = format!("Bearer {key}");
    server.request("POST", "/v1/completions", &[("Authorization", &bearer)], Some(&body.to_string()))
}

#[test]
fn a_key_has_what_its_line_says() {
    let keys = "free\nslow rpm=2 name=team-slow\nsmall tpm=5 priority=3\n";
    let (mock, server) = start(Config { api_keys: ApiKeys::parse(keys).unwrap(), ..Config::default() });
    let body = json!({"prompt": "a b c", "priority": 1});
    for _ in 0..4 {
        assert_eq!(post(&server, "free", &body).status, 200);
    }
    assert_eq!(mock.last().priority, 1);
    // Two requests a minute.
    assert_eq!([0; 3].map(|_| post(&server, "slow", &body).status), [200, 200, 429]);
    let reply = post(&server, "slow", &body);
    let retry: u64 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=30).contains(&retry), "{reply:?}");
    assert_eq!(reply.json()["error"]["type"], "RateLimitError");
    assert!(reply.error().contains("2 requests a minute"), "{reply:?}");
    // What it costs is known in the end: the next one pays.
    assert_eq!(post(&server, "small", &body).status, 200);
    assert_eq!(mock.last().priority, 4);
    until(|| post(&server, "small", &body).status == 429);
    assert!(post(&server, "small", &body).error().contains("5 tokens a minute"));
    assert_eq!(post(&server, "free", &body).status, 200, "nobody pays for another");
    assert!(server.outcomes("shed_429") >= 4.0);
}

#[test]
fn requests_of_a_key_at_a_time_are_bounded_until_they_end() {
    let mock = Mock::new(|_, sink| until(|| sink.is_cancelled()));
    let mock = Arc::new(mock);
    let keys = ApiKeys::parse("busy concurrent=1").unwrap();
    let server = Running::start(&mock, Config { api_keys: keys, ..Config::default() });
    let headers = [("Authorization", "Bearer busy")];
    let body = json!({"prompt": "x", "stream": true}).to_string();
    let mut first = server.connect();
    first.write_all(&encode("POST", "/v1/completions", &headers, Some(&body))).unwrap();
    until(|| mock.running.load(Ordering::SeqCst) == 1);
    let second = post(&server, "busy", &json!({"prompt": "x"}));
    assert_eq!((second.status, second.header("retry-after")), (429, Some("1")));
    // What needs no place of the engine does not take one.
    assert_eq!(server.request("GET", "/v1/models", &headers, None).status, 200);
    drop(first);
    mock.idle_after(1);
    let third = || {
        let mut client = server.connect();
        client.write_all(&encode("POST", "/v1/completions", &headers, Some(&body))).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        mock.running.load(Ordering::SeqCst) == 1
    };
    until(third);
}

#[test]
fn pages_of_other_origins_call_only_where_they_may() {
    let origin = |value: &str| value.parse().unwrap();
    let ask = |server: &Running, origin: &str| {
        let headers = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization,content-type"),
        ];
        server.request("OPTIONS", "/v1/chat/completions", &headers, None)
    };
    // As it comes: no page.
    let (_, server) = start(Config::default());
    let asked = ask(&server, "https://chat.example");
    assert_eq!((asked.status, asked.header("access-control-allow-origin")), (405, None));

    // Keys are asked for as ever; what browsers ask before they send one is not.
    let api_keys = ApiKeys::new(["sesame"]).unwrap();
    let cors = Cors { origins: vec![origin("https://chat.example")], ..Cors::default() };
    let (_, server) = start(Config { api_keys: api_keys.clone(), cors, ..Config::default() });
    let asked = ask(&server, "https://chat.example");
    assert_eq!(asked.status, 200);
    assert_eq!(asked.header("access-control-allow-origin"), Some("https://chat.example"));
    assert_eq!(asked.header("access-control-allow-headers"), Some("authorization,content-type"));
    assert!(asked.header("access-control-allow-methods").unwrap().contains("POST"));
    assert_eq!(ask(&server, "https://evil.example").header("access-control-allow-origin"), None);
    let call = |key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [("Origin", "https://chat.example"), ("Authorization", bearer.as_str())];
        let reply =
            server.request("POST", "/v1/completions", &headers, Some(&json!({"prompt": "x"}).to_string()));
        (reply.status, reply.header("access-control-allow-origin").map(str::to_owned))
    };
    assert_eq!(call("sesame"), (200, Some("https://chat.example".into())));
    assert_eq!(call("wrong").0, 401);

    let cors = Cors { origins: vec![origin("*")], ..Cors::default() };
    let (_, server) = start(Config { api_keys, cors, ..Config::default() });
    assert_eq!(ask(&server, "https://any.example").header("access-control-allow-origin"), Some("*"));
}

#[test]
fn a_path_of_a_proxy_may_stand_before_every_route() {
    let config =
        Config { root_path: "/llm".into(), api_keys: ApiKeys::new(["sesame"]).unwrap(), ..Config::default() };
    let (_, server) = start(config);
    let get = |path: &str, key: &str| {
        server.request("GET", path, &[("Authorization", &format!("Bearer {key}"))], None).status
    };
    for path in ["/llm/v1/models", "/v1/models"] {
        assert_eq!((get(path, "sesame"), get(path, "wrong")), (200, 401), "{path}");
    }
    assert_eq!(get("/llm/health", "wrong"), 200);
    for path in ["/llm", "/llmv1/models", "/llm/llm/v1/models", "/other/v1/models"] {
        assert_eq!(get(path, "sesame"), 404, "{path}");
    }
}

#[test]
fn templates_have_the_operators_variables_unless_a_request_says_otherwise() {
    let template_variables = Map::from_iter([("mood".to_owned(), json!("calm"))]);
    let (_, server) = start(Config { template_variables, tokens_as_ids: true, ..Config::default() });
    let chat = json!({"messages": [{"role": "user", "content": "x"}]});
    let prompt = |body: &Value| server.post("/v1/chat/completions/render", body).json();
    let rendered = prompt(&chat);
    assert!(rendered["prompt"].as_str().unwrap().ends_with("calm"), "{rendered}");
    assert_eq!(server.post("/tokenize", &chat).json()["tokens"], rendered["token_ids"]);
    let mut own = chat.clone();
    own["chat_template_kwargs"] = json!({"mood": "wild"});
    assert!(prompt(&own)["prompt"].as_str().unwrap().ends_with("wild"));
    // Tokens by their ids, though nobody asked.
    let body = json!({"prompt": "x", "logprobs": 1});
    let tokens = server.post("/v1/completions", &body).json()["choices"][0]["logprobs"]["tokens"].clone();
    assert!(
        tokens.as_array().unwrap().iter().all(|t| t.as_str().unwrap().starts_with("token_id:")),
        "{tokens}"
    );
}

/// A sample of the text format: name, labels, value.
type Sample = (String, BTreeMap<String, String>, f64);

fn sample(line: &str) -> Sample {
    let is_name = |name: &str| {
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_' || c == ':');
        first && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    };
    let (name, rest) = match line.find('{') {
        Some(at) => line.split_at(at),
        None => line.split_at(line.find(' ').unwrap()),
    };
    assert!(is_name(name), "{line}");
    let mut labels = BTreeMap::new();
    let mut rest = rest;
    if let Some(mut inner) = rest.strip_prefix('{') {
        loop {
            let (label, after) = inner.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
            assert!(is_name(label) && !label.contains(':') && !label.starts_with("__"), "{line}");
            let mut value = String::new();
            let mut characters = after.char_indices();
            let end = loop {
                match characters.next().unwrap_or_else(|| panic!("{line}")) {
                    (at, '"') => break at,
                    (_, '\\') => value.push(match characters.next().unwrap().1 {
                        'n' => '\n',
                        c @ ('\\' | '"') => c,
                        c => panic!("\\{c} in {line}"),
                    }),
                    (_, c) => value.push(c),
                }
            };
            assert!(labels.insert(label.to_owned(), value).is_none(), "{label} twice in {line}");
            inner = &after[end + 1..];
            match inner.strip_prefix(',') {
                Some(more) => inner = more,
                None => break,
            }
        }
        rest = inner.strip_prefix('}').unwrap_or_else(|| panic!("{line}"));
    }
    let value = rest.strip_prefix(' ').unwrap_or_else(|| panic!("{line}"));
    (name.to_owned(), labels, value.parse().unwrap_or_else(|_| panic!("{line}")))
}

/// Reads a page as strictly as Prometheus and its linter do; samples by their family.
fn families(page: &str) -> BTreeMap<String, (String, Vec<Sample>)> {
    assert!(page.ends_with('\n'));
    let mut families: BTreeMap<String, (String, Vec<Sample>)> = BTreeMap::new();
    let (mut helped, mut current) = (String::new(), String::new());
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            helped = help.split_once(' ').unwrap().0.to_owned();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, helped, "help comes first");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(kind != "counter" || name.ends_with("_total"), "{line}");
            assert!(families.insert(name.to_owned(), (kind.to_owned(), vec![])).is_none(), "{name} twice");
            current = name.to_owned();
        } else {
            let sample = sample(line);
            let (kind, samples) = families.get_mut(&current).unwrap_or_else(|| panic!("{line}"));
            let suffix =
                sample.0.strip_prefix(current.as_str()).unwrap_or_else(|| panic!("{line} in {current}"));
            let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.contains(&suffix), "{line} in {current}");
            samples.push(sample);
        }
    }
    for (name, (kind, samples)) in &families {
        let series: BTreeSet<_> = samples.iter().map(|(name, labels, _)| (name, labels)).collect();
        assert_eq!(series.len(), samples.len(), "{name} has a series twice");
        assert!(kind != "counter" || samples.iter().all(|(_, _, value)| *value >= 0.0), "{name}");
        if kind == "histogram" {
            buckets(name, samples);
        }
    }
    families
}

/// Buckets grow, end with all, and every series has its sum and count.
fn buckets(name: &str, samples: &[Sample]) {
    let mut series: BTreeMap<BTreeMap<String, String>, Vec<(f64, f64)>> = BTreeMap::new();
    let (mut sums, mut counts) = (BTreeMap::new(), BTreeMap::new());
    for (sample, labels, value) in samples {
        let mut labels = labels.clone();
        match sample.strip_prefix(name).unwrap() {
            "_bucket" => {
                let bound: f64 = labels.remove("le").unwrap().parse().unwrap();
                series.entry(labels).or_default().push((bound, *value));
            }
            "_sum" => assert!(sums.insert(labels, *value).is_none()),
            _ => assert!(counts.insert(labels, *value).is_none()),
        }
    }
    assert!(series.keys().eq(sums.keys()) && series.keys().eq(counts.keys()), "{name}");
    for (labels, buckets) in series {
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{name} {buckets:?}");
        let (bound, all) = buckets.last().unwrap();
        assert!(bound.is_infinite() && *all == counts[&labels], "{name} {buckets:?}");
    }
}

#[test]
fn the_metrics_page_is_what_prometheus_reads() {
    let mut rows = [0; STEP_ROWS.len() + 1];
    (rows[0], rows[3], rows[STEP_ROWS.len()]) = (5, 2, 1);
    let snapshot = Snapshot {
        steps: 8,
        step_rows: rows,
        step_rows_sum: 9_000,
        request_preemptions: [7, 2, 0, 0, 0, 0, 1],
        request_preemptions_sum: 30,
        ..Snapshot::default()
    };
    let mock = Mock::saying("one two three<|im_end|>").with_snapshot(snapshot);
    let mock = Arc::new(mock.with_model(|model| model.root = "a \"quoted\" \\ name".into()));
    let server = Running::unloaded(Config::default());
    // Also before there is a model.
    families(&server.get("/metrics").body);
    server.lifecycle.ready(mock.clone());
    for stream in [false, true] {
        server
            .post("/v1/completions", &json!({"prompt": "alpha beta gamma delta", "n": 2, "stream": stream}));
    }
    server.post("/v1/completions", &json!({"prompt": "x", "nonsense": 1}));
    server.request("X-ODD", "/v1/completions", &[], None);
    let reply = server.get("/metrics");
    assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let families = families(&reply.body);
    let histogram = |name: &str, sum: f64, count: f64| {
        let (kind, samples) = &families[name];
        assert_eq!(kind, "histogram", "{name}");
        let value = |suffix: &str| {
            let found = samples.iter().find(|(sample, _, _)| *sample == format!("{name}{suffix}"));
            found.unwrap_or_else(|| panic!("{name}{suffix}")).2
        };
        assert_eq!((value("_sum"), value("_count")), (sum, count), "{name}");
    };
    histogram("vllm:iteration_tokens_total", 9_000.0, 8.0);
    histogram("vllm:request_num_preemptions", 30.0, 10.0);
    // Three tokens of each prompt were found in the cache.
    let prompts = 2.0 * ids("alpha beta gamma delta").len() as f64;
    histogram("vllm:request_prompt_tokens", prompts, 2.0);
    histogram("vllm:request_prefill_kv_computed_tokens", prompts - 6.0, 2.0);
    histogram("vllm:request_params_n", 4.0, 2.0);
    assert_eq!(families["vllm:request_max_num_generation_tokens"].1.last().unwrap().2, 2.0);
    let sources = families["vllm:prompt_tokens_by_source_total"].1.iter();
    assert_eq!(sources.map(|(_, _, value)| *value).collect::<Vec<_>>(), [prompts - 6.0, 6.0, 0.0]);
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "vllm:gpu_prefix_cache_hits_total",
        "vllm:engine_sleep_state",
        "vllm:cache_config_info",
        "vllm:num_preemptions_total",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "http_requests_total",
        "http_request_duration_seconds",
        "longhaul_handshake_errors_total",
    ] {
        assert!(families.contains_key(name), "{name}");
    }
    let labels = &families["vllm:num_requests_running"].1[0].1;
    assert_eq!((labels["model_name"].as_str(), labels["engine"].as_str()), ("a \"quoted\" \\ name", "0"));
}

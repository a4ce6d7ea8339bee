//! Records of requests in the log. It is the process's: other tests of requests do not belong here.

mod common;

use std::io::Write;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{Mock, Running, encode, until};
use longhaul_server::{ApiKeys, Config, Level, Log, LogContent, LogFormat, LogOptions, Refusal};
use serde_json::{Value, json};

/// A log that can be read.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Sink {
    /// Every line, each of which must be one JSON object.
    fn lines(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let object = |line: &str| {
            let value: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            assert!(value.is_object(), "{line}");
            value
        };
        text.lines().map(object).collect()
    }

    /// The record of a request, as soon as it is written.
    fn record(&self, log: &Log, id: &str) -> Value {
        let find = || {
            log.flush();
            self.lines().into_iter().find(|line| line["id"] == id && line["message"] == "request")
        };
        until(|| find().is_some());
        find().unwrap()
    }
}

#[test]
fn every_request_leaves_one_record_that_its_client_cannot_break() {
    let sink = Sink::default();
    let options = LogOptions { format: LogFormat::Json, level: Level::Info, requests: Level::Info };
    let log = Log::install(options, sink.clone()).unwrap();
    assert!(Log::install(options, sink.clone()).is_err(), "events go to one log");

    let mock = Arc::new(Mock::saying("fine, thanks<|im_end|>"));
    let config = Config {
        api_keys: ApiKeys::new(["canary"]).unwrap(),
        log: LogContent {
            requests: true,
            outputs: true,
            max_len: 6,
            silent_routes: vec!["/detokenize".into()],
        },
        log_drops: Some(log.dropped()),
        ..Config::default()
    };
    let server = Running::start(&mock, config);
    let send = |id: &str, path: &str, key: &str, body: &Value| {
        let bearer = format!("Bearer {key}");
        let headers = [("X-Request-Id", id), ("Authorization", bearer.as_str())];
        server.request("POST", path, &headers, Some(&body.to_string())).status
    };

    // A stream and a whole answer, with who asked, what it cost and how long it took.
    for (id, stream) in [("whole", false), ("streamed", true)] {
        let body = json!({"prompt": "hello there\r\n\u{1b}[2J", "stream": stream, "temperature": 0.5});
        assert_eq!(send(id, "/v1/completions", "canary", &body), 200);
        let record = sink.record(&log, id);
        assert_eq!(record["level"], "INFO");
        assert_eq!((&record["route"], &record["method"]), (&json!("/v1/completions"), &json!("POST")));
        assert_eq!((&record["status"], &record["outcome"]), (&json!(200), &json!("stop")));
        assert_eq!((&record["model"], record["key"].as_str().unwrap().len()), (&json!("mock"), 16));
        assert!(
            record["prompt_tokens"].as_u64().unwrap() > 0
                && record["completion_tokens"].as_u64().unwrap() > 0
        );
        assert_eq!(record["cached_tokens"], 3);
        let time = |name: &str| record[name].as_f64().unwrap_or_else(|| panic!("{name} in {record}"));
        assert!(time("started_ms") <= time("first_token_ms") && time("first_token_ms") <= time("total_ms"));
        let said = sink.lines();
        let of = |message: &str| {
            let found = said.iter().find(|line| {
                line["message"] == message
                    && line["id"].as_str().is_some_and(|i| i.ends_with(id) || i.contains(id))
            });
            found.unwrap_or_else(|| panic!("{message} of {id}"))
        };
        assert_eq!(of("request answered")["output"], "fine, …");
        let submitted = of("request submitted");
        assert_eq!((&submitted["temperature"], &submitted["n"]), (&json!(0.5), &json!(1)));
        assert!(submitted["prompt"].as_str().unwrap().chars().count() <= 7, "{submitted}");
    }

    // Requests that end otherwise.
    assert_eq!(send("no-key", "/v1/completions", "wrong", &json!({"prompt": "x"})), 401);
    let record = sink.record(&log, "no-key");
    assert_eq!((&record["status"], &record["outcome"]), (&json!(401), &Value::Null));
    mock.refuse(Some(Refusal::Unavailable("dead".into())));
    assert_eq!(send("refused", "/v1/completions", "canary", &json!({"prompt": "x"})), 503);
    assert_eq!(sink.record(&log, "refused")["outcome"], "shed_503");
    mock.refuse(None);
    assert_eq!(send("wrong", "/v1/chat/completions", "canary", &json!({"messages": "x"})), 400);
    assert_eq!(sink.record(&log, "wrong")["outcome"], "invalid_4xx");

    // What would break a line or a terminal.
    let evil = "x\r\n{\"level\":\"ERROR\"}\u{2028}\u{0}\u{1b}]0;pwned\u{7}";
    assert_eq!(
        send("evil", "/v1/completions", "canary", &json!({"prompt": evil, "model": evil, "user": evil})),
        404
    );
    sink.record(&log, "evil");
    assert_eq!(send("evil-2", "/v1/completions", "canary", &json!({"prompt": evil, "stop": [evil]})), 200);
    sink.record(&log, "evil-2");
    let path = server.raw(
        b"GET /x%0a%1b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-Id: a\"b\r\n\r\n"
            .as_slice(),
    );
    assert_eq!(path.status, 401);

    // Probes are not recorded, nor is what was said to be silent.
    server.get("/health");
    assert_eq!(send("silent", "/detokenize", "canary", &json!({"tokens": [1]})), 200);
    assert_eq!(send("last", "/tokenize", "canary", &json!({"prompt": "x"})), 200);
    sink.record(&log, "last");
    let lines = sink.lines();
    assert!(!lines.iter().any(|line| line["id"] == "silent" || line["route"] == "/health"));
    let counted = lines.iter().filter(|line| line["message"] == "request").count();
    assert_eq!(counted, 9, "one record a request");
    assert!(!format!("{lines:?}").contains("canary"), "a key is never logged");
    assert_eq!(server.metric("longhaul_log_lines_dropped_total"), 0.0);
    let raw = sink.0.lock().unwrap().clone();
    assert!(!raw.iter().any(|byte| *byte < 0x20 && *byte != b'\n'), "control characters are escaped");

    // A client that leaves has a record, too.
    let endless = Mock::new(|_, sink| {
        while !sink.is_cancelled() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    });
    let endless = Arc::new(endless);
    let server = Running::start(&endless, Config::default());
    let mut client = server.connect();
    let body = json!({"prompt": "x"}).to_string();
    client.write_all(&encode("POST", "/v1/completions", &[("X-Request-Id", "leaver")], Some(&body))).unwrap();
    until(|| endless.running.load(Ordering::SeqCst) == 1);
    drop(client);
    let record = sink.record(&log, "leaver");
    assert_eq!((&record["status"], &record["outcome"]), (&json!(499), &json!("client_gone")));
}

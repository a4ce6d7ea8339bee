//! Loading, cancelling, overload, panics and the end.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{Mock, Running, encode, ids, parse_reply, read_reply, say, score, until};
use longhaul_server::{Config, Drained, Event, EventSink, Finish, Limits, Phase, Refusal, Submission};
use serde_json::json;

/// Generates until it is told to end.
fn endless(submission: &Submission, sink: &EventSink) {
    sink.send(Event::Started { cached_tokens: 0 });
    let id = ids("a")[0];
    for _ in 0..1_000_000 {
        if sink.is_cancelled() || (0..submission.n).all(|choice| sink.is_stopped(choice)) {
            return;
        }
        if !sink.send(Event::Token { choice: 0, token: score(id, None), finish: None }) {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn endless_server(config: Config) -> (Arc<Mock>, Running) {
    let mock = Arc::new(Mock::new(endless));
    let server = Running::start(&mock, config);
    (mock, server)
}

fn completion(stream: bool) -> Vec<u8> {
    encode(
        "POST",
        "/v1/completions",
        &[],
        Some(&json!({"prompt": "x", "max_tokens": 4000, "stream": stream}).to_string()),
    )
}

#[test]
fn a_server_answers_while_it_loads() {
    let server = Running::unloaded(Config::default());
    assert_eq!(server.get("/live").status, 200);
    assert_eq!(server.get("/health").status, 503);
    server.lifecycle.progress(3, 10);
    let ready = server.get("/ready");
    assert_eq!(ready.status, 503);
    assert_eq!(ready.json(), json!({"status": "loading", "loaded_bytes": 3, "total_bytes": 10}));
    let early = server.post("/v1/completions", &json!({"prompt": "x"}));
    assert_eq!((early.status, early.header("retry-after")), (503, Some("5")));
    assert_eq!(server.get("/v1/models").status, 503);
    assert_eq!(server.get("/metrics").status, 200);
    let mock = Arc::new(Mock::saying("ok"));
    server.lifecycle.ready(mock.clone());
    assert_eq!(server.get("/ready").json(), json!({"status": "ready"}));
    assert_eq!(server.get("/health").body, "");
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x"})).status, 200);
    mock.sicken();
    assert_eq!((server.get("/health").status, server.get("/live").status), (503, 200));
    assert_eq!(server.get("/ready").json()["reason"], "no step for 5 s");
}

#[test]
fn a_model_that_cannot_be_loaded_ends_the_server() {
    let server = Running::unloaded(Config::default());
    server.lifecycle.abandon();
    assert_eq!(server.join(), Drained { cut: 0 });
}

#[test]
fn a_client_that_leaves_cancels_its_request() {
    let (mock, server) = endless_server(Config::default());
    let mut left = 0;
    for stream in [true, false] {
        for half_close in [false, true] {
            let mut client = server.connect();
            client.write_all(&completion(stream)).unwrap();
            if stream {
                // Something of the stream arrived.
                client.read_exact(&mut [0; 400]).unwrap();
            } else {
                until(|| mock.running.load(Ordering::SeqCst) == 1);
            }
            // A client that will not send any more has left, too: nothing else tells it from one that is gone.
            let kept = half_close.then(|| client.try_clone().unwrap());
            client.shutdown(if half_close { Shutdown::Write } else { Shutdown::Both }).unwrap();
            drop(client);
            left += 1;
            mock.idle_after(left);
            drop(kept);
            until(|| server.outcomes("client_gone") == left as f64);
        }
    }
    assert_eq!(server.metric("longhaul_requests_received_total{model_name=\"mock\",engine=\"0\"}"), 4.0);
}

#[test]
fn a_reader_that_is_too_slow_is_cut_and_the_engine_never_waits() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let mock = Mock::new(move |_, sink| {
        // As fast as it goes, for ever: only a full queue ends it.
        while sink.send(Event::Token { choice: 0, token: score(5, Some(20)), finish: None }) {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let mock = Arc::new(mock.with_events(64));
    let server = Running::start(&mock, Config::default());
    let body = json!({"prompt": "x", "max_tokens": 4000, "stream": true, "logprobs": 20}).to_string();
    let mut client = server.connect();
    client.write_all(&encode("POST", "/v1/completions", &[], Some(&body))).unwrap();
    mock.idle_after(1);
    assert!(sent.load(Ordering::SeqCst) >= 64);
    // What was sent before is whole, and the end says why.
    let events = read_reply(client).events();
    assert!(events.last().unwrap()["error"]["message"].as_str().unwrap().contains("too slowly"));
    assert_eq!(server.outcomes("client_gone"), 1.0);
}

#[test]
fn a_client_that_takes_nothing_is_cut() {
    let mock = Mock::new(|_, sink| {
        while sink.send(Event::Token { choice: 0, token: score(5, Some(20)), finish: None }) {
            std::thread::sleep(Duration::from_micros(50));
        }
    });
    let mock = Arc::new(mock.with_events(1 << 20));
    let limits = Limits { write_time: Duration::from_millis(200), ..Limits::default() };
    let server = Running::start(&mock, Config { limits, ..Config::default() });
    let body = json!({"prompt": "x", "max_tokens": 4000, "stream": true, "logprobs": 20}).to_string();
    let mut client = server.connect();
    client.write_all(&encode("POST", "/v1/completions", &[], Some(&body))).unwrap();
    // The socket's buffers fill, then no byte moves.
    mock.idle_after(1);
    assert_eq!(server.outcomes("client_gone"), 1.0);
    drop(client);
}

#[test]
fn refusals_have_their_status_and_a_time_to_come_back() {
    let mock = Arc::new(Mock::saying("ok"));
    let server = Running::start(&mock, Config::default());
    let retry_after = Duration::from_secs(7);
    for (refusal, status, retry) in [
        (Refusal::Quota { reason: "your quota".into(), retry_after }, 429, Some("7")),
        (Refusal::Saturated { reason: "300 requests are waiting".into(), retry_after }, 503, Some("7")),
        (Refusal::Unavailable("the engine is dead".into()), 503, None),
        (Refusal::Field { field: "n", message: "is too many".into() }, 400, None),
    ] {
        mock.refuse(Some(refusal.clone()));
        for stream in [false, true] {
            let reply = server.post("/v1/completions", &json!({"prompt": "x", "stream": stream}));
            assert_eq!((reply.status, reply.header("retry-after")), (status, retry), "{reply:?}");
            assert_eq!(reply.error(), refusal.to_string());
        }
    }
    for (outcome, count) in [("shed_429", 2.0), ("shed_503", 4.0), ("invalid_4xx", 2.0)] {
        assert_eq!(server.outcomes(outcome), count, "{outcome}");
    }
}

#[test]
fn a_panic_is_one_request_s_affair() {
    // An engine that breaks its promise panics in the submission, on the handler's task.
    let mock = Arc::new(Mock::saying("ok"));
    let server = Running::start(&mock, Config::default());
    let poison = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _held = mock.submissions.lock().unwrap();
        panic!("poisons the lock that submit takes");
    }));
    assert!(poison.is_err());
    for _ in 0..3 {
        let reply = server.post("/v1/completions", &json!({"prompt": "x"}));
        assert_eq!((reply.status, reply.json()["error"]["code"].clone()), (500, json!(500)));
    }
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.metric("longhaul_panics_total"), 3.0);
    assert_eq!(server.outcomes("engine_error_500"), 3.0);
}

#[test]
fn a_drain_finishes_what_runs_and_refuses_the_rest() {
    let finish = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&finish);
    let mock = Arc::new(Mock::new(move |submission, sink| {
        sink.send(Event::Started { cached_tokens: 0 });
        until(|| told.load(Ordering::SeqCst));
        say(&ids("done<|im_end|>"), submission, sink);
    }));
    let server = Running::start(&mock, Config::default());
    let clients: Vec<_> = [true, false, true]
        .into_iter()
        .map(|stream| {
            let mut client = server.connect();
            client.write_all(&completion(stream)).unwrap();
            client
        })
        .collect();
    until(|| mock.running.load(Ordering::SeqCst) == 3);
    server.stop();
    until(|| server.get("/ready").status == 503);
    assert_eq!(server.get("/ready").json()["status"], "draining");
    until(|| matches!(server.lifecycle.phase(), Phase::Draining));
    let late = server.post("/v1/completions", &json!({"prompt": "x"}));
    assert_eq!(
        (late.status, late.header("connection"), late.header("retry-after")),
        (503, Some("close"), Some("1"))
    );
    assert_eq!(mock.running.load(Ordering::SeqCst), 3);
    finish.store(true, Ordering::SeqCst);
    for client in clients {
        let reply = read_reply(client);
        assert!(reply.status == 200 && reply.body.contains("\"finish_reason\":\"stop\""), "{reply:?}");
    }
    assert_eq!(server.join(), Drained { cut: 0 });
}

#[test]
fn a_second_signal_cuts_with_an_error_and_never_silently() {
    let aborted = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&aborted);
    let mock = Mock::new(move |_, sink| {
        sink.send(Event::Started { cached_tokens: 0 });
        sink.send(Event::Token { choice: 0, token: score(5, None), finish: None });
        until(|| seen.load(Ordering::SeqCst) || sink.is_cancelled());
    });
    let mock = Arc::new(mock.with_aborted(aborted));
    let server = Running::start(&mock, Config::default());
    let mut streamed = server.connect();
    streamed.write_all(&completion(true)).unwrap();
    let mut bytes = vec![0; 300];
    streamed.read_exact(&mut bytes).unwrap();
    let mut whole = server.connect();
    whole.write_all(&completion(false)).unwrap();
    until(|| mock.running.load(Ordering::SeqCst) == 2);
    server.stop();
    server.stop();
    streamed.read_to_end(&mut bytes).unwrap();
    let events = parse_reply(&bytes).events();
    assert_eq!(events.last().unwrap()["error"]["code"], 503);
    assert_eq!(read_reply(whole).status, 503);
    assert_eq!(server.join(), Drained { cut: 2 });
}

#[test]
fn the_delay_before_a_drain_still_accepts() {
    let mock = Arc::new(Mock::saying("ok"));
    let config = Config { drain_delay: Duration::from_secs(3600), ..Config::default() };
    let server = Running::start(&mock, config);
    server.stop();
    until(|| server.get("/ready").status == 503);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x"})).status, 200);
    assert_eq!(server.get("/health").status, 200);
    server.stop();
    assert_eq!(server.join(), Drained { cut: 0 });
}

#[test]
fn the_ledger_balances() {
    let mock = Arc::new(Mock::new(|submission, sink| {
        sink.send(Event::Started { cached_tokens: 0 });
        for choice in 0..submission.n {
            let finish =
                Some(if submission.max_tokens == 1 { Finish::Length } else { Finish::EndOfSequence });
            sink.send(Event::Token { choice, token: score(5, None), finish });
        }
    }));
    let server = Running::start(&mock, Config::default());
    for max_tokens in [1, 2, 1] {
        server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": max_tokens}));
    }
    server.post("/v1/completions", &json!({"prompt": "x", "nonsense": 1}));
    server.post("/v1/completions", &json!({"prompt": "x", "model": "nonsense"}));
    server.post("/tokenize", &json!({"prompt": "x"}));
    let count = |outcome| server.outcomes(outcome);
    assert_eq!((count("length"), count("stop"), count("invalid_4xx")), (2.0, 2.0, 2.0));
    let labels = "{model_name=\"mock\",engine=\"0\"}";
    assert_eq!(server.metric(&format!("longhaul_requests_received_total{labels}")), 6.0);
    assert_eq!(server.metric(&format!("vllm:generation_tokens_total{labels}")), 3.0);
    assert_eq!(server.metric(&format!("vllm:time_to_first_token_seconds_count{labels}")), 3.0);
    assert_eq!(server.get("/load").json(), json!({"server_load": 0}));
}

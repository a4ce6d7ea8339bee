//! `longhaul serve` as a user and an orchestrator see it, with the demo model.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::serve::{Serve, read, request};
use common::{fail, json_output, longhaul};
use serde_json::{Value, json};

#[test]
fn answers_are_those_of_the_commands() {
    let server = Serve::start(&[]);
    let mut command = longhaul();
    command.args([
        "generate",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--json",
        "--max-tokens",
        "12",
        "--prompt",
    ]);
    let alone = json_output(command.arg("The secret code of Lisbon is"));
    let body = json!({"prompt": "The secret code of Lisbon is", "max_tokens": 12, "temperature": 0, "return_token_ids": true});
    let choice = server.post("/v1/completions", &body)["choices"][0].clone();
    assert_eq!(choice["text"], alone["text"], "{choice}");
    assert_eq!(choice["finish_reason"], alone["finish_reason"]);
    let ids: Vec<Value> = alone["ids"].as_array().unwrap().clone();
    assert!(choice["token_ids"].as_array().unwrap().starts_with(&ids), "{choice} {alone}");

    // A seed draws the same tokens again, streamed or not.
    let mut seeded = json!({"prompt": "The river", "max_tokens": 12, "seed": 11, "ignore_eos": true});
    let whole = server.post("/v1/completions", &seeded)["choices"][0]["text"].clone();
    seeded["stream"] = json!(true);
    let stream = read(server.connect(&request(&seeded)));
    let streamed: String = stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: ").filter(|data| *data != "[DONE]"))
        .map(|data| {
            let event: Value = serde_json::from_str(data).unwrap();
            event["choices"][0]["text"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(json!(streamed), whole);

    let chat = json!({"messages": [{"role": "user", "content": "What is the secret code of Lisbon?"}], "max_tokens": 8});
    let answer = server.post("/v1/chat/completions", &chat);
    assert_eq!(
        answer["usage"]["completion_tokens"].as_u64().unwrap().min(8),
        answer["usage"]["completion_tokens"]
    );
    assert_eq!(answer["model"], "demo");

    // Scores of the prompt are log probabilities: they sum up to less than one.
    let scored = json!({"prompt": "The river runs", "max_tokens": 0, "echo": true, "logprobs": 1});
    let logprobs = server.post("/v1/completions", &scored)["choices"][0]["logprobs"].clone();
    let values = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(values[0], Value::Null);
    assert!(values[1..].iter().all(|v| v.as_f64().unwrap() < 0.0), "{logprobs}");
    server.signal("-TERM");
    let (code, rest) = server.end();
    assert_eq!(code, Some(0), "{rest}");
}

#[test]
fn sigterm_lets_streams_finish_and_a_second_one_does_not() {
    // What is to finish is short, what is to be cut outlasts the signals.
    for (signals, tokens, code, ending) in
        [(1, 400, 0, "\"finish_reason\":\"length\""), (2, 60_000, 75, "\"code\":503")]
    {
        let long = json!({
            "prompt": "The river", "max_tokens": tokens, "ignore_eos": true, "stream": true, "temperature": 0,
        });
        let server = Serve::start(&["--shutdown-timeout", "3600"]);
        // One runs, one waits behind it: both were accepted.
        let mut first = server.connect(&request(&long));
        let mut begun = [0; 400];
        first.read_exact(&mut begun).unwrap();
        let second = server.connect(&request(&long));
        let mut head = [0; 12];
        (&second).read_exact(&mut head).unwrap();
        for _ in 0..signals {
            server.signal("-TERM");
            // Signals of one kind merge when the first was not taken yet: readiness tells that it was.
            wait_for_drain(&server);
        }
        let (first, second) = (read(first), read(second));
        for answer in [&first, &second] {
            assert!(answer.contains(ending) && answer.contains("data: [DONE]"), "{signals}: {answer}");
        }
        let (exit, rest) = server.end();
        assert_eq!(exit, Some(code), "{rest}");
    }
}

fn wait_for_drain(server: &Serve) {
    let probe = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    // A server that ended takes no connection any more.
    while let Ok(mut stream) = TcpStream::connect(&server.address) {
        let mut answer = String::new();
        if stream.write_all(probe).is_err() || stream.read_to_string(&mut answer).is_err() {
            return;
        }
        if answer.contains("draining") || answer.is_empty() {
            return;
        }
    }
}

#[test]
fn the_queue_is_bounded_and_leavers_make_room() {
    let server = Serve::start(&["--max-num-seqs", "1", "--max-num-queued-reqs", "1"]);
    let endless = json!({"prompt": "x", "max_tokens": 60000, "ignore_eos": true, "stream": true});
    let open = |body: &Value| {
        let mut stream = server.connect(&request(body));
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        (stream, String::from_utf8_lossy(&head).into_owned())
    };
    let (mut running, head) = open(&endless);
    assert_eq!(head, "HTTP/1.1 200");
    running.read_exact(&mut [0; 600]).unwrap();
    let (waiting, head) = open(&endless);
    assert_eq!(head, "HTTP/1.1 200");
    let (refused, head) = open(&endless);
    assert_eq!(head, "HTTP/1.1 503");
    assert!(read(refused).to_ascii_lowercase().contains("retry-after: 1"));
    drop(running);
    drop(waiting);
    // Both were cancelled, so a short one runs now; while they are not yet, it is refused.
    let short = json!({"prompt": "x", "max_tokens": 1});
    while server.post("/v1/completions", &short)["choices"].is_null() {}
}

#[test]
fn starts_that_cannot_be_fail_at_once_and_say_why() {
    let serve = |arguments: &[&str]| {
        let mut command = longhaul();
        command.env_remove("LONGHAUL_API_KEY").env_remove("VLLM_API_KEY");
        fail(command.arg("serve").args(arguments))
    };
    let (code, message) = serve(&["--host", "0.0.0.0", "--port", "0"]);
    assert!(code == 64 && message.contains("--allow-unauthenticated"), "{code} {message}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, message) = serve(&["--port", &port]);
    assert!(code == 71 && message.contains("--port"), "{code} {message}");
    let (code, message) = serve(&["--api-key-file", "/no/such/file", "--port", "0"]);
    assert!(code == 66 && message.contains("--api-key-file /no/such/file"), "{code} {message}");
    let mut empty = tempfile::NamedTempFile::new().unwrap();
    writeln!(empty, "# nothing").unwrap();
    let (code, message) = serve(&["--api-key-file", empty.path().to_str().unwrap(), "--port", "0"]);
    assert!(code == 78 && message.contains("no API key"), "{code} {message}");
    let (code, message) = serve(&["--model", "/no/such/model", "--port", "0"]);
    assert!(code == 64 && message.contains("/no/such/model"), "{code} {message}");
    let (code, _) = serve(&["--best-of", "3"]);
    assert_eq!(code, 2);
    // What only loading can tell ends the server that was already listening.
    let dir = tempfile::tempdir().unwrap();
    let (code, message) = serve(&["--port", "0", "--model", dir.path().to_str().unwrap()]);
    let listened = message.contains("listening on");
    assert!(code == 66 && listened && message.contains("config.json"), "{code} {message}");
}

#[test]
fn keys_come_from_a_file_or_the_environment() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "file-canary").unwrap();
    let mut command = longhaul();
    command.args(["serve", "--port", "0", "--device", "cpu", "--api-key-file"]).arg(file.path());
    command.env("VLLM_API_KEY", "environment-canary");
    let server = Serve::spawn(command);
    for (key, status) in
        [(None, 401), (Some("wrong"), 401), (Some("file-canary"), 200), (Some("environment-canary"), 200)]
    {
        let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
        let probe = format!("GET /v1/models HTTP/1.1\r\nHost: any.name\r\n{key}Connection: close\r\n\r\n");
        assert!(read(server.connect(probe.as_bytes())).starts_with(&format!("HTTP/1.1 {status} ")), "{key}");
    }
    server.signal("-TERM");
    let log = server.log.clone();
    let (code, rest) = server.end();
    assert_eq!(code, Some(0));
    assert!(!(log + &rest).contains("canary"));
}

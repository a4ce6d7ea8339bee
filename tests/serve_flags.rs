//! The command line of `longhaul serve` as an operator who comes from `vllm serve` writes it, and the log that it leaves.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use common::{fail, longhaul};
use serde_json::{Value, json};

/// A server that logs JSON, ready; ended when it is dropped.
struct Serve {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
    url: String,
    lines: Vec<Value>,
}

fn line(log: &mut impl BufRead) -> Value {
    let mut line = String::new();
    assert!(log.read_line(&mut line).unwrap() > 0, "the server ended");
    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

impl Serve {
    fn start(arguments: &[&str]) -> Self {
        let mut command = longhaul();
        command.env_remove("LONGHAUL_API_KEY").env_remove("VLLM_API_KEY").env_remove("VLLM_LOGGING_LEVEL");
        command.arg("serve").args(arguments).args(["--port", "0", "--device", "cpu", "--log-format", "json"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut lines = Vec::new();
        loop {
            lines.push(line(&mut log));
            let message = lines.last().unwrap()["message"].as_str().unwrap();
            if message.starts_with("ready: ") {
                break;
            }
        }
        let listening =
            lines.iter().find_map(|l| l["message"].as_str()?.strip_prefix("listening on ")).unwrap();
        let url = listening.split(',').next().unwrap().to_owned();
        Self { child, log, url, lines }
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let request = agent.post(format!("{}{path}", self.url)).header("content-type", "application/json");
        let mut response = request.send(body.to_string()).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap())
    }

    fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_manifest_written_for_vllm_starts_and_what_has_no_effect_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let settings = dir.path().join("settings.yaml");
    let yaml = "served-model-name: [from-file]\nmax-num-seqs: 8\nenable-log-requests: true\nswap-space: 4\n";
    std::fs::write(&settings, yaml).unwrap();
    let mut server = Serve::start(&[
        "demo",
        "-tp",
        "1",
        "--max_model_len",
        "2048",
        "--enable-prefix-caching",
        "--enable-chunked-prefill",
        "--distributed-executor-backend=mp",
        "--trust-remote-code",
        "--async-scheduling",
        "--scheduling-policy=fcfs",
        "--max-logprobs",
        "3",
        "--override-generation-config",
        r#"{"temperature": 0, "max_new_tokens": 5}"#,
        "--chat-template",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ mood }}<|im_end|>\n{% endfor %}",
        "--default-chat-template-kwargs",
        r#"{"mood": "calm"}"#,
        "--config",
        settings.to_str().unwrap(),
    ]);
    let warnings: Vec<&str> = server
        .lines
        .iter()
        .filter(|line| line["level"] == "WARN")
        .filter_map(|line| line["message"].as_str()?.split_once(" has no effect").map(|(flag, _)| flag))
        .collect();
    let ignored =
        ["--enable-chunked-prefill", "--distributed-executor-backend", "--trust-remote-code", "--swap-space"];
    assert_eq!(warnings, ignored);

    // The settings are in force: greedy and five tokens by default, another template, fewer log probabilities, no priorities.
    let chat = json!({"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": true});
    let (status, first) = server.post("/v1/chat/completions", &chat);
    assert_eq!(
        (status, &first["model"], &first["usage"]["completion_tokens"]),
        (200, &json!("from-file"), &json!(5))
    );
    assert_eq!(server.post("/v1/chat/completions", &chat).1["choices"], first["choices"]);
    let (_, rendered) = server.post("/v1/chat/completions/render", &chat);
    assert_eq!(rendered["prompt"], "<|im_start|>user\nHellocalm<|im_end|>\n");
    assert_eq!(rendered["max_model_len"], 2048);
    let completion = |field: &str, value: Value| {
        let mut body = json!({"prompt": "x", "max_tokens": 1});
        body[field] = value;
        server.post("/v1/completions", &body).0
    };
    assert_eq!((completion("logprobs", json!(3)), completion("logprobs", json!(4))), (200, 400));
    assert_eq!((completion("priority", json!(0)), completion("priority", json!(1))), (200, 400));

    // The file asked for the log of requests.
    let submitted = loop {
        let line = line(&mut server.log);
        if line["message"] == "request submitted" {
            break line;
        }
    };
    assert!(submitted["prompt"].as_str().unwrap().contains("Hellocalm"), "{submitted}");
}

#[test]
fn what_is_not_done_here_is_refused_with_the_reason() {
    for (arguments, code, words) in [
        (vec!["--api-key", "canary"], 64, "--api-key: keys on a command line"),
        (vec!["-pp", "2"], 64, "--pipeline-parallel-size: "),
        (vec!["--quantization", "awq"], 64, "--quantization: quantised checkpoints"),
        (vec!["--enable-lora"], 64, "--enable-lora: adapters"),
        (vec!["--config", "/no/such/file"], 64, "--config /no/such/file"),
        (vec!["--nonsense"], 2, "--nonsense"),
        (vec!["--port", "0", "--served-model-name", "a", "b", "a"], 64, "\"a\" is there twice"),
        (vec!["--allowed-origins", "https://a"], 2, "JSON list"),
        (vec!["--allowed-origins", "[\"*\"]", "--allow-credentials"], 64, "--allow-credentials"),
        (vec!["--root-path", "llm"], 2, "--root-path"),
        (vec!["--otlp-traces-endpoint", "collector:4317"], 64, "http://collector:4318/v1/traces"),
        (vec!["--ssl-keyfile", "key.pem"], 2, "--ssl-certfile"),
        (vec!["--ssl-certfile", "/no/such/cert"], 78, "/no/such/cert"),
        (vec!["--port", "0", "--override-generation-config", "{\"temprature\": 1}"], 64, "temprature"),
        (vec!["--port", "0", "--override-generation-config", "{\"temperature\": -1}"], 65, "temperature"),
        (vec!["--default-chat-template-kwargs", "{\"messages\": []}"], 2, "messages"),
        (vec!["--port", "0", "--chat-template", "/no/such/template"], 66, "/no/such/template"),
    ] {
        let mut command = longhaul();
        command.env_remove("LONGHAUL_API_KEY").env_remove("VLLM_API_KEY");
        let (found, message) = fail(command.arg("serve").args(["--device", "cpu"]).args(&arguments));
        assert!(found == code && message.contains(words), "{arguments:?}: {found} {message}");
        assert!(!message.contains("canary"), "{message}");
    }
    // Terms of keys that contradict a flag, and terms that are none.
    let mut keys = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut keys, b"canary-1 priority=2\n").unwrap();
    let path = keys.path().to_str().unwrap().to_owned();
    let serve = |arguments: &[&str]| {
        fail(longhaul().args(["serve", "--port", "0", "--api-key-file", &path]).args(arguments))
    };
    let (code, message) = serve(&["--scheduling-policy", "fcfs"]);
    assert!(code == 64 && message.contains("a key with a priority"), "{code} {message}");
    std::io::Write::write_all(&mut keys, b"canary-2 rpm=many\n").unwrap();
    let (code, message) = serve(&[]);
    assert!(code == 78 && message.contains("key 2") && message.contains("rpm=many"), "{code} {message}");
    assert!(!message.contains("canary"), "{message}");
    // With a log of JSON, the last words are JSON, too.
    let mut command = longhaul();
    command.env_remove("LONGHAUL_API_KEY").env_remove("VLLM_API_KEY");
    command.args(["serve", "--log-format", "json", "--host", "0.0.0.0", "--port", "0"]);
    let (code, message) = fail(&mut command);
    let last: Value = serde_json::from_str(message.lines().last().unwrap()).unwrap();
    assert_eq!((code, &last["level"]), (64, &json!("ERROR")));
    assert!(last["message"].as_str().unwrap().contains("--allow-unauthenticated"), "{last}");
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let mut server = Serve::start(&["--log-level", "debug", "--uvicorn-log-level", "debug"]);
    // Far more than a pipe holds.
    let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
    for _ in 0..600 {
        assert_eq!(agent.get(format!("{}/live", server.url)).call().unwrap().status(), 200);
    }
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2})).0, 200);
    // It ends all the same, though nobody takes its last words.
    server.terminate();
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    let mut rest = String::new();
    server.log.read_to_string(&mut rest).unwrap();
    let records = rest.lines().filter(|line| line.contains("\"route\":\"/live\"")).count();
    assert!(records > 50, "{records}");
}

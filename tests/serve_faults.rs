//! Faults while `longhaul serve` serves: none loses a request in silence, none leaves anything behind. The table of what
//! must happen is docs/faults.md; every row of it names one of these tests.

#![cfg(target_os = "linux")]

mod common;

use std::fs::OpenOptions;
use std::io::{PipeReader, PipeWriter, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::serve::{
    Leave, Metrics, Serve, after, get, post_to, read, read_until, read_whole, request, serve, serve_on,
};
use rustix::net::sockopt;
use serde_json::{Value, json};

/// A stream of `tokens` tokens.
fn stream(tokens: usize) -> Value {
    json!({"prompt": "The river", "max_tokens": tokens, "ignore_eos": true, "stream": true, "temperature": 0})
}

/// More tokens than any of these tests waits for.
const ENDLESS: usize = 60_000;

/// What an intact server says to a question whose answer is known to be the same every time.
fn probe(server: &Serve) -> Value {
    let body = json!({"prompt": "The secret code of Lisbon is", "max_tokens": 8, "temperature": 0});
    let answer = server.post("/v1/completions", &body);
    assert!(answer["choices"][0]["text"].is_string(), "{answer}");
    answer["choices"][0]["text"].clone()
}

/// How a stream ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// With its last token.
    Finished,
    /// With an error that says so.
    Error,
    /// Refused before it began.
    Refused,
    /// It just stopped.
    Silent,
}

fn end(answer: &str) -> End {
    match () {
        () if !answer.starts_with("HTTP/1.1 200 ") => End::Refused,
        () if !answer.contains("data: [DONE]") => End::Silent,
        () if answer.contains("data: {\"error\":") => End::Error,
        () if answer.contains("\"finish_reason\":\"length\"") => End::Finished,
        () => End::Silent,
    }
}

fn count(ends: &[End], end: &End) -> usize {
    ends.iter().filter(|e| *e == end).count()
}

/// What a server had before faults, and has to have after them.
struct Baseline {
    descriptors: usize,
    threads: u64,
}

impl Baseline {
    fn of(server: &Serve) -> Self {
        probe(server);
        server.metrics_when("the first answer is booked", Metrics::is_quiet);
        Self { descriptors: server.descriptors(), threads: server.status("Threads") }
    }

    /// Every request has its one outcome, nothing runs, waits or is held, and neither descriptors nor threads were lost.
    fn assert(&self, server: &mut Serve) -> Metrics {
        let metrics = server.metrics_when("everything is given back", Metrics::is_quiet);
        assert_eq!(metrics.panics(), 0, "{}", server.told());
        let told = server.told();
        assert!(!told.contains("panicked"), "{told}");
        let most = self.descriptors;
        server.wait("descriptors are given back", |server| server.descriptors() <= most);
        // Threads for blocking work come and go, and are few.
        let most = self.threads + 4;
        assert!(server.status("Threads") <= most, "{} threads", server.status("Threads"));
        metrics
    }
}

/// Reads all streams at the same time, so that none is a slow reader.
fn read_all(streams: Vec<TcpStream>) -> Vec<End> {
    let readers: Vec<_> =
        streams.into_iter().map(|stream| std::thread::spawn(move || end(&read(stream)))).collect();
    readers.into_iter().map(|reader| reader.join().unwrap()).collect()
}

/// 200 streams whose heads have come: all are admitted.
fn two_hundred(server: &Serve, tokens: usize) -> Vec<TcpStream> {
    let body = request(&stream(tokens));
    let mut streams: Vec<TcpStream> = (0..200).map(|_| server.connect(&body)).collect();
    streams.iter_mut().for_each(|stream| assert_eq!(peek(stream), *b"HTTP/1.1 200"));
    streams
}

/// The first bytes of an answer, which stay unread.
fn peek(stream: &mut TcpStream) -> [u8; 12] {
    let mut head = [0; 12];
    while stream.peek(&mut head).unwrap() < head.len() {
        std::thread::sleep(Duration::from_millis(1));
    }
    head
}

#[test]
fn sigterm_under_two_hundred_streams_finishes_all_of_them() {
    let server = Serve::start(&["--shutdown-timeout", "3600", "--max-num-seqs", "64"]);
    let streams = two_hundred(&server, 24);
    server.signal("-TERM");
    let ends = read_all(streams);
    assert_eq!(count(&ends, &End::Finished), 200, "{ends:?}");
    let (code, told) = server.end();
    assert_eq!(code, Some(0), "{told}");
}

#[test]
fn sigterm_with_too_little_time_cuts_streams_with_an_error() {
    let server = Serve::start(&["--shutdown-timeout", "0.5", "--max-num-seqs", "64"]);
    let streams = two_hundred(&server, ENDLESS);
    server.signal("-TERM");
    let ends = read_all(streams);
    // What ran and what waited, both are told.
    assert_eq!(count(&ends, &End::Error), 200, "{ends:?}");
    let (code, told) = server.end();
    assert_eq!(code, Some(75), "{told}");
    assert!(told.contains("200 requests were cut"), "{told}");
}

#[test]
fn a_killed_server_starts_again_on_its_port() {
    let mut server = Serve::start(&[]);
    let port = server.address.rsplit(':').next().unwrap().parse().unwrap();
    let answer = probe(&server);
    for round in 0..3 {
        let mut streams: Vec<TcpStream> =
            (0..8).map(|_| server.connect(&request(&stream(ENDLESS)))).collect();
        streams.iter_mut().for_each(|stream| drop(read_until(stream, "data: ")));
        server.signal("-KILL");
        let (code, _) = server.end();
        assert_eq!(code, None, "killed");
        // No client takes this for an end.
        let ends = read_all(streams);
        assert!(ends.iter().all(|end| *end != End::Finished), "{ends:?}");
        server = Serve::spawn(serve_on(port));
        assert_eq!(probe(&server), answer, "{round}");
    }
}

#[test]
fn clients_that_leave_at_any_stage_leave_nothing_behind() {
    // One request runs at a time, so that others wait; prompts are computed in steps of 512 rows.
    let arguments =
        ["--max-num-seqs", "1", "--num-gpu-blocks-override", "4096", "--max-num-batched-tokens", "512"];
    let mut server = Serve::start(&arguments);
    let baseline = Baseline::of(&server);
    let answer = probe(&server);
    let mut gone = 0;
    let left = |server: &Serve, stage: &str, count: u64| {
        server.metrics_when(stage, |metrics| metrics.outcome("client_gone") == count)
    };
    for leave in Leave::ALL {
        // In the head: not a request yet.
        let whole = request(&stream(ENDLESS));
        let head = whole.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        let before = server.metrics().received();
        for end in (0..head).step_by(7) {
            leave.go(server.connect(&whole[..end]));
        }
        assert_eq!(server.metrics_when("heads", Metrics::is_quiet).received(), before);

        // In the body: wrong, or its client is gone, by what the server sees first.
        let bodies: Vec<usize> = (head..whole.len()).step_by(9).collect();
        bodies.iter().for_each(|end| drop(leave.go(server.connect(&whole[..*end]))));
        let after =
            server.metrics_when("bodies", |m| m.is_quiet() && m.received() == before + bodies.len() as u64);
        let booked = after.outcome("invalid_4xx") + after.outcome("client_gone");
        assert_eq!(booked, after.received() - after.outcome("length") - after.outcome("stop"));
        gone = after.outcome("client_gone");

        for streamed in [true, false] {
            let body = |prompt: Value| {
                let mut body = stream(ENDLESS);
                body["stream"] = json!(streamed);
                body["prompt"] = prompt;
                request(&body)
            };
            // While it waits behind another.
            let mut first = server.connect(&request(&stream(ENDLESS)));
            read_until(&mut first, "data: ");
            let waiting = server.connect(&body(json!("x")));
            server.metrics_when("it waits", |m| m.waiting() == 1 && m.running() == 1);
            let kept = leave.go(waiting);
            gone += 1;
            let metrics = left(&server, "queued", gone);
            assert_eq!(metrics.received(), metrics.finished() + 1);
            server.metrics_when("the queue is empty", |m| m.waiting() == 0 && m.running() == 1);
            drop(kept);

            // Mid-stream.
            let kept = leave.go(first);
            gone += 1;
            left(&server, "mid-stream", gone);
            drop(kept);
            server.metrics_when("nothing runs", Metrics::is_quiet);

            // While its prompt is computed.
            let prompt: Vec<usize> = (0..30_000).map(|n| n % 1000 + 100 * gone as usize % 500).collect();
            let prefill = server.connect(&body(json!(prompt)));
            let steps = server.metrics_when("it runs", |m| m.running() == 1).steps();
            server.metrics_when("a part of it is computed", |m| m.steps() > steps + 1 || m.running() == 0);
            let kept = leave.go(prefill);
            gone += 1;
            left(&server, "prefill", gone);
            drop(kept);
            server.metrics_when("nothing runs", Metrics::is_quiet);
        }

        // With the last token there and before [DONE] is read: it may have ended, or not.
        let mut last = server.connect(&request(&stream(40)));
        read_until(&mut last, "\"text\"");
        let kept = leave.go(last);
        let metrics = server.metrics_when("the end", Metrics::is_quiet);
        gone = metrics.outcome("client_gone");
        drop(kept);
        assert_eq!(probe(&server), answer, "{leave:?}");
    }
    let metrics = baseline.assert(&mut server);
    assert!(gone >= 18, "{}", metrics.0);
}

/// A client leaves, and from the step after the next the pool is as if it had never come.
#[test]
fn blocks_come_back_within_one_step() {
    let mut server = Serve::start(&["--num-gpu-blocks-override", "512"]);
    let baseline = Baseline::of(&server);
    for leave in [Leave::Close, Leave::Reset] {
        for streamed in [true, false] {
            // Steps go on with another request.
            let mut witness = server.connect(&request(&stream(ENDLESS)));
            read_until(&mut witness, "data: ");
            let prompt: Vec<usize> = (0..1200).map(|n| n * 7 % 1400).collect();
            let mut body = stream(ENDLESS);
            body["prompt"] = json!(prompt);
            body["stream"] = json!(streamed);
            let victim = server.connect(&request(&body));
            let held = server.metrics_when("it holds blocks", |m| m.running() == 2 && m.usage() > 0.1);
            let gone = held.outcome("client_gone");
            leave.go(victim);
            server.metrics_when("it is gone", |m| m.outcome("client_gone") == gone + 1);
            // The step loop knows by now; a step that is running ends first.
            let steps = server.metrics().steps();
            let after = server.metrics_when("the next step", |m| m.steps() > steps);
            assert!(after.running() == 1 && after.usage() < 0.1, "{}", after.0);
            drop(witness);
            server.metrics_when("nothing runs", Metrics::is_quiet);
        }
    }
    baseline.assert(&mut server);
}

#[test]
fn readers_that_take_nothing_are_cut_and_hurt_nobody() {
    let mut server = Serve::start(&["--max-num-seqs", "16"]);
    let baseline = Baseline::of(&server);
    let mut body = stream(ENDLESS);
    body["logprobs"] = json!(20);
    let slow: Vec<TcpStream> = (0..4)
        .map(|_| {
            let stream = server.connect(b"");
            sockopt::set_socket_recv_buffer_size(&stream, 4096).unwrap();
            (&stream).write_all(&request(&body)).unwrap();
            stream
        })
        .collect();
    server.metrics_when("they run", |m| m.running() == 4);
    // One that reads gets everything meanwhile.
    let steps = server.metrics().steps();
    assert_eq!(end(&server.ask(&request(&stream(200)))), End::Finished);
    assert!(server.metrics().steps() >= steps + 200);
    let metrics = server.metrics_when("they are cut", |m| m.outcome("client_gone") == 4);
    assert_eq!(metrics.finished(), metrics.received());
    // They hold nothing, though their sockets are still there.
    server.metrics_when("their blocks are back", |m| m.running() == 0 && m.usage() == 0.0);
    println!("resident after slow readers: {} KiB", server.status("VmRSS"));
    drop(slow);
    baseline.assert(&mut server);
}

/// A pipe that takes no byte more.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    fill(&writer);
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

fn fill(mut writer: impl Write) {
    for size in [4096, 1] {
        while writer.write(&[b'x'; 4096][..size]).is_ok() {}
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts a server whose output goes to `stdout` and `stderr`.
fn mute(stdout: Stdio, stderr: Stdio) -> Serve {
    let port = free_port();
    let mut command = serve_on(port);
    command.args(["--shutdown-timeout", "3600"]);
    let child = command.stdout(stdout).stderr(stderr).spawn().unwrap();
    Serve::mute(child, format!("127.0.0.1:{port}"))
}

/// Serves, drains and ends as if somebody listened.
fn assert_serves_and_ends(server: Serve) {
    probe(&server);
    let refused = server.ask(&post_to("/v1/completions", &json!({"prompt": 1})));
    assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
    let mut running = server.connect(&request(&stream(300)));
    read_until(&mut running, "data: ");
    server.signal("-TERM");
    assert_eq!(end(&format!("HTTP/1.1 200 \r\n{}", read(running))), End::Finished);
    let (code, _) = server.end();
    assert_eq!(code, Some(0));
}

fn dev_full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn output_that_blocks_or_fails_stops_nothing() {
    let (_keep, writer) = full_pipe();
    assert_serves_and_ends(mute(writer.try_clone().unwrap().into(), Stdio::null()));
    assert_serves_and_ends(mute(Stdio::null(), writer.into()));
    assert_serves_and_ends(mute(dev_full(), dev_full()));
    // Nobody at the other end.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_serves_and_ends(mute(writer.try_clone().unwrap().into(), writer.into()));
}

/// Errors at the start have their exit code, whether or not anybody can read the message.
#[test]
fn a_start_that_fails_without_a_listener_has_its_exit_code() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (_keep, full) = full_pipe();
    for stderr in [dev_full(), full.into()] {
        let mut command = serve_on(port);
        let status = command.stdout(Stdio::null()).stderr(stderr).status().unwrap();
        assert_eq!(status.code(), Some(71));
    }
}

#[test]
fn a_full_disk_stops_nothing() {
    // Every byte written to a file is one too many, and a signal that kills.
    let dir = tempfile::tempdir().unwrap();
    let mut command = serve();
    for name in ["HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "LONGHAUL_CACHE"] {
        command.env(name, dir.path());
    }
    let server = Serve::spawn(after("ulimit -f 0", &command));
    assert_serves_and_ends(server);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "files were written");

    // A file system that is full, where the machine allows to mount one.
    let before = format!(
        "mount -t tmpfs -o size=64k tmpfs {0} && {{ cat /dev/zero > {0}/x 2>/dev/null; cd {0}; }} || exit 99",
        dir.path().display()
    );
    let mut mounted = Command::new("unshare");
    mounted.args(["-m", "true"]).stdout(Stdio::null()).stderr(Stdio::null());
    if !mounted.status().is_ok_and(|status| status.success()) {
        println!("a full file system: not possible here, mounting is not allowed");
        return;
    }
    let inner = after(&before, &command);
    let mut command = Command::new("unshare");
    command.arg("-m").arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    assert_serves_and_ends(Serve::spawn(command));
}

#[test]
fn without_descriptors_the_server_waits_and_recovers() {
    let mut server = Serve::spawn(after("ulimit -n 40", &serve()));
    let baseline = Baseline::of(&server);
    // A stream and a scraper that were there before.
    let mut running = server.connect(&request(&stream(ENDLESS)));
    read_until(&mut running, "data: ");
    let mut scraper = server.connect(b"");
    let sockets: Vec<TcpStream> = (0..80).map(|_| server.connect(b"")).collect();
    let mut errors = 0.0;
    while errors == 0.0 {
        scraper.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        errors = Metrics(read_whole(&mut scraper)).get("longhaul_accept_errors_total");
        std::thread::sleep(Duration::from_millis(20));
    }
    // What ran goes on.
    read_until(&mut running, "data: ");
    drop(sockets);
    probe(&server);
    drop((running, scraper));
    baseline.assert(&mut server);
    server.signal("-TERM");
    assert_eq!(server.end().0, Some(0));
}

/// A prompt that the pool cannot hold, however long it waits, is the client's error and not the server's.
#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut server = Serve::start(&["--num-gpu-blocks-override", "16"]);
    let baseline = Baseline::of(&server);
    let models: Value =
        serde_json::from_str(server.ask(&get("/v1/models")).split("\r\n\r\n").nth(1).unwrap()).unwrap();
    let fits = models["data"][0]["max_model_len"].as_u64().unwrap() as usize;
    for (prompt, max_tokens, status) in
        [(fits - 1, 1, 200), (fits - 8, 60_000, 200), (fits, 1, 400), (fits + 1, 1, 400), (60_000, 1, 400)]
    {
        let ids: Vec<usize> = (0..prompt).map(|n| n % 1000).collect();
        let body = json!({"prompt": ids, "max_tokens": max_tokens, "ignore_eos": true});
        let answer = server.ask(&request(&body));
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{prompt}: {answer}");
    }
    assert_eq!(baseline.assert(&mut server).outcome("engine_error_500"), 0);
}

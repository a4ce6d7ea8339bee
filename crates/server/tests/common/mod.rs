//! A server over a scripted engine, and a client that sees bytes.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use longhaul_engine::SamplingParams;
use longhaul_server::{
    Config, Drained, Endpoint, Event, EventSink, EventStream, Failure, Finish, Lifecycle, ModelInfo, Refusal,
    Server, ServerError, Serving, Snapshot, Submission, TokenScore, channel,
};
use longhaul_text::{ChatTemplate, SpecialTokens, Tokenizer};
use serde_json::Value;
use tokio::sync::mpsc;

/// Nothing in these tests should take longer; a loaded machine may.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Prints roles, contents and, when there are any, tools and calls.
const TEMPLATE: &str = "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}\
{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or [] %}\
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ mood or '' }}";

pub fn tokenizer() -> Tokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo/tokenizer.json");
    Tokenizer::from_file(&path).unwrap()
}

pub fn ids(text: &str) -> Vec<u32> {
    tokenizer().encode(text, SpecialTokens::Parse).unwrap()
}

pub fn model() -> ModelInfo {
    let tokenizer = tokenizer();
    ModelInfo {
        root: "mock".into(),
        template: Some(ChatTemplate::new(TEMPLATE, None, Some("<|im_end|>"), "mock.jinja").unwrap()),
        longest_token: (0..tokenizer.vocab_size() as u32)
            .map(|id| tokenizer.token_bytes(id).len())
            .max()
            .unwrap(),
        vocab_size: tokenizer.vocab_size() + 7,
        end_tokens: vec![tokenizer.special_id("<|im_end|>").unwrap()],
        tokenizer: Some(tokenizer),
        max_model_len: 4096,
        sampling: SamplingParams { temperature: 1.0, ..SamplingParams::greedy() },
        max_new_tokens: None,
        max_logprobs: 20,
        block_size: 16,
        kv_blocks: 256,
    }
}

type Script = dyn Fn(&Submission, &EventSink) + Send + Sync;

/// An engine that does what its script says, a thread a request.
pub struct Mock {
    model: ModelInfo,
    script: Arc<Script>,
    refuse: Mutex<Option<Refusal>>,
    events: usize,
    pub submissions: Mutex<Vec<Submission>>,
    pub running: Arc<AtomicUsize>,
    pub aborted: Arc<AtomicBool>,
    healthy: AtomicBool,
    snapshot: Snapshot,
}

impl Mock {
    pub fn new(script: impl Fn(&Submission, &EventSink) + Send + Sync + 'static) -> Self {
        Self {
            model: model(),
            script: Arc::new(script),
            refuse: Mutex::default(),
            events: 4096,
            submissions: Mutex::default(),
            running: Arc::default(),
            aborted: Arc::default(),
            healthy: AtomicBool::new(true),
            snapshot: Snapshot::default(),
        }
    }

    /// Says `text`, token by token, to every choice, up to `max_tokens`.
    pub fn saying(text: &str) -> Self {
        let said = ids(text);
        Self::new(move |submission, sink| say(&said, submission, sink))
    }

    pub fn with_model(mut self, change: impl FnOnce(&mut ModelInfo)) -> Self {
        change(&mut self.model);
        self
    }

    pub fn with_events(mut self, events: usize) -> Self {
        self.events = events;
        self
    }

    pub fn with_snapshot(mut self, snapshot: Snapshot) -> Self {
        self.snapshot = snapshot;
        self
    }

    /// A script that looks at the flag of [`Serving::abort_all`].
    pub fn with_aborted(mut self, aborted: Arc<AtomicBool>) -> Self {
        self.aborted = aborted;
        self
    }

    pub fn refuse(&self, refusal: Option<Refusal>) {
        *self.refuse.lock().unwrap() = refusal;
    }

    pub fn sicken(&self) {
        self.healthy.store(false, Ordering::SeqCst);
    }

    pub fn last(&self) -> Submission {
        self.submissions.lock().unwrap().last().cloned().expect("a submission")
    }

    /// Waits until `count` requests have come, ever, and no script runs.
    pub fn idle_after(&self, count: usize) {
        until(|| self.submissions.lock().unwrap().len() == count && self.running.load(Ordering::SeqCst) == 0);
    }
}

/// A token with made-up scores.
pub fn score(id: u32, top: Option<u32>) -> TokenScore {
    let top = (0..top.unwrap_or(0)).map(|n| (id + n, -0.5 - n as f32)).collect();
    TokenScore { id, logprob: -0.5, top }
}

pub fn say(said: &[u32], submission: &Submission, sink: &EventSink) {
    sink.send(Event::Started { cached_tokens: 3 });
    if let Some(top) = submission.prompt_logprobs {
        let scores = submission.prompt.iter().enumerate();
        sink.send(Event::Prompt(scores.map(|(at, id)| (at > 0).then(|| score(*id, Some(top)))).collect()));
    }
    let count = said.len().min(submission.max_tokens);
    for choice in 0..submission.n {
        if count == 0 {
            sink.send(Event::Finished { choice, finish: Finish::Length });
        }
        for (at, id) in said.iter().take(count).enumerate() {
            if sink.is_cancelled() || sink.is_stopped(choice) {
                break;
            }
            let finish = match at + 1 == count {
                true if count == submission.max_tokens => Some(Finish::Length),
                true => Some(Finish::EndOfSequence),
                false => None,
            };
            sink.send(Event::Token { choice, token: score(*id, submission.logprobs), finish });
        }
    }
}

impl Serving for Mock {
    fn model(&self) -> &ModelInfo {
        &self.model
    }

    fn submit(&self, submission: Submission) -> Result<EventStream, Refusal> {
        if let Some(refusal) = self.refuse.lock().unwrap().clone() {
            return Err(refusal);
        }
        let (script, running) = (Arc::clone(&self.script), Arc::clone(&self.running));
        let mut submissions = self.submissions.lock().unwrap();
        running.fetch_add(1, Ordering::SeqCst);
        submissions.push(submission.clone());
        drop(submissions);
        let (sink, stream) = channel(self.events, || {});
        let aborted = Arc::clone(&self.aborted);
        std::thread::spawn(move || {
            script(&submission, &sink);
            if aborted.load(Ordering::SeqCst) {
                sink.send(Event::Failed(Failure::Drained));
            }
            drop(sink);
            running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(stream)
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot { running: self.running.load(Ordering::SeqCst), ..self.snapshot }
    }

    fn health(&self) -> Result<(), String> {
        if self.healthy.load(Ordering::SeqCst) { Ok(()) } else { Err("no step for 5 s".into()) }
    }

    fn abort_all(&self) {
        self.aborted.store(true, Ordering::SeqCst);
    }
}

/// A server in a thread.
pub struct Running {
    pub address: SocketAddr,
    pub lifecycle: Lifecycle,
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<Result<Drained, ServerError>>>,
}

impl Running {
    /// Binds a free port; the model is not announced.
    pub fn unloaded(config: Config) -> Self {
        let free: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let server = Server::bind(free, config).unwrap();
        let (stop, stops) = mpsc::channel(2);
        let Endpoint::Tcp(address) = *server.endpoint() else { panic!("{}", server.url()) };
        let lifecycle = server.lifecycle();
        let thread = std::thread::spawn(move || server.run_until(stops));
        Self { address, lifecycle, stop, thread: Some(thread) }
    }

    pub fn start(mock: &Arc<Mock>, config: Config) -> Self {
        Self::serve(Arc::clone(mock) as Arc<dyn Serving>, config)
    }

    pub fn serve(serving: Arc<dyn Serving>, config: Config) -> Self {
        let server = Self::unloaded(config);
        server.lifecycle.ready(serving);
        server
    }

    /// As a signal does.
    pub fn stop(&self) {
        self.stop.try_send(()).unwrap();
    }

    pub fn join(self) -> Drained {
        self.end().unwrap()
    }

    /// How it ended, if need be with an error.
    pub fn end(mut self) -> Result<Drained, ServerError> {
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Sends bytes as they are and reads until the server closes.
    pub fn raw(&self, bytes: impl AsRef<[u8]>) -> Reply {
        let mut stream = self.connect();
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(bytes.as_ref());
        read_reply(stream)
    }

    /// The status of the answer to bytes; 0 when the connection broke without one.
    pub fn try_raw(&self, bytes: impl AsRef<[u8]>) -> u16 {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes.as_ref());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        if answer.is_empty() { 0 } else { parse_reply(&answer).status }
    }

    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> Reply {
        self.raw(encode(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, &[], Some(&body.to_string()))
    }

    pub fn metric(&self, series: &str) -> f64 {
        let page = self.get("/metrics").body;
        let line =
            page.lines().find(|line| line.starts_with(series) && line[series.len()..].starts_with(' '));
        line.unwrap_or_else(|| panic!("{series} is not in\n{page}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    }

    pub fn outcomes(&self, outcome: &str) -> f64 {
        let page = self.get("/metrics").body;
        let label = format!("outcome=\"{outcome}\"");
        let line =
            page.lines().find(|l| l.starts_with("longhaul_requests_finished_total") && l.contains(&label));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.stop.try_send(());
            let _ = self.stop.try_send(());
            let _ = thread.join();
        }
    }
}

/// A request with `Connection: close`; a `Host` in `headers` replaces the usual one.
pub fn encode(method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    let given = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    if !given("host") {
        head += "Host: localhost\r\n";
    }
    if let Some(body) = body {
        if !given("content-type") {
            head += "Content-Type: application/json\r\n";
        }
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body.unwrap_or_default().as_bytes());
    bytes
}

/// A response, its chunks joined.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    pub fn error(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned()
    }

    /// The JSON events of a stream, which must end with `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let mut lines: Vec<&str> = self.body.split("\n\n").collect();
        assert_eq!(lines.pop(), Some(""), "{self:?}");
        assert_eq!(lines.pop(), Some("data: [DONE]"), "{self:?}");
        lines
            .into_iter()
            .filter(|line| !line.starts_with(':'))
            .map(|line| serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }
}

pub fn read_reply(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let mut buffer = [0; 1 << 14];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
            // What was sent before the reset counts.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(e) => panic!("{e}; got {:?}", String::from_utf8_lossy(&bytes)),
        }
    }
    parse_reply(&bytes)
}

pub fn parse_reply(bytes: &[u8]) -> Reply {
    let at = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let at = at.unwrap_or_else(|| panic!("no head in {:?}", String::from_utf8_lossy(bytes)));
    let head = String::from_utf8(bytes[..at].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut rest = &bytes[at + 4..];
    let mut body = Vec::new();
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        while let Some(end) = rest.windows(2).position(|w| w == b"\r\n") {
            let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
            body.extend_from_slice(&rest[end + 2..end + 2 + size]);
            rest = &rest[(end + 4 + size).min(rest.len())..];
        }
    } else {
        body = rest.to_vec();
    }
    Reply { status, head, body: String::from_utf8(body).unwrap() }
}

/// Waits until `condition` holds; something that must happen is given time.
pub fn until(condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

//! `longhaul serve` as a process: what clients, orchestrators and the system see of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use serde_json::Value;

use super::longhaul;

/// For what must happen, on any machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A server on a free port, ready.
pub struct Serve {
    child: Child,
    pub address: String,
    /// What it printed until it was ready.
    pub log: String,
    rest: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

/// `longhaul serve` on a free port, with the demo model on the CPU and without keys.
pub fn serve() -> Command {
    serve_on(0)
}

/// As [`serve`], on a port of the caller's choice.
pub fn serve_on(port: u16) -> Command {
    let mut command = longhaul();
    command.args(["serve", "--port", &port.to_string(), "--device", "cpu", "--dtype", "float32"]);
    command.env_remove("LONGHAUL_API_KEY").env_remove("VLLM_API_KEY");
    command
}

/// `command` in a shell that does `before` first.
pub fn after(before: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("{before}; exec \"$0\" \"$@\""));
    shell.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

impl Serve {
    pub fn start(arguments: &[&str]) -> Self {
        let mut command = serve();
        command.args(arguments);
        Self::spawn(command)
    }

    /// Starts `command` and waits until it is ready. Its stdout goes where `command` says, or nowhere.
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self::ready(child, stderr)
    }

    /// A child whose stderr is `stderr`, once it is ready.
    fn ready(child: Child, mut stderr: BufReader<ChildStderr>) -> Self {
        let mut log = String::new();
        while !log.contains("ready: ") {
            let read = stderr.read_line(&mut log).unwrap();
            assert!(read > 0, "the server ended: {log}");
        }
        let address = log.split("listening on http://").nth(1).and_then(|rest| rest.split(',').next());
        let address = address.expect("the address comes first").to_owned();
        // Somebody has to read on, or the server would write into a full pipe.
        let rest = Arc::new(Mutex::new(String::new()));
        let told = Arc::clone(&rest);
        let reader = std::thread::spawn(move || {
            let mut line = Vec::new();
            while stderr.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                told.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
        Self { child, address, log, rest, reader: Some(reader) }
    }

    /// A child that nobody can hear, once `address` answers that it is ready.
    pub fn mute(child: Child, address: String) -> Self {
        let mut server = Self { child, address, log: String::new(), rest: Arc::default(), reader: None };
        server.wait("it gets ready", |server| {
            assert_eq!(server.child.try_wait().unwrap(), None, "the server ended");
            let Ok(mut stream) = TcpStream::connect(&server.address) else { return false };
            let mut answer = String::new();
            let _ = stream.write_all(&get("/ready"));
            stream.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200 ")
        });
        server
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed since it was ready.
    pub fn told(&self) -> String {
        self.rest.lock().unwrap().clone()
    }

    /// A connection with `request` on it.
    pub fn connect(&self, request: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request).unwrap();
        stream
    }

    /// The answer to `request`.
    pub fn ask(&self, request: &[u8]) -> String {
        read(self.connect(request))
    }

    pub fn post(&self, path: &str, body: &Value) -> Value {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let url = format!("http://{}{path}", self.address);
        let mut response =
            agent.post(url).header("content-type", "application/json").send(body.to_string()).unwrap();
        serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap()
    }

    pub fn metrics(&self) -> Metrics {
        let answer = self.ask(&get("/metrics"));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        Metrics(answer)
    }

    /// Its open file descriptors.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id())).unwrap().count()
    }

    /// A number of `/proc/PID/status`.
    pub fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()).unwrap().parse().unwrap()
    }

    /// Waits until `condition` holds.
    pub fn wait(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "{what}: it did not happen; {}", self.told());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until `condition` holds of the metrics; these.
    pub fn metrics_when(&self, what: &str, condition: impl Fn(&Metrics) -> bool) -> Metrics {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let metrics = self.metrics();
            if condition(&metrics) {
                return metrics;
            }
            assert!(Instant::now() < deadline, "{what}: it did not happen; {}{}", metrics.0, self.told());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end; exit code and what was printed since it was ready.
    pub fn end(mut self) -> (Option<i32>, String) {
        let mut code = None;
        self.wait("it ends", |server| match server.child.try_wait().unwrap() {
            Some(status) => {
                code = status.code();
                true
            }
            None => false,
        });
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        (code, self.told())
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A page of metrics.
pub struct Metrics(pub String);

impl Metrics {
    /// The samples of `name` whose labels contain `label`.
    fn samples(&self, name: &str, label: &str) -> Vec<f64> {
        let matches = |line: &&str| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
        };
        let value = |line: &str| line.rsplit(' ').next().unwrap().parse().unwrap();
        self.0.lines().filter(matches).map(value).collect()
    }

    pub fn get(&self, name: &str) -> f64 {
        match self.samples(name, "")[..] {
            [value] => value,
            ref other => panic!("{} samples of {name} in {}", other.len(), self.0),
        }
    }

    /// Requests that ended with `outcome`.
    pub fn outcome(&self, outcome: &str) -> u64 {
        let label = format!("outcome=\"{outcome}\"");
        self.samples("longhaul_requests_finished_total", &label).iter().sum::<f64>() as u64
    }

    pub fn received(&self) -> u64 {
        self.get("longhaul_requests_received_total") as u64
    }

    pub fn finished(&self) -> u64 {
        self.samples("longhaul_requests_finished_total", "").iter().sum::<f64>() as u64
    }

    pub fn running(&self) -> u64 {
        self.get("vllm:num_requests_running") as u64
    }

    pub fn waiting(&self) -> u64 {
        self.get("vllm:num_requests_waiting") as u64
    }

    pub fn usage(&self) -> f64 {
        self.get("vllm:kv_cache_usage_perc")
    }

    pub fn steps(&self) -> u64 {
        self.get("longhaul_steps_total") as u64
    }

    pub fn panics(&self) -> u64 {
        self.get("longhaul_panics_total") as u64
    }

    /// Nothing waits or runs, nothing is held, and every request has exactly one outcome.
    pub fn is_quiet(&self) -> bool {
        self.received() == self.finished()
            && self.running() + self.waiting() == 0
            && self.usage() == 0.0
            && self.get("longhaul_body_bytes") == 0.0
            // This page's own.
            && self.get("longhaul_connections") == 1.0
    }
}

pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").into_bytes()
}

pub fn request(body: &Value) -> Vec<u8> {
    post_to("/v1/completions", body)
}

pub fn post_to(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Everything that comes until the end of a connection, or until it breaks.
pub fn read(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{error}"),
        _ => String::from_utf8_lossy(&answer).into_owned(),
    }
}

/// Reads until `words` have come; what has.
pub fn read_until(stream: &mut TcpStream, words: &str) -> String {
    let (mut answer, mut buffer) = (String::new(), [0; 1 << 12]);
    while !answer.contains(words) {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "the connection ended: {answer}");
        answer.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    answer
}

/// Reads one answer whose length was declared, on a connection that is kept.
pub fn read_whole(stream: &mut TcpStream) -> String {
    let (mut answer, mut buffer) = (Vec::new(), [0; 1 << 14]);
    loop {
        let text = String::from_utf8_lossy(&answer);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.to_ascii_lowercase();
            let length = length.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
            if body.len() >= length.unwrap().parse().unwrap() {
                return text.into_owned();
            }
        }
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "the connection ended: {text}");
        answer.extend_from_slice(&buffer[..read]);
    }
}

/// How a client leaves.
#[derive(Debug, Clone, Copy)]
pub enum Leave {
    /// It closes its connection.
    Close,
    /// Its connection breaks.
    Reset,
    /// It will send nothing more, and keeps the connection.
    HalfClose,
}

impl Leave {
    pub const ALL: [Leave; 3] = [Leave::Close, Leave::Reset, Leave::HalfClose];

    /// Leaves; what is left of the connection.
    pub fn go(self, stream: TcpStream) -> Option<TcpStream> {
        match self {
            Leave::Close => None,
            Leave::Reset => {
                sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
                None
            }
            Leave::HalfClose => {
                stream.shutdown(Shutdown::Write).unwrap();
                Some(stream)
            }
        }
    }
}

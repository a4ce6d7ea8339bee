//! Nodes of a group as processes of this machine.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::longhaul;

/// The exit code that asks for a restart.
pub const RESTART: i32 = 75;
/// For what must happen, on any machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A node's process; its output goes to files, so that nobody has to read it while it runs.
pub struct Node {
    pub child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Node {
    pub fn start(command: &mut Command, dir: &Path, name: &str) -> Self {
        let (out, err) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.err")));
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        Self { child: command.spawn().unwrap(), out, err }
    }

    pub fn stdout(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.err).unwrap()).into_owned()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it has ended.
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "a node does not end: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until it has said `words` on stderr.
    pub fn wait_for(&mut self, words: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.stderr().contains(words) {
            assert_eq!(self.child.try_wait().unwrap(), None, "ended: {}", self.stderr());
            assert!(Instant::now() < deadline, "no {words:?}: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a group needs: a port that is free, a key, and room for its output.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub port: u16,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("key"), "correct horse battery staple\n").unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { dir, port }
    }

    /// `command` as node `rank` of `nodes`.
    pub fn node(&self, command: &mut Command, rank: usize, nodes: usize) -> Node {
        command.args(["--nnodes", &nodes.to_string(), "--node-rank", &rank.to_string()]);
        command.args(["--leader", &format!("127.0.0.1:{}", self.port)]);
        self.with_key(command, &format!("node{rank}"))
    }

    /// `command`, whose node is known otherwise.
    pub fn with_key(&self, command: &mut Command, name: &str) -> Node {
        command.arg("--node-key-file").arg(self.dir.path().join("key"));
        Node::start(command, self.dir.path(), name)
    }

    /// Nothing of the group is left but its output.
    pub fn assert_nothing_is_left(&self) {
        drop(TcpListener::bind(("127.0.0.1", self.port)).expect("the port can be bound again"));
        let shared = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let left: Vec<_> = shared.filter(|f| f.file_name().to_string_lossy().contains("longhaul")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A command on the CPU's `ranks`.
pub fn on_ranks(ranks: usize, arguments: &[&str]) -> Command {
    let mut command = longhaul();
    command.args(arguments).args(["--device", "cpu", "--tp", &ranks.to_string()]);
    command
}

pub const GENERATE: [&str; 7] =
    ["generate", "--json", "--ignore-eos", "--max-tokens", "40", "--prompt", "The secret code of Lisbon is"];

pub fn ids(output: &str) -> Value {
    let output: Value = serde_json::from_str(output).unwrap_or_else(|e| panic!("{e}: {output}"));
    output["ids"].clone()
}

/// Two network namespaces that a pair of virtual interfaces joins; gone when dropped.
pub struct Namespaces {
    names: [String; 2],
}

impl Namespaces {
    /// # Errors
    /// Why the machine does not allow it.
    pub fn new() -> Result<Self, String> {
        let id = std::process::id();
        let made = Self { names: [format!("lh{id}a"), format!("lh{id}b")] };
        let [a, b] = &made.names;
        let (inside_a, inside_b) = (format!("v{id}a"), format!("v{id}b"));
        for line in [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("link add {inside_a} netns {a} type veth peer name {inside_b} netns {b}"),
            format!("-n {a} addr add 10.231.7.1/24 dev {inside_a}"),
            format!("-n {b} addr add 10.231.7.2/24 dev {inside_b}"),
            format!("-n {a} link set {inside_a} up"),
            format!("-n {b} link set {inside_b} up"),
        ] {
            ip(&line)?;
        }
        Ok(made)
    }

    /// `command` in namespace `n`.
    pub fn inside(&self, n: usize, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.names[n]]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside.stdin(Stdio::null());
        inside
    }

    /// From here on packets are lost in silence.
    pub fn cut(&self) {
        ip(&format!("-n {} link set v{}b down", self.names[1], std::process::id())).unwrap();
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

pub fn ip(line: &str) -> Result<(), String> {
    let output = Command::new("ip").args(line.split(' ')).output().map_err(|e| format!("ip: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

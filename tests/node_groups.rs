//! Groups of nodes as a user starts them: one process a node, on loopback and, where the machine allows it, in network
//! namespaces. What they answer, who is turned away, and what becomes of the others when one is killed, stopped or broken.
//!
//! Faults come at random moments; `LONGHAUL_FAULTS` says at how many of each kind (default 4), `--ignored` runs 100. With
//! `--features faults` ranks are broken too.
#![cfg(target_os = "linux")]

mod common;

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{fail, ids_file, json_output, longhaul, read_logits, repository, succeed};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The exit code that asks for a restart.
const RESTART: i32 = 75;
/// For what must happen, on any machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A node's process; its output goes to files, so that nobody has to read it while it runs.
struct Node {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Node {
    fn start(command: &mut Command, dir: &Path, name: &str) -> Self {
        let (out, err) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.err")));
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        Self { child: command.spawn().unwrap(), out, err }
    }

    fn stdout(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap()
    }

    fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.err).unwrap()).into_owned()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it has ended.
    fn end(&mut self) -> ExitStatus {
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
    fn wait_for(&mut self, words: &str) {
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
struct Place {
    dir: tempfile::TempDir,
    port: u16,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("key"), "correct horse battery staple\n").unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { dir, port }
    }

    /// `command` as node `rank` of `nodes`.
    fn node(&self, command: &mut Command, rank: usize, nodes: usize) -> Node {
        command.args(["--nnodes", &nodes.to_string(), "--node-rank", &rank.to_string()]);
        command.args(["--leader", &format!("127.0.0.1:{}", self.port)]);
        self.with_key(command, &format!("node{rank}"))
    }

    /// `command`, whose node is known otherwise.
    fn with_key(&self, command: &mut Command, name: &str) -> Node {
        command.arg("--node-key-file").arg(self.dir.path().join("key"));
        Node::start(command, self.dir.path(), name)
    }

    /// Nothing of the group is left but its output.
    fn assert_nothing_is_left(&self) {
        drop(TcpListener::bind(("127.0.0.1", self.port)).expect("the port can be bound again"));
        let shared = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let left: Vec<_> = shared.filter(|f| f.file_name().to_string_lossy().contains("longhaul")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A command on the CPU's `ranks`.
fn on_ranks(ranks: usize, arguments: &[&str]) -> Command {
    let mut command = longhaul();
    command.args(arguments).args(["--device", "cpu", "--tp", &ranks.to_string()]);
    command
}

const GENERATE: [&str; 7] =
    ["generate", "--json", "--ignore-eos", "--max-tokens", "40", "--prompt", "The secret code of Lisbon is"];

fn ids(output: &str) -> Value {
    let output: Value = serde_json::from_str(output).unwrap_or_else(|e| panic!("{e}: {output}"));
    output["ids"].clone()
}

#[test]
fn nodes_answer_as_one_rank_does() {
    let alone = json_output(&mut on_ranks(1, &GENERATE))["ids"].clone();
    // Two nodes of two ranks, whoever starts first; three nodes of two, two and one.
    for (ranks, order) in [(4, &[1, 0][..]), (4, &[0, 1]), (5, &[2, 0, 1])] {
        let place = Place::new();
        let mut nodes: Vec<(usize, Node)> = order
            .iter()
            .map(|&rank| (rank, place.node(&mut on_ranks(ranks, &GENERATE), rank, order.len())))
            .collect();
        for (rank, node) in &mut nodes {
            assert!(node.end().success(), "node {rank}: {}", node.stderr());
            match rank {
                0 => assert_eq!(ids(&node.stdout()), alone),
                _ => assert_eq!(node.stdout(), "", "a worker prints nothing"),
            }
        }
        place.assert_nothing_is_left();
    }
}

#[test]
fn the_logits_of_nodes_are_those_of_one_process_bit_for_bit() {
    let place = Place::new();
    let prompt: Vec<u32> = (0..150).map(|i| i * 37 % 400).collect();
    let prompt = ids_file(&prompt);
    let command = |name: &str| {
        let mut command = on_ranks(4, &["logits", "--chunk", "64"]);
        command.arg("--ids-file").arg(prompt.path()).arg("--out").arg(place.dir.path().join(name));
        command
    };
    succeed(&mut command("one"));
    let mut worker = place.node(&mut command("none"), 1, 2);
    let mut leader = place.node(&mut command("two"), 0, 2);
    assert!(leader.end().success() && worker.end().success(), "{}{}", leader.stderr(), worker.stderr());
    let read = |name: &str| {
        let (shape, values) = read_logits(&place.dir.path().join(name));
        (shape, values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    assert_eq!(read("one"), read("two"));
    assert!(!place.dir.path().join("none").exists(), "a worker writes no file");
}

/// The same command line on every node, as launchers start it.
#[test]
fn launchers_say_which_node_this_is() {
    let address = |place: &Place| format!("127.0.0.1:{}", place.port);
    type Variables = fn(&str, usize) -> Vec<(&'static str, String)>;
    let launchers: [(bool, Variables); 3] = [
        (false, |leader, rank| {
            vec![
                ("LWS_LEADER_ADDRESS", leader.into()),
                ("LWS_GROUP_SIZE", "2".into()),
                ("LWS_WORKER_INDEX", rank.to_string()),
            ]
        }),
        // srun knows names of hosts, which the test has not.
        (true, |_, rank| {
            vec![
                ("SLURM_PROCID", rank.to_string()),
                ("SLURM_STEP_NUM_TASKS", "2".into()),
                ("SLURM_STEP_NODELIST", "gpu[01-02]".into()),
            ]
        }),
        (true, |_, rank| {
            vec![("OMPI_COMM_WORLD_RANK", rank.to_string()), ("OMPI_COMM_WORLD_SIZE", "2".into())]
        }),
    ];
    for (leader_by_flag, variables) in launchers {
        let place = Place::new();
        let start = |rank| {
            let mut command = on_ranks(2, &GENERATE);
            command.envs(variables(&address(&place), rank));
            if leader_by_flag {
                command.args(["--dist-init-addr", &address(&place)]);
            }
            place.with_key(&mut command, &format!("node{rank}"))
        };
        let (mut worker, mut leader) = (start(1), start(0));
        assert!(leader.end().success(), "{}", leader.stderr());
        assert!(worker.end().success(), "{}", worker.stderr());
        assert_eq!(ids(&leader.stdout()).as_array().map(Vec::len), Some(40));
        assert_eq!(worker.stdout(), "");
    }
}

/// The job script, with an `srun` that starts two processes here and a `scontrol` that writes down what it is told.
#[test]
fn the_slurm_script_runs_a_group_and_requeues_a_lost_one() {
    let place = Place::new();
    let script = |name: &str, text: &str| {
        let path = place.dir.path().join(name);
        std::fs::write(&path, format!("#!/bin/bash\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    script(
        "srun",
        r#"shift 2
        export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost
        SLURM_PROCID=1 "$@" & worker=$!
        if [ -n "${KILL:-}" ]; then (sleep 1; kill -9 $worker) & fi
        SLURM_PROCID=0 "$@"; leader=$?
        wait $worker; worker=$?
        exit $((worker > leader ? worker : leader))"#,
    );
    script("scontrol", r#"echo "$@" >> "$(dirname "$0")/requeued""#);
    let run = |extra: &[&str]| {
        let mut command = Command::new(repository("deploy/slurm/longhaul.sbatch"));
        let path = format!("{}:{}", place.dir.path().display(), std::env::var("PATH").unwrap());
        command.args(["generate", "--json", "--ignore-eos", "--device", "cpu", "--tp", "2", "--prompt", "a"]);
        command.args(["--master-port", &place.port.to_string()]).args(extra).stdin(Stdio::null());
        command.env("PATH", path).env("LONGHAUL", env!("CARGO_BIN_EXE_longhaul"));
        command.env("SLURM_JOB_ID", "17").env("SLURM_SUBMIT_DIR", place.dir.path());
        command
    };
    let output = succeed(&mut run(&["--max-tokens", "5"]));
    assert_eq!(ids(&String::from_utf8(output.stdout).unwrap()).as_array().map(Vec::len), Some(5));
    let requeued = place.dir.path().join("requeued");
    assert!(!requeued.exists());

    let mut long = run(&["--max-tokens", "12000", "--max-model-len", "13k"]);
    let output = long.env("KILL", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(137), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_to_string(&requeued).unwrap(), "requeue 17\n");
    assert!(!place.dir.path().join(".longhaul-key-17").exists(), "the secret is gone with the job");
}

#[test]
fn many_ranks_on_few_cores_are_no_hang() {
    let alone = json_output(&mut on_ranks(1, &GENERATE))["ids"].clone();
    let place = Place::new();
    let [mut worker, mut leader] = [1, 0].map(|rank| place.node(&mut on_ranks(24, &GENERATE), rank, 2));
    assert!(leader.end().success() && worker.end().success(), "{}{}", leader.stderr(), worker.stderr());
    assert_eq!(ids(&leader.stdout()), alone);
}

#[test]
fn nodes_that_do_not_fit_are_told_the_field_on_both_sides() {
    let elsewhere = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(repository("assets/demo")).unwrap().flatten() {
        std::fs::copy(file.path(), elsewhere.path().join(file.file_name())).unwrap();
    }
    let tokenizer = elsewhere.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, format!("{text} ")).unwrap();
    let elsewhere = elsewhere.path().to_str().unwrap();
    let here = repository("assets/demo");
    let here = here.to_str().unwrap();
    // What the leader and the worker are given besides, and the field.
    let cases: [(&[&str], &[&str], &str); 7] = [
        (&["--load-format", "dummy"], &["--load-format", "dummy", "--dummy-seed", "1"], "model is"),
        (&["--model", here], &["--model", elsewhere], "tokenizer is"),
        (&["--max-model-len", "1k"], &["--max-model-len", "2k"], "context 1024"),
        (&["--kv-cache-dtype", "bfloat16"], &[], "plan is"),
        (&["--long-context", "none", "--max-model-len", "4k"], &["--max-model-len", "4k"], "plan is"),
        (&["--dtype", "bfloat16"], &[], "plan is"),
        (&["--nnodes", "2"], &["--nnodes", "3"], "world size is 3"),
    ];
    for (leader, worker, field) in cases {
        let place = Place::new();
        let start = |rank: usize, extra: &[&str]| {
            let mut command = on_ranks(4, &GENERATE);
            command.args(extra).args(["--node-rank", &rank.to_string()]);
            command.args(["--leader", &format!("127.0.0.1:{}", place.port)]);
            if !extra.contains(&"--nnodes") {
                command.args(["--nnodes", "2"]);
            }
            place.with_key(&mut command, &format!("node{rank}"))
        };
        for mut node in [start(1, worker), start(0, leader)] {
            assert_eq!(node.end().code(), Some(65), "{}", node.stderr());
            let message = node.stderr();
            assert!(message.contains("node 1 does not fit") && message.contains(field), "{message}");
            assert_eq!(node.stdout(), "");
        }
        place.assert_nothing_is_left();
    }
}

#[test]
fn another_key_is_a_stranger_s() {
    let place = Place::new();
    let mut leader = place.node(on_ranks(2, &GENERATE).args(["--join-timeout", "6"]), 0, 2);
    std::fs::write(place.dir.path().join("other"), "correct horse battery stable").unwrap();
    let mut command = on_ranks(2, &GENERATE);
    command.args(["--nnodes", "2", "--node-rank", "1", "--leader", &format!("127.0.0.1:{}", place.port)]);
    command.arg("--node-key-file").arg(place.dir.path().join("other"));
    let mut stranger = Node::start(&mut command, place.dir.path(), "stranger");
    assert_eq!(stranger.end().code(), Some(65), "{}", stranger.stderr());
    assert!(stranger.stderr().contains("another shared key"), "{}", stranger.stderr());
    // The leader says so and waits on, for one that fits.
    leader.wait_for("another shared key");
    assert_eq!(leader.end().code(), Some(RESTART));
    assert!(leader.stderr().contains("node 1 had not joined"), "{}", leader.stderr());
}

#[test]
fn what_is_not_said_whole_is_asked_for() {
    let short = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(short.path(), "short").unwrap();
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), "correct horse battery staple").unwrap();
    let (short, key) = (short.path().to_str().unwrap(), key.path().to_str().unwrap());
    let group = ["--nnodes", "2", "--node-rank", "0", "--leader", "127.0.0.1"];
    let cases: [(Vec<&str>, i32, &str); 8] = [
        (vec!["--nnodes", "2"], 64, "--node-key-file: is needed"),
        (vec!["--node-rank", "1"], 64, "--node-key-file: is needed"),
        (vec!["--nnodes", "2", "--node-key-file", key], 64, "--node-rank"),
        (vec!["--nnodes", "2", "--node-rank", "1", "--node-key-file", key], 64, "--leader"),
        ([&group[..], &["--node-key-file", short]].concat(), 65, "has 5 bytes; at least 16"),
        ([&group[..], &["--node-key-file", "/no/such/key"]].concat(), 66, "/no/such/key"),
        ([&group[..], &["--node-key-file", key]].concat(), 64, "1 ranks are too few for 2 nodes"),
        (
            [&group[..], &["--tp", "2", "--device", "emulated", "--node-key-file", key]].concat(),
            69,
            "--device",
        ),
    ];
    for (arguments, expected, words) in cases {
        let mut command = longhaul();
        command.args(GENERATE).args(&arguments);
        let (code, message) = fail(&mut command);
        assert_eq!(code, expected, "{arguments:?}: {message}");
        assert!(message.contains(words), "{arguments:?}: {message}");
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = on_ranks(2, &GENERATE);
    command.args(["--nnodes", "2", "--node-rank", "0", "--leader", &address, "--node-key-file", key]);
    let (code, message) = fail(&mut command);
    assert!(code == 71 && message.contains(&format!("listening on {address}")), "{message}");
    let (code, message) = fail(on_ranks(2, &["needle"]).args(group).args(["--node-key-file", key]));
    assert!(code == 64 && message.contains("give one, such as --long-context dca"), "{message}");
}

/// Who waits for a user instead of for a step ends too.
#[test]
fn a_leader_at_rest_ends_with_its_worker() {
    let place = Place::new();
    let mut chat = on_ranks(2, &["chat"]);
    chat.stdin(Stdio::piped());
    let mut leader = place.node(&mut chat, 0, 2);
    let worker = place.node(&mut on_ranks(2, &["chat"]), 1, 2);
    leader.wait_for("have met");
    worker.signal(Signal::KILL);
    assert_eq!(leader.end().code(), Some(RESTART), "{}", leader.stderr());
    assert!(leader.stderr().contains("closed the connection"), "{}", leader.stderr());
    drop(worker);
    place.assert_nothing_is_left();
}

/// What happens to a node of a group of two nodes with two ranks each, while it answers.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Kill,
    Stop,
    #[cfg(feature = "faults")]
    Rank(&'static str),
}

impl Fault {
    /// What a survivor may say of it.
    fn reasons(self) -> &'static [&'static str] {
        match self {
            Fault::Kill => &["closed the connection"],
            Fault::Stop => &["silent until the deadline", "made no progress", "no rank made progress"],
            #[cfg(feature = "faults")]
            Fault::Rank("hang") => &["made no progress", "no rank made progress"],
            #[cfg(feature = "faults")]
            Fault::Rank("fail") => &["a planted fault"],
            #[cfg(feature = "faults")]
            Fault::Rank(_) => &["panicked"],
        }
    }
}

/// Pseudo-random numbers (splitmix64).
fn random(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A group that reads a long prompt in small chunks and then answers at length, and the moment number `n` of a fault. Returns
/// how long the survivors took to end.
fn strike(fault: Fault, n: u64) -> Duration {
    let place = Place::new();
    let prompt: Vec<u32> = (0..600).map(|i| i * 37 % 400).collect();
    let prompt = ids_file(&prompt);
    let command = || {
        let mut command = on_ranks(4, &["generate", "--ignore-eos", "--chunk", "16", "--max-tokens", "8000"]);
        command.args(["--max-model-len", "12k", "--step-timeout", "3", "--ids-file"]).arg(prompt.path());
        #[cfg(feature = "faults")]
        if let Fault::Rank(kind) = fault {
            // Some ten calls a step.
            let (rank, call) = (random(n) % 4, 1 + random(n + 1) % 3000);
            command.env("LONGHAUL_FAULT", format!("rank={rank},call={call},do={kind}"));
        }
        command
    };
    let mut nodes = [place.node(&mut command(), 0, 2), place.node(&mut command(), 1, 2)];
    nodes[0].wait_for("have met");
    let victim = (random(n + 2) % 2) as usize;
    let moment = Duration::from_micros(random(n + 3) % 1_500_000);
    let since = match fault {
        Fault::Kill | Fault::Stop => {
            std::thread::sleep(moment);
            nodes[victim].signal(if fault == Fault::Kill { Signal::KILL } else { Signal::STOP });
            Instant::now()
        }
        #[cfg(feature = "faults")]
        Fault::Rank(_) => {
            let deadline = Instant::now() + PATIENCE;
            while !nodes.iter().any(|node| node.stderr().contains("fault: rank")) {
                assert!(Instant::now() < deadline, "no fault came");
                std::thread::sleep(Duration::from_millis(2));
            }
            Instant::now()
        }
    };
    let is_hit = |node: usize| node == victim && matches!(fault, Fault::Kill | Fault::Stop);
    for (rank, node) in nodes.iter_mut().enumerate().filter(|(rank, _)| !is_hit(*rank)) {
        let (code, said) = (node.end().code(), node.stderr());
        assert_eq!(code, Some(RESTART), "{fault:?} {n}, node {rank}: {said}");
        assert!(fault.reasons().iter().any(|why| said.contains(why)), "{fault:?} {n}, node {rank}: {said}");
    }
    let took = since.elapsed();
    if fault == Fault::Stop {
        // Going on, it finds that the group has ended without it.
        nodes[victim].signal(Signal::CONT);
        assert_eq!(nodes[victim].end().code(), Some(RESTART), "{n}: {}", nodes[victim].stderr());
    }
    for node in &mut nodes {
        node.end();
    }
    place.assert_nothing_is_left();
    took
}

/// Strikes at `moments` moments and prints how long the survivors took.
fn strike_at_random(fault: Fault, moments: u64) {
    let mut took: Vec<Duration> = (0..moments).map(|n| strike(fault, 1000 * n)).collect();
    took.sort_unstable();
    let ms = |at: usize| took[at.min(took.len() - 1)].as_millis();
    println!(
        "{fault:?}: {moments} moments, survivors ended after {} ms (median), {} ms (longest)",
        ms(took.len() / 2),
        ms(took.len())
    );
}

fn moments() -> u64 {
    std::env::var("LONGHAUL_FAULTS").ok().and_then(|n| n.parse().ok()).unwrap_or(4)
}

#[test]
fn survivors_of_a_killed_node_end() {
    strike_at_random(Fault::Kill, 2 * moments());
}

#[test]
fn survivors_of_a_stopped_node_end() {
    strike_at_random(Fault::Stop, moments());
}

#[test]
#[ignore = "nightly: ten minutes"]
fn faults_of_nodes_at_100_moments() {
    strike_at_random(Fault::Kill, 100);
    strike_at_random(Fault::Stop, 100);
}

#[cfg(feature = "faults")]
#[test]
fn a_broken_rank_ends_all_nodes() {
    for kind in ["hang", "fail", "panic"] {
        strike_at_random(Fault::Rank(kind), moments());
    }
}

#[cfg(feature = "faults")]
#[test]
#[ignore = "nightly: ten minutes"]
fn faults_of_ranks_at_100_moments() {
    for kind in ["hang", "fail", "panic"] {
        strike_at_random(Fault::Rank(kind), 100);
    }
}

#[cfg(not(feature = "faults"))]
#[test]
fn faults_are_not_in_this_build() {
    let mut command = on_ranks(2, &GENERATE);
    succeed(command.env("LONGHAUL_FAULT", "rank=1,call=1,do=fail"));
    let binary = std::fs::read(env!("CARGO_BIN_EXE_longhaul")).unwrap();
    assert!(!binary.windows(14).any(|window| window == b"LONGHAUL_FAULT"));
}

/// Two network namespaces that a pair of virtual interfaces joins; gone when dropped.
struct Namespaces {
    names: [String; 2],
}

impl Namespaces {
    /// # Errors
    /// Why the machine does not allow it.
    fn new() -> Result<Self, String> {
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
    fn inside(&self, n: usize, command: &Command) -> Command {
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
    fn cut(&self) {
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

fn ip(line: &str) -> Result<(), String> {
    let output = Command::new("ip").args(line.split(' ')).output().map_err(|e| format!("ip: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

#[test]
fn nodes_in_network_namespaces_answer_and_end_when_the_link_is_cut() {
    let namespaces = match Namespaces::new() {
        Ok(namespaces) => namespaces,
        Err(why) => {
            println!("skipped: this machine makes no network namespaces: {why}");
            return;
        }
    };
    let place = Place::new();
    let start = |rank: usize, arguments: &[&str]| {
        let mut command = on_ranks(4, arguments);
        command.args(["--nnodes", "2", "--node-rank", &rank.to_string(), "--leader", "10.231.7.1"]);
        command.arg("--node-key-file").arg(place.dir.path().join("key"));
        let name = format!("node{rank}");
        Node::start(&mut namespaces.inside(rank, &command), place.dir.path(), &name)
    };
    let alone = json_output(&mut on_ranks(1, &GENERATE))["ids"].clone();
    let (mut worker, mut leader) = (start(1, &GENERATE), start(0, &GENERATE));
    assert!(leader.end().success() && worker.end().success(), "{}{}", leader.stderr(), worker.stderr());
    assert_eq!(ids(&leader.stdout()), alone);

    let endless =
        ["generate", "--ignore-eos", "--prompt", "a", "--max-tokens", "12000", "--max-model-len", "13k"];
    let endless = [&endless[..], &["--step-timeout", "3"]].concat();
    let mut nodes = [start(0, &endless), start(1, &endless)];
    nodes[0].wait_for("have met");
    std::thread::sleep(Duration::from_millis(500));
    namespaces.cut();
    for node in &mut nodes {
        assert_eq!(node.end().code(), Some(RESTART), "{}", node.stderr());
    }
}

//! Groups of processes: results, and ranks that are killed or stopped at random moments. The ranks are this test program,
//! started again for the test `rank_process`.
//!
//! `LONGHAUL_FAULTS` is the number of processes to kill (default 20) and, a quarter of it, to stop.
#![cfg(target_os = "linux")]

mod common;

use std::io::{BufRead, BufReader, Lines};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use common::{LENGTHS, everything, value};
use longhaul_backend::{Collective, CollectiveError};
use longhaul_collective::{Options, Processes, Segment, SegmentError, end_with_parent};
use rustix::process::{Pid, Signal, kill_process};

/// The exit code that asks for a restart.
const RESTART: u8 = 75;

fn variable<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// A rank, when this program was started as one.
#[test]
fn rank_process() {
    let Some(work) = variable::<String>("TEST_WORK") else { return };
    let number = |name: &str| variable::<usize>(name).unwrap();
    end_with_parent(number("TEST_PARENT") as u32).unwrap();
    let (rank, world_size) = (number("TEST_RANK"), number("TEST_WORLD"));
    if work == "leader" {
        lead(world_size);
        return;
    }
    let path = variable::<String>("TEST_SEGMENT").unwrap();
    let timeout = Duration::from_millis(number("TEST_TIMEOUT_MS") as u64);
    let group = Processes::attach(Path::new(&path), rank, world_size, timeout).unwrap();
    match work.as_str() {
        "everything" => say(&format!("sums {:?}", everything(&group, &LENGTHS[..4]))),
        "rounds" => {
            let error = rounds(&group);
            say(&format!("ended {error}"));
            std::process::exit(RESTART.into());
        }
        other => panic!("{other}"),
    }
}

/// Rounds without end; what ended them.
fn rounds(group: &Processes) -> CollectiveError {
    let world_size = group.world_size();
    for round in 0.. {
        if round == 3 {
            say("running");
        }
        // Lengths of one and of several exchanges.
        let length = [1, 300, 9000, 40_000][round % 4];
        let mut values: Vec<i32> = (0..length).map(|i| value(group.rank(), i, round)).collect();
        if let Err(error) = group.all_reduce((&mut values[..]).into()) {
            return error;
        }
        for i in [0, length / 2, length - 1] {
            let exact: i32 = (0..world_size).map(|rank| value::<i32>(rank, i, round)).sum();
            assert_eq!(values[i], exact, "round {round}");
        }
    }
    unreachable!()
}

/// Starts ranks and waits for ever: to be killed.
fn lead(world_size: usize) {
    let ranks = Ranks::start(world_size, "rounds", Duration::from_secs(60));
    ranks.wait_until_running(|line| say(&line));
    loop {
        std::thread::park();
    }
}

fn say(line: &str) {
    // Behind whatever the test harness has left on the line.
    println!("\nrank: {line}");
}

fn start(work: &str, rank: usize, world_size: usize, timeout: Duration, segment: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "rank_process", "--nocapture", "--test-threads=1"])
        .env("TEST_WORK", work)
        .env("TEST_RANK", rank.to_string())
        .env("TEST_WORLD", world_size.to_string())
        .env("TEST_TIMEOUT_MS", timeout.as_millis().to_string())
        .env("TEST_SEGMENT", segment)
        .env("TEST_PARENT", std::process::id().to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

type Output = Lines<BufReader<ChildStdout>>;

/// The next line a rank says; `None` at its end.
fn listen(output: &mut Output) -> Option<String> {
    output.map_while(Result::ok).find_map(|line| line.strip_prefix("rank: ").map(str::to_owned))
}

/// The processes of a group.
struct Ranks {
    segment: Segment,
    children: Vec<Child>,
    outputs: std::cell::RefCell<Vec<Output>>,
}

impl Ranks {
    fn start(world_size: usize, work: &str, timeout: Duration) -> Self {
        let options = Options { timeout, slot_bytes: 16 << 10 };
        let segment = Segment::create(world_size, options).unwrap();
        let mut children: Vec<Child> =
            (0..world_size).map(|rank| start(work, rank, world_size, timeout, &segment.path())).collect();
        let outputs =
            children.iter_mut().map(|child| BufReader::new(child.stdout.take().unwrap()).lines()).collect();
        Self { segment, children, outputs: std::cell::RefCell::new(outputs) }
    }

    fn wait_until_running(&self, mut report: impl FnMut(String)) {
        for output in self.outputs.borrow_mut().iter_mut() {
            assert_eq!(listen(output).as_deref(), Some("running"));
        }
        report("all running".into());
    }

    fn signal(&self, rank: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.children[rank]), signal).unwrap();
    }

    /// Waits for the end of all but `victim` and returns what they say. Each must ask for a restart.
    fn survivors(&mut self, victim: usize) -> Vec<String> {
        let mut said = Vec::new();
        for (rank, output) in self.outputs.borrow_mut().iter_mut().enumerate() {
            if rank != victim {
                said.push(listen(output).unwrap());
            }
        }
        for (_, child) in self.children.iter_mut().enumerate().filter(|(rank, _)| *rank != victim) {
            assert_eq!(child.wait().unwrap().code(), Some(RESTART.into()));
        }
        said
    }

    /// Checks that the group's memory is gone with its processes.
    fn assert_nothing_is_left(self) {
        let inode = std::fs::metadata(self.segment.path()).unwrap().ino();
        drop(self);
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            // Another user's processes cannot be read, and others end meanwhile.
            let maps = std::fs::read_to_string(process.path().join("maps")).unwrap_or_default();
            let left = maps.lines().find(|line| {
                line.contains("memfd:longhaul-collective") && line.contains(&format!(" {inode} "))
            });
            assert_eq!(left, None, "in {}", process.path().display());
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn every_operation_and_type_on_1_to_8_processes() {
    for world_size in [1, 2, 3, 5, 8] {
        let mut ranks = Ranks::start(world_size, "everything", Duration::from_secs(120));
        let said: Vec<_> = ranks.outputs.borrow_mut().iter_mut().map(|o| listen(o).unwrap()).collect();
        for line in &said {
            assert!(line.starts_with("sums ["));
            assert_eq!(line, &said[0], "ranks hold different bits");
        }
        for child in &mut ranks.children {
            assert!(child.wait().unwrap().success());
        }
        ranks.assert_nothing_is_left();
    }
}

fn faults() -> usize {
    variable("LONGHAUL_FAULTS").unwrap_or(20)
}

/// A moment and a victim for fault `n`.
fn fault(n: usize, world_size: usize) -> (Duration, usize) {
    let random = f32::to_bits(value(n, 0, 4242)) as usize;
    (Duration::from_micros((random % 20_000) as u64), random / 20_000 % world_size)
}

#[test]
fn survivors_of_a_killed_process_end() {
    for n in 0..faults() {
        let world_size = 2 + n % 3;
        // Far beyond the test: the end must be noticed, not waited out.
        let mut ranks = Ranks::start(world_size, "rounds", Duration::from_secs(600));
        ranks.wait_until_running(|_| ());
        let (moment, victim) = fault(n, world_size);
        std::thread::sleep(moment);
        ranks.signal(victim, Signal::KILL);
        for said in ranks.survivors(victim) {
            assert_eq!(said, format!("ended rank {victim} failed: its process ended"));
        }
        assert_eq!(ranks.children[victim].wait().unwrap().signal(), Some(9));
        ranks.assert_nothing_is_left();
    }
}

#[test]
fn survivors_of_a_stopped_process_end_at_the_deadline() {
    let timeout = Duration::from_secs(3);
    for n in 0..faults().div_ceil(4) {
        let world_size = 2 + n % 3;
        let mut ranks = Ranks::start(world_size, "rounds", timeout);
        ranks.wait_until_running(|_| ());
        let (moment, victim) = fault(1000 + n, world_size);
        std::thread::sleep(moment);
        ranks.signal(victim, Signal::STOP);
        let expected = format!("ended all_reduce: rank {victim} did not arrive within 3s");
        for said in ranks.survivors(victim) {
            assert_eq!(said, expected);
        }
        // Going on, it finds that the group has ended without it.
        ranks.signal(victim, Signal::CONT);
        assert_eq!(listen(&mut ranks.outputs.borrow_mut()[victim]).unwrap(), expected);
        assert_eq!(ranks.children[victim].wait().unwrap().code(), Some(RESTART.into()));
        ranks.assert_nothing_is_left();
    }
}

#[test]
fn ranks_end_with_their_leader_even_when_stopped() {
    let mut leader = start("leader", 0, 3, Duration::from_secs(60), Path::new(""));
    let mut output = BufReader::new(leader.stdout.take().unwrap()).lines();
    assert_eq!(listen(&mut output).as_deref(), Some("all running"));
    // Those of whichever thread of the leader started them.
    let tasks = std::fs::read_dir(format!("/proc/{}/task", leader.id())).unwrap();
    let ranks: Vec<i32> = tasks
        .flatten()
        .flat_map(|task| {
            let list = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<i32>>()
        })
        .collect();
    assert_eq!(ranks.len(), 3);
    kill_process(Pid::from_raw(ranks[1]).unwrap(), Signal::STOP).unwrap();
    leader.kill().unwrap();
    leader.wait().unwrap();
    for rank in ranks {
        // An ended process that its new parent has not yet waited for is a zombie.
        let lives = || {
            std::fs::read_to_string(format!("/proc/{rank}/stat"))
                .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or("").starts_with(['Z', 'X']))
        };
        while lives() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn what_does_not_belong_to_the_group_is_refused() {
    let segment = Segment::create(2, Options::default()).unwrap();
    let attach = |rank, world_size| {
        Processes::attach(&segment.path(), rank, world_size, Duration::from_millis(50)).err()
    };
    let error = attach(0, 3).unwrap();
    assert!(matches!(error, SegmentError::Mismatch { field: "world size", .. }), "{error}");
    assert!(error.to_string().contains("world size is 2, expected 3"), "{error}");
    assert!(matches!(attach(2, 2), Some(SegmentError::Mismatch { field: "world size", .. })));
    // Alone, rank 0 gives up; then its place is taken and the group has ended.
    let Some(SegmentError::Group(CollectiveError::Timeout { op: "join", missing, .. })) = attach(0, 2) else {
        panic!()
    };
    assert_eq!(missing, [1]);
    assert!(matches!(attach(0, 2), Some(SegmentError::Taken { rank: 0, .. })));
    assert!(matches!(attach(1, 2), Some(SegmentError::Group(CollectiveError::Timeout { .. }))));

    let path = std::env::temp_dir().join(format!("longhaul-not-a-group-{}", std::process::id()));
    std::fs::write(&path, [0u8; 4096]).unwrap();
    let error = Processes::attach(&path, 0, 2, Duration::from_millis(50)).err().unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    assert!(Segment::create(0, Options::default()).is_err());
    assert!(Segment::create(65, Options::default()).is_err());
}

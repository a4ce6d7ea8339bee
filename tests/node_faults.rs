//! What becomes of a group when one of its nodes is killed, stopped or broken.
//!
//! Faults come at random moments; `LONGHAUL_FAULTS` says at how many of each kind (default 4), `--ignored` runs 100. With
//! `--features faults` ranks are broken too.
#![cfg(target_os = "linux")]

mod common;

use std::process::Stdio;
use std::time::{Duration, Instant};

use common::ids_file;
use common::nodes::{GENERATE, Place, RESTART, on_ranks};
use rustix::process::Signal;

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
            let deadline = Instant::now() + common::nodes::PATIENCE;
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

/// A thread that hangs cannot be ended; its process can, whether it is the main thread's rank or another.
#[cfg(feature = "faults")]
#[test]
fn a_process_ends_with_a_rank_that_hangs() {
    for (rank, limit) in [(0, Some("1")), (2, Some("1")), (1, None)] {
        let mut command = on_ranks(3, &GENERATE);
        command.env("LONGHAUL_FAULT", format!("rank={rank},call=101,do=hang"));
        command.args(limit.map(|limit| ["--step-timeout", limit]).iter().flatten());
        let output = command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(RESTART), "{message}");
        assert!(message.contains(&format!("rank {rank} made no progress")), "{message}");
        // Without a limit given, that of steps that take milliseconds.
        assert!(message.contains(&format!("the limit is {}.0 s", limit.unwrap_or("5"))), "{message}");
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
    common::succeed(command.env("LONGHAUL_FAULT", "rank=1,call=1,do=fail"));
    let binary = std::fs::read(env!("CARGO_BIN_EXE_longhaul")).unwrap();
    assert!(!binary.windows(14).any(|window| window == b"LONGHAUL_FAULT"));
}

//! Groups of nodes as a user starts them: one process a node, on loopback and, where the machine allows it, in network
//! namespaces. What they answer, and who is turned away.
#![cfg(target_os = "linux")]

mod common;

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use longhaul_testkit::{Golden, goldens_dir};

use common::nodes::{GENERATE, Namespaces, Node, Place, RESTART, ids, on_ranks};
use common::{fail, ids_file, json_output, longhaul, read_logits, repository, succeed};

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

/// Ranks on emulated CUDA devices, two on one node and one on the other, exchange through the host: the same bits as in one
/// process, and tokens drawn from slices of the vocabulary on both nodes.
#[test]
fn emulated_devices_of_two_nodes_are_one_group() {
    let golden = Golden::load(&goldens_dir().join("dense-tied"));
    let prompt = ids_file(&golden.input_ids);
    let place = Place::new();
    let command = |name: &str, arguments: &[&str]| {
        let mut command = longhaul();
        command.args(arguments).args(["--device", "emulated", "--tp", "3", "--all-reduce", "host"]);
        command.arg("--model").arg(&golden.dir).arg("--ids-file").arg(prompt.path());
        if arguments == ["logits"] {
            command.arg("--out").arg(place.dir.path().join(name));
        }
        command
    };
    let run_nodes = |name: &str, arguments: &[&str]| {
        let mut worker = place.node(&mut command("none", arguments), 1, 2);
        let mut leader = place.node(&mut command(name, arguments), 0, 2);
        assert!(leader.end().success() && worker.end().success(), "{}{}", leader.stderr(), worker.stderr());
        assert_eq!(worker.stdout(), "");
        leader.stdout()
    };
    succeed(&mut command("one", &["logits"]));
    run_nodes("two", &["logits"]);
    let read = |name: &str| {
        let (shape, values) = read_logits(&place.dir.path().join(name));
        (shape, values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    assert_eq!(read("one"), read("two"));

    let generate =
        ["generate", "--json", "--ignore-eos", "--max-tokens", "6", "--temperature", "0.9", "--seed", "5"];
    let alone = json_output(&mut command("one", &generate))["ids"].clone();
    assert_eq!(ids(&run_nodes("two", &generate)), alone);
    place.assert_nothing_is_left();
}

/// What computes, and the way that sums go, must be the same on all nodes.
#[test]
fn nodes_with_other_devices_do_not_fit() {
    let place = Place::new();
    let command = |device: &str| {
        let mut command = longhaul();
        command.args(GENERATE).args(["--tp", "2", "--device", device]);
        command
    };
    let mut worker = place.node(&mut command("emulated"), 1, 2);
    let mut leader = place.node(&mut command("cpu"), 0, 2);
    for node in [&mut worker, &mut leader] {
        assert_eq!(node.end().code(), Some(65), "{}", node.stderr());
        let message = node.stderr();
        assert!(message.contains("plan is") && message.contains("CUDA devices"), "{message}");
    }
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
            [
                &group[..],
                &["--tp", "2", "--device", "emulated", "--all-reduce", "peer", "--node-key-file", key],
            ]
            .concat(),
            69,
            "--all-reduce peer: devices of several nodes",
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

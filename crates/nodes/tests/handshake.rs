//! Leaders and workers that meet over TCP: in any order, with anything wrong, and among strangers.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use longhaul_nodes::{Channel, Identity, Key, Leader, NodesError, PROTOCOL, Timeouts, Waiting, join};

type Result<T> = std::result::Result<T, NodesError>;

fn key() -> Key {
    Key::new(b"correct horse battery staple\n").unwrap()
}

fn identity(world_size: usize) -> Identity {
    Identity {
        protocol: PROTOCOL,
        build: "0.1.0 (abc)".into(),
        model: "m1".into(),
        tokenizer: "t1".into(),
        plan: "p1".into(),
        world_size,
    }
}

/// Long enough for a busy machine where something is to happen.
const PATIENT: Timeouts = Timeouts {
    join: Duration::from_secs(60),
    greeting: Duration::from_secs(30),
    notice: Duration::from_secs(10),
};
/// For what is to time out.
const HASTY: Timeouts = Timeouts {
    join: Duration::from_secs(2),
    greeting: Duration::from_secs(1),
    notice: Duration::from_millis(300),
};

fn leader() -> (Leader, SocketAddr) {
    let leader = Leader::bind("127.0.0.1:0").unwrap();
    let address = leader.address().unwrap();
    (leader, address)
}

/// One leader and one worker of a group of `world_size`: what each ends with, and what the leader reports meanwhile.
fn meet(
    ours: &Identity,
    (rank, theirs, worker_key): (usize, Identity, Key),
    timeouts: Timeouts,
) -> (Result<Vec<Channel>>, Result<Channel>, Vec<String>) {
    let (leader, address) = leader();
    let mut reports = Vec::new();
    std::thread::scope(|scope| {
        let worker =
            scope.spawn(move || join(&address.to_string(), rank, &worker_key, &theirs, PATIENT, &mut |_| ()));
        let led = leader.gather(&key(), ours, timeouts, &mut |error| reports.push(error.to_string()));
        (led, worker.join().unwrap(), reports)
    })
}

#[test]
fn nodes_meet_in_any_order_and_talk() {
    for leader_is_late in [false, true] {
        // A port that is free; the late leader takes it again.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let identity = identity(4);
        std::thread::scope(|scope| {
            let workers: Vec<_> = [3, 1, 2]
                .map(|rank| {
                    let identity = &identity;
                    scope.spawn(move || {
                        join(&address.to_string(), rank, &key(), identity, PATIENT, &mut |_| ()).unwrap()
                    })
                })
                .into();
            if leader_is_late {
                std::thread::sleep(Duration::from_millis(100));
            }
            let mut channels = Leader::bind(address)
                .unwrap()
                .gather(&key(), &identity, PATIENT, &mut |error| panic!("{error}"))
                .unwrap();
            assert_eq!(channels.len(), 3);
            for (rank, channel) in (1u8..).zip(&mut channels) {
                assert!(channel.peer().starts_with(&format!("node {rank} at 127.0.0.1:")));
                channel.send(&[rank; 128], PATIENT.join).unwrap();
            }
            for (rank, worker) in [3u8, 1, 2].into_iter().zip(workers) {
                let mut channel = worker.join().unwrap();
                assert_eq!(channel.receive(1 << 20, PATIENT.join).unwrap(), [rank; 128]);
                channel.send(&vec![rank; 1 << 20], PATIENT.join).unwrap();
                let leaders = &mut channels[usize::from(rank) - 1];
                assert_eq!(leaders.receive(1 << 20, PATIENT.join).unwrap(), vec![rank; 1 << 20]);
                // The end of a node shows at once.
                assert!(leaders.is_open());
                drop(channel);
                let error = leaders.receive(16, PATIENT.join).unwrap_err();
                assert!(matches!(error, NodesError::Lost { .. }) && error.exit_code() == 75, "{error}");
                assert!(!leaders.is_open());
            }
        });
    }
}

#[test]
fn a_group_of_one_needs_nobody() {
    let (leader, _) = leader();
    assert!(leader.gather(&key(), &identity(1), HASTY, &mut |_| ()).unwrap().is_empty());
}

#[test]
fn nodes_that_do_not_fit_are_refused_on_both_sides() {
    let changed = |change: fn(&mut Identity)| {
        let mut identity = identity(2);
        change(&mut identity);
        identity
    };
    // Field, worker, and the values named.
    let cases: [(&str, usize, Identity, &str, &str); 8] = [
        ("build", 1, changed(|i| i.build = "0.1.0 (abd)".into()), "0.1.0 (abc)", "0.1.0 (abd)"),
        ("build", 1, changed(|i| i.build = String::new()), "0.1.0 (abc)", ""),
        ("model", 1, changed(|i| i.model = "m2".into()), "m1", "m2"),
        ("tokenizer", 1, changed(|i| i.tokenizer = "t2".into()), "t1", "t2"),
        ("plan", 1, changed(|i| i.plan = "p2".into()), "p1", "p2"),
        ("world size", 1, changed(|i| i.world_size = 3), "2", "3"),
        ("node rank", 0, identity(2), "1 to 1", "0"),
        ("node rank", 2, identity(2), "1 to 1", "2"),
    ];
    for (field, rank, theirs, leader_value, worker_value) in cases {
        let (led, joined, _) = meet(&identity(2), (rank, theirs, key()), PATIENT);
        let sides = [led.map(|_| ()).unwrap_err(), joined.map(|_| ()).unwrap_err()];
        for error in sides {
            assert_eq!(error.exit_code(), 65);
            let NodesError::Refused { rank: named, field: what, leader, worker } = error else {
                panic!("{field}: {error}");
            };
            assert_eq!(
                (named, &what[..], &leader[..], &worker[..]),
                (rank, field, leader_value, worker_value)
            );
        }
    }
}

#[test]
fn another_protocol_is_refused_on_both_sides() {
    let theirs = Identity { protocol: PROTOCOL + 1, ..identity(2) };
    let (led, joined, reports) = meet(&identity(2), (1, theirs, key()), HASTY);
    let error = joined.map(|_| ()).unwrap_err();
    assert!(matches!(&error, NodesError::Refused { field, .. } if field == "protocol"), "{error}");
    assert_eq!(error.exit_code(), 65);
    let (newer, ours) = (PROTOCOL + 1, PROTOCOL);
    assert!(reports[0].contains(&format!("protocol {newer}, the leader's is {ours}")), "{reports:?}");
    let error = led.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("node 1 had not joined") && error.contains("protocol 2"), "{error}");
}

#[test]
fn another_key_is_refused_on_both_sides() {
    for other in [&b"correct horse battery stable"[..], b"correct horse battery staple and more"] {
        let (led, joined, reports) = meet(&identity(2), (1, identity(2), Key::new(other).unwrap()), HASTY);
        let error = joined.map(|_| ()).unwrap_err();
        assert!(matches!(error, NodesError::Key { .. }) && error.exit_code() == 65, "{error}");
        assert!(reports[0].contains("another shared key"), "{reports:?}");
        assert!(led.map(|_| ()).unwrap_err().to_string().contains("another shared key"));
    }
    assert!(matches!(Key::new(b"  short   \n"), Err(NodesError::WeakKey { bytes: 5, .. })));
}

#[test]
fn a_rank_can_be_taken_once_while_it_lives() {
    let (leader, address) = leader();
    let identity = identity(3);
    std::thread::scope(|scope| {
        let start = || {
            let identity = &identity;
            scope.spawn(move || join(&address.to_string(), 1, &key(), identity, PATIENT, &mut |_| ()))
        };
        let workers = [start(), start()];
        let led = leader.gather(&key(), &identity, PATIENT, &mut |_| ()).map(|_| ()).unwrap_err();
        assert!(
            led.to_string().contains("node rank is 1, the leader's is taken by node 1 at 127.0.0.1"),
            "{led}"
        );
        let mut ends = workers.map(|worker| worker.join().unwrap().map(|_| ()).unwrap_err());
        ends.sort_by_key(NodesError::exit_code);
        assert!(matches!(&ends[0], NodesError::Refused { field, .. } if field == "node rank"), "{}", ends[0]);
        // The first one had joined, and is told why the group ended.
        assert!(
            matches!(&ends[1], NodesError::Ended { message } if message.contains("taken")),
            "{}",
            ends[1]
        );
    });
}

/// Also when the others come first: its former self does not make the group complete.
#[test]
fn a_worker_that_was_started_again_takes_its_place() {
    for order in [[1, 2], [2, 1]] {
        let (leader, address) = leader();
        let identity = identity(3);
        std::thread::scope(|scope| {
            let identity = &identity;
            let led = scope.spawn(move || leader.gather(&key(), identity, PATIENT, &mut |_| ()));
            // Gives up waiting for rank 2 and closes its connection.
            assert!(join(&address.to_string(), 1, &key(), identity, HASTY, &mut |_| ()).is_err());
            let joins = order.map(|rank| {
                let joining = scope
                    .spawn(move || join(&address.to_string(), rank, &key(), identity, PATIENT, &mut |_| ()));
                std::thread::sleep(Duration::from_millis(200));
                joining
            });
            let mut led = led.join().unwrap().unwrap();
            for (rank, joining) in order.into_iter().zip(joins) {
                led[rank - 1].send(b"step", PATIENT.join).unwrap();
                let mut worker = joining.join().unwrap().unwrap();
                assert_eq!(worker.receive(16, PATIENT.join).unwrap(), b"step");
            }
        });
    }
}

#[test]
fn strangers_do_not_harm_the_group() {
    let (leader, address) = leader();
    let identity = identity(2);
    let connect = || TcpStream::connect(address).unwrap();
    // Says nothing; hangs up; speaks HTTP; announces too much; stops in the middle of a frame.
    let silent = connect();
    drop(connect());
    let mut others = Vec::new();
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n"[..],
        b"LHND\x01\0\0\0\xff\xff\xff\xff",
        b"LHND\x01\0\0\0\x24\0\0\0\x01\0\0\0half",
        b"LHND\x04\0\0\0\x02\0\0\0{}",
    ] {
        let mut stream = connect();
        stream.write_all(bytes).unwrap();
        others.push(stream);
    }
    std::thread::scope(|scope| {
        let (send, reports) = std::sync::mpsc::channel();
        let (leader, identity) = (&leader, &identity);
        let led = scope.spawn(move || {
            leader
                .gather(&key(), identity, PATIENT, &mut |e| send.send(e.to_string()).unwrap())
                .map(|c| c.len())
        });
        let reports: Vec<String> = reports.iter().take(4).collect();
        join(&address.to_string(), 1, &key(), identity, PATIENT, &mut |_| ()).unwrap();
        assert_eq!(led.join().unwrap().unwrap(), 1);
        let reports = reports.join("\n");
        for words in ["not a frame", "4294967295 bytes; at most 4096", "no greeting", "closed the connection"]
        {
            assert!(reports.contains(words), "{reports}");
        }
    });
    drop(others);
    drop(silent);
}

#[test]
fn who_does_not_come_is_named_and_those_who_came_are_told() {
    let (leader, address) = leader();
    let identity = identity(4);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| join(&address.to_string(), 2, &key(), &identity, PATIENT, &mut |_| ()));
        let mut waited = Vec::new();
        let mut report = |waiting: &Waiting<'_>| waited.push(waiting.to_string());
        let timeouts = Timeouts { greeting: PATIENT.greeting, ..HASTY };
        let error = leader.gather(&key(), &identity, timeouts, &mut report).map(|_| ()).unwrap_err();
        assert!(waited.last().unwrap().starts_with("waiting for node 1, 3 for "), "{waited:?}");
        assert_eq!(error.to_string(), "after 2s node 1, 3 had not joined");
        assert_eq!(error.exit_code(), 75);
        let error = worker.join().unwrap().map(|_| ()).unwrap_err();
        assert!(matches!(&error, NodesError::Ended { message } if message.contains("node 1, 3")), "{error}");
        assert_eq!(error.exit_code(), 75);
    });
}

#[test]
fn a_leader_that_never_comes_is_named() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut waited = Vec::new();
    let mut report = |waiting: &Waiting<'_>| waited.push(waiting.to_string());
    let error =
        join(&address.to_string(), 1, &key(), &identity(2), HASTY, &mut report).map(|_| ()).unwrap_err();
    assert!(waited[0].starts_with(&format!("waiting for the leader at {address} for ")), "{waited:?}");
    assert!(matches!(error, NodesError::NoLeader { .. }) && error.exit_code() == 75, "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

/// A man in the middle who changes one byte after the handshake: the receiver notices.
#[test]
fn a_changed_frame_is_noticed() {
    let (leader, address) = leader();
    let middle = TcpListener::bind("127.0.0.1:0").unwrap();
    let middle_address = middle.local_addr().unwrap();
    let identity = identity(2);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let worker = middle.accept().unwrap().0;
            let leader = TcpStream::connect(address).unwrap();
            let (mut from, mut to) = (leader.try_clone().unwrap(), worker.try_clone().unwrap());
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut from, mut to) = (&worker, &leader);
                    std::io::copy(&mut from, &mut to).unwrap_or_default()
                });
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = from.read(&mut buffer) {
                    if let Some(at) = buffer[..read].windows(5).position(|w| w == b"token") {
                        buffer[at] = b'T';
                    }
                    to.write_all(&buffer[..read]).unwrap();
                }
                let _ = to.shutdown(std::net::Shutdown::Both);
            });
        });
        let worker = scope
            .spawn(|| join(&middle_address.to_string(), 1, &key(), &identity, PATIENT, &mut |_| ()).unwrap());
        let mut channels = leader.gather(&key(), &identity, PATIENT, &mut |_| ()).unwrap();
        channels[0].send(b"plan", PATIENT.join).unwrap();
        channels[0].send(b"token 17", PATIENT.join).unwrap();
        let mut worker = worker.join().unwrap();
        assert_eq!(worker.receive(100, PATIENT.join).unwrap(), b"plan");
        assert!(matches!(worker.receive(100, PATIENT.join), Err(NodesError::Key { .. })));
        drop((worker, channels));
    });
}

//! Connections: messages in order, and the end and the silence of the other side.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use longhaul_nodes::{
    Channel, Connection, Identity, Key, Leader, Liveness, NodesError, PROTOCOL, Timeouts, join,
};

/// Long enough for a busy machine where something is to happen.
const PATIENCE: Duration = Duration::from_secs(60);
const PATIENT: Liveness = Liveness { beat: Duration::from_millis(100), silence: PATIENCE };

/// The ends of a connection: the leader's and the worker's.
fn pair() -> (Channel, Channel) {
    let key = Key::new(b"correct horse battery staple").unwrap();
    let text = || "same".to_owned();
    let identity = Identity {
        protocol: PROTOCOL,
        build: text(),
        model: text(),
        tokenizer: text(),
        plan: text(),
        world_size: 2,
    };
    let timeouts = Timeouts { join: PATIENCE, ..Timeouts::default() };
    let leader = Leader::bind("127.0.0.1:0").unwrap();
    let address = leader.address().unwrap().to_string();
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| join(&address, 1, &key, &identity, timeouts, &mut |_| ()).unwrap());
        let leading = leader.gather(&key, &identity, timeouts, &mut |_| ()).unwrap().pop().unwrap();
        (leading, worker.join().unwrap())
    })
}

type Heard = Receiver<Result<Vec<u8>, NodesError>>;

fn open(channel: Channel, liveness: Liveness) -> (Connection, Heard) {
    let (send, heard) = self::channel();
    let handler = move |event| {
        // The test may have heard enough.
        let _ = send.send(event);
    };
    (Connection::open(channel, liveness, 4 << 20, handler).unwrap(), heard)
}

fn message(n: usize) -> Arc<Vec<u8>> {
    Arc::new(vec![n as u8; n * 40_000])
}

#[test]
fn messages_arrive_in_order_in_both_directions() {
    let (ours, theirs) = pair();
    let ((ours, we_hear), (theirs, they_hear)) = (open(ours, PATIENT), open(theirs, PATIENT));
    for n in 0..50 {
        ours.send(message(n));
        theirs.send(message(50 - n));
    }
    for n in 0..50 {
        assert_eq!(they_hear.recv_timeout(PATIENCE).unwrap().unwrap(), *message(n));
        assert_eq!(we_hear.recv_timeout(PATIENCE).unwrap().unwrap(), *message(50 - n));
    }
    // What waits is sent before the end, which then shows at once.
    (0..50).for_each(|n| ours.send(message(n)));
    let closing = std::thread::spawn(move || ours.close(PATIENCE));
    for n in 0..50 {
        assert_eq!(they_hear.recv_timeout(PATIENCE).unwrap().unwrap(), *message(n));
    }
    drop(theirs);
    closing.join().unwrap();
    let error = we_hear.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(&error, NodesError::Lost { message, .. } if message.contains("closed")), "{error}");
    assert!(error.to_string().contains("node 1 at 127.0.0.1"), "{error}");
}

#[test]
fn beats_keep_a_connection_and_silence_ends_it() {
    let silence = Duration::from_millis(1500);
    let liveness = Liveness { silence, ..PATIENT };
    let (ours, theirs) = pair();
    let ((_ours, we_hear), (_theirs, they_hear)) = (open(ours, liveness), open(theirs, liveness));
    // Nobody says anything for twice the silence allowed.
    assert!(we_hear.recv_timeout(2 * silence).is_err());
    assert!(they_hear.try_recv().is_err());

    let (ours, stopped) = pair();
    let (ours, we_hear) = open(ours, liveness);
    // Far more than the system holds for a process that does not read: nobody who sends waits for it.
    for _ in 0..20 {
        ours.send(Arc::new(vec![0; 4 << 20]));
    }
    let error = we_hear.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(error, NodesError::Lost { .. }) && error.exit_code() == 75, "{error}");
    drop(stopped);
}

#[test]
fn what_is_too_long_ends_the_connection() {
    let (ours, theirs) = pair();
    let (_ours, we_hear) = open(ours, PATIENT);
    let (theirs, _) = open(theirs, PATIENT);
    theirs.send(Arc::new(vec![0; (4 << 20) + 1]));
    let error = we_hear.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(error, NodesError::Malformed { .. }), "{error}");
}

//! The meeting of leader and workers.
//!
//! ```text
//! worker                                  leader
//! HELLO     protocol, nonce         ──►
//!                                   ◄──   CHALLENGE  nonce          (or REFUSAL: protocol)
//! CONTROL   rank, identity          ──►                             from here on with tags
//!                                   ◄──   CONTROL  accepted         (or refused: field; or REFUSAL: key)
//!                                   ◄──   CONTROL  start            when all ranks are there (or ended: reason)
//! ```
//! The format of HELLO and REFUSAL never changes, so that different versions can tell each other so.
//!
//! A node that has the key and does not fit ends the group at once, on all sides: a launcher that starts it again would start
//! the same. Whoever has another key, or speaks another protocol, is a stranger to the leader, which says so and waits on: a
//! stranger must not be able to end a group. Such a worker ends by itself, and the leader at the end of its patience.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::channel::{Channel, Key, MOST_BYTES_OF_STRANGERS, NONCE_BYTES, Side, kind, nonce};
use crate::{Identity, NodesError};

type Result<T> = std::result::Result<T, NodesError>;

/// Strangers that may be in a handshake at once; more are turned away.
const MOST_GREETINGS: usize = 64;
/// For the leader's short answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long nodes wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For all ranks to be there: loading images and mounting volumes take minutes.
    pub join: Duration,
    /// For one handshake.
    pub greeting: Duration,
    /// Between two lines that say who is still missing.
    pub notice: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            join: Duration::from_secs(600),
            greeting: Duration::from_secs(10),
            notice: Duration::from_secs(10),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Joining {
    rank: usize,
    identity: Identity,
}

/// What happens while nodes wait for each other: a line for a log.
#[derive(Debug)]
pub enum Waiting<'a> {
    /// The leader turned a connection away and waits on.
    TurnedAway(&'a NodesError),
    /// The leader still waits for some ranks.
    ForRanks {
        /// Who is missing.
        missing: Vec<usize>,
        /// How long it has waited.
        since: Duration,
    },
    /// A worker still waits for the leader.
    ForLeader {
        /// Where it should listen.
        leader: &'a str,
        /// The last failure.
        message: &'a str,
        /// How long it has waited.
        since: Duration,
    },
    /// A worker has joined; others are still missing.
    Joined {
        /// Where the leader listens.
        leader: &'a str,
    },
}

impl fmt::Display for Waiting<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Waiting::TurnedAway(error) => write!(f, "turned away: {error}"),
            Waiting::ForRanks { missing, since } => {
                let missing: Vec<String> = missing.iter().map(usize::to_string).collect();
                write!(f, "waiting for node {} for {} s", missing.join(", "), since.as_secs())
            }
            Waiting::ForLeader { leader, message, since } => {
                write!(f, "waiting for the leader at {leader} for {} s: {message}", since.as_secs())
            }
            Waiting::Joined { leader } => write!(f, "joined the leader at {leader}, waiting for the others"),
        }
    }
}

/// When the next line that still waits is due.
struct Notices {
    start: Instant,
    every: Duration,
    next: Duration,
}

impl Notices {
    fn new(every: Duration) -> Self {
        Self { start: Instant::now(), every, next: every }
    }

    /// How long has been waited, when a line is due.
    fn due(&mut self) -> Option<Duration> {
        let since = self.start.elapsed();
        let due = since >= self.next;
        while since >= self.next {
            self.next += self.every.max(Duration::from_millis(1));
        }
        due.then_some(since)
    }
}

/// What differs.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Difference {
    field: String,
    leader: String,
    worker: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Answer {
    Accepted,
    Refused(Difference),
    Start,
    Ended(String),
}

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Structs of strings and numbers have no way to fail.
    serde_json::to_vec(message).unwrap_or_default()
}

fn decode<T: for<'a> Deserialize<'a>>(channel: &Channel, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| channel.malformed(format!("a message that is not understood: {e}")))
}

/// The leader's end: rank 0, which the workers connect to.
pub struct Leader {
    listener: TcpListener,
}

impl Leader {
    /// Listens on `address` (`0.0.0.0:20000`).
    ///
    /// # Errors
    /// [`NodesError::System`].
    pub fn bind(address: impl ToSocketAddrs + std::fmt::Display) -> Result<Self> {
        let bind = || -> io::Result<TcpListener> {
            let listener = TcpListener::bind(&address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = bind()
            .map_err(|source| NodesError::System { what: format!("listening on {address}"), source })?;
        Ok(Self { listener })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// [`NodesError::System`].
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().map_err(|source| NodesError::System { what: "the address".into(), source })
    }

    /// Waits for ranks 1 to `identity.world_size - 1` and starts them together: their channels, in rank order.
    ///
    /// Whoever has no key of ours, or speaks another protocol, is turned away, which `report` hears; the others can still
    /// come. So is a rank that joined and was lost before all were there: started again, it takes its place.
    ///
    /// # Errors
    /// [`NodesError::Refused`] when a node does not fit, [`NodesError::Incomplete`] at the deadline,
    /// [`NodesError::Lost`]. Nodes that had joined are told.
    pub fn gather(
        &self,
        key: &Key,
        identity: &Identity,
        timeouts: Timeouts,
        report: &mut dyn FnMut(&Waiting<'_>),
    ) -> Result<Vec<Channel>> {
        let mut joined = BTreeMap::new();
        let gathered = self.accept_all(key, identity, timeouts, report, &mut joined);
        let started = gathered
            .and_then(|()| joined.values_mut().try_for_each(|channel| answer(channel, &Answer::Start)));
        match started {
            Ok(()) => Ok(joined.into_values().collect()),
            Err(error) => {
                for channel in joined.values_mut() {
                    // It may be gone itself.
                    let _ = answer(channel, &Answer::Ended(error.to_string()));
                }
                Err(error)
            }
        }
    }

    fn accept_all(
        &self,
        key: &Key,
        identity: &Identity,
        timeouts: Timeouts,
        report: &mut dyn FnMut(&Waiting<'_>),
        joined: &mut BTreeMap<usize, Channel>,
    ) -> Result<()> {
        let deadline = Instant::now() + timeouts.join;
        let mut notices = Notices::new(timeouts.notice);
        let missing = |joined: &BTreeMap<usize, Channel>| -> Vec<usize> {
            (1..identity.world_size).filter(|rank| !joined.contains_key(rank)).collect()
        };
        let mut refused = None;
        let (send, greeted) = mpsc::channel();
        // Connections in a handshake, so that silent ones can be cut when this is over.
        let mut greetings: BTreeMap<u64, TcpStream> = BTreeMap::new();
        let mut number = 0;
        std::thread::scope(|scope| {
            let outcome = loop {
                // Whoever joined and died meanwhile does not count: it may be started again.
                joined.retain(|_, channel: &mut Channel| {
                    let open = channel.is_open();
                    if !open {
                        report(&Waiting::TurnedAway(&channel.closed()));
                    }
                    open
                });
                if joined.len() + 1 >= identity.world_size {
                    break Ok(());
                }
                if Instant::now() >= deadline {
                    let missing = missing(joined);
                    break Err(NodesError::Incomplete { missing, after: timeouts.join, refused });
                }
                if let Some(since) = notices.due() {
                    report(&Waiting::ForRanks { missing: missing(joined), since });
                }
                if let Ok((stream, _)) = self.listener.accept()
                    && greetings.len() < MOST_GREETINGS
                    && stream.set_nonblocking(false).is_ok()
                    && let Ok(copy) = stream.try_clone()
                {
                    number += 1;
                    greetings.insert(number, copy);
                    let (send, id) = (send.clone(), number);
                    let spawned =
                        std::thread::Builder::new().name("greeting".into()).spawn_scoped(scope, move || {
                            // Nobody listens any more when the group has come together or failed.
                            let _ = send.send((id, greet(stream, key, identity, timeouts)));
                        });
                    if spawned.is_err() {
                        greetings.remove(&number);
                    }
                }
                let Ok((id, greeting)) = greeted.recv_timeout(Duration::from_millis(5)) else { continue };
                greetings.remove(&id);
                match greeting.and_then(|(rank, channel)| admit(rank, channel, identity, joined)) {
                    Ok(()) => {}
                    Err(error @ NodesError::Refused { .. }) => break Err(error),
                    Err(error) => {
                        report(&Waiting::TurnedAway(&error));
                        refused = Some(error.to_string());
                    }
                }
            };
            for stream in greetings.values() {
                let _ = stream.shutdown(Shutdown::Both);
            }
            outcome
        })
    }
}

fn answer(channel: &mut Channel, answer: &Answer) -> Result<()> {
    channel.send_frame(kind::CONTROL, &encode(answer), Instant::now() + ANSWER_TIMEOUT)
}

/// The leader's part of a handshake, up to its answer.
fn greet(stream: TcpStream, key: &Key, identity: &Identity, timeouts: Timeouts) -> Result<(usize, Channel)> {
    let deadline = Instant::now() + timeouts.greeting;
    let mut channel = Channel::new(stream, Side::Leader)
        .map_err(|source| NodesError::System { what: "a connection".into(), source })?;
    let (kind, hello) = channel.receive_frame(MOST_BYTES_OF_STRANGERS, deadline)?;
    let Some((protocol, theirs)) = hello.split_first_chunk::<4>().filter(|_| kind == kind::HELLO) else {
        return Err(channel.malformed("no greeting"));
    };
    let protocol = u32::from_le_bytes(*protocol);
    if protocol != identity.protocol {
        let (leader, worker) = (identity.protocol.to_string(), protocol.to_string());
        let message = format!(
            "a greeting of protocol {worker}, the leader's is {leader}; run the same version on all nodes"
        );
        let difference = Difference { field: "protocol".into(), leader, worker };
        channel.send_refusal(&encode(&difference), deadline)?;
        return Err(channel.malformed(message));
    }
    if theirs.len() != NONCE_BYTES {
        return Err(channel.malformed("a greeting of the wrong length"));
    }
    let ours = nonce()?;
    channel.send_frame(kind::CHALLENGE, &ours, deadline)?;
    channel.set_session(key.session(theirs, &ours));
    let (kind, joining) = match channel.receive_frame(MOST_BYTES_OF_STRANGERS, deadline) {
        Err(error @ NodesError::Key { .. }) => {
            let difference = Difference { field: "key".into(), leader: String::new(), worker: String::new() };
            channel.send_refusal(&encode(&difference), deadline)?;
            return Err(error);
        }
        received => received?,
    };
    if kind != kind::CONTROL {
        return Err(channel.malformed(format!("a frame of kind {kind} instead of its identity")));
    }
    let joining: Joining = decode(&channel, &joining)?;
    channel.set_peer(format!("node {} at {}", joining.rank, channel.peer()));
    if let Some((field, leader, worker)) = identity.difference(&joining.identity) {
        return Err(refuse(&mut channel, joining.rank, field, leader, worker));
    }
    Ok((joining.rank, channel))
}

/// Says no, with what differs.
fn refuse(channel: &mut Channel, rank: usize, field: &str, leader: String, worker: String) -> NodesError {
    let difference = Difference { field: field.into(), leader: leader.clone(), worker: worker.clone() };
    // The leader ends with the refusal whether or not the worker still hears it.
    let _ = answer(channel, &Answer::Refused(difference));
    NodesError::Refused { rank, field: field.into(), leader, worker }
}

/// Takes a rank into the group.
fn admit(
    rank: usize,
    mut channel: Channel,
    identity: &Identity,
    joined: &mut BTreeMap<usize, Channel>,
) -> Result<()> {
    if rank == 0 || rank >= identity.world_size {
        let expected = format!("1 to {}", identity.world_size.saturating_sub(1));
        return Err(refuse(&mut channel, rank, "node rank", expected, rank.to_string()));
    }
    if let Some(other) = joined.get(&rank).filter(|other| other.is_open()) {
        let taken = format!("taken by {}", other.peer());
        return Err(refuse(&mut channel, rank, "node rank", taken, rank.to_string()));
    }
    answer(&mut channel, &Answer::Accepted)?;
    joined.insert(rank, channel);
    Ok(())
}

/// Joins the group of the leader at `leader` (`host:port`) as `rank`, and returns when all ranks are there. Start order does
/// not matter: a leader that is not there yet is tried again.
///
/// # Errors
/// [`NodesError::Refused`], [`NodesError::Key`], [`NodesError::Ended`], [`NodesError::NoLeader`] or [`NodesError::Lost`].
pub fn join(
    leader: &str,
    rank: usize,
    key: &Key,
    identity: &Identity,
    timeouts: Timeouts,
    report: &mut dyn FnMut(&Waiting<'_>),
) -> Result<Channel> {
    let deadline = Instant::now() + timeouts.join;
    let mut notices = Notices::new(timeouts.notice);
    let mut nap = Duration::from_millis(20);
    loop {
        let attempt = connect(leader, timeouts.greeting)
            .map_err(|e| NodesError::Lost { peer: format!("the leader at {leader}"), message: e.to_string() })
            .and_then(|stream| present(stream, leader, rank, key, identity, timeouts));
        match attempt {
            Ok(mut channel) => {
                report(&Waiting::Joined { leader });
                return match receive_answer(&mut channel, deadline)? {
                    Answer::Start => Ok(channel),
                    Answer::Ended(message) => Err(NodesError::Ended { message }),
                    _ => Err(channel.malformed("an answer twice")),
                };
            }
            // Not there yet, or a former leader that is ending.
            Err(NodesError::Lost { message, .. }) => {
                if Instant::now() + nap >= deadline {
                    let leader = leader.into();
                    return Err(NodesError::NoLeader { leader, after: timeouts.join, message });
                }
                if let Some(since) = notices.due() {
                    report(&Waiting::ForLeader { leader, message: &message, since });
                }
                std::thread::sleep(nap);
                nap = (2 * nap).min(Duration::from_secs(1));
            }
            Err(error) => return Err(error),
        }
    }
}

fn connect(leader: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    // Asked anew each time: the name of a leader that is being started may come late.
    for address in leader.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The worker's part of a handshake, up to its acceptance.
fn present(
    stream: TcpStream,
    leader: &str,
    rank: usize,
    key: &Key,
    identity: &Identity,
    timeouts: Timeouts,
) -> Result<Channel> {
    let deadline = Instant::now() + timeouts.greeting;
    let mut channel = Channel::new(stream, Side::Worker)
        .map_err(|source| NodesError::System { what: "a connection".into(), source })?;
    channel.set_peer(format!("the leader at {leader}"));
    let ours = nonce()?;
    let mut hello = identity.protocol.to_le_bytes().to_vec();
    hello.extend(ours);
    channel.send_frame(kind::HELLO, &hello, deadline)?;
    let (kind, theirs) = channel.receive_frame(MOST_BYTES_OF_STRANGERS, deadline)?;
    match kind {
        kind::CHALLENGE if theirs.len() == NONCE_BYTES => {}
        kind::REFUSAL => return Err(refusal(&channel, rank, &theirs)),
        _ => return Err(channel.malformed("no challenge")),
    }
    channel.set_session(key.session(&ours, &theirs));
    let joining = Joining { rank, identity: identity.clone() };
    channel.send_frame(kind::CONTROL, &encode(&joining), deadline)?;
    let (kind, answer) = channel.receive_frame(MOST_BYTES_OF_STRANGERS, deadline)?;
    if kind == kind::REFUSAL {
        return Err(refusal(&channel, rank, &answer));
    }
    match decode(&channel, &answer)? {
        Answer::Accepted => Ok(channel),
        Answer::Refused(Difference { field, leader, worker }) => {
            Err(NodesError::Refused { rank, field, leader, worker })
        }
        Answer::Ended(message) => Err(NodesError::Ended { message }),
        Answer::Start => Err(channel.malformed("a start before it had accepted")),
    }
}

fn receive_answer(channel: &mut Channel, deadline: Instant) -> Result<Answer> {
    let (kind, answer) = channel.receive_frame(MOST_BYTES_OF_STRANGERS, deadline)?;
    if kind != kind::CONTROL {
        return Err(channel.malformed(format!("a frame of kind {kind} instead of an answer")));
    }
    decode(channel, &answer)
}

fn refusal(channel: &Channel, rank: usize, bytes: &[u8]) -> NodesError {
    match decode::<Difference>(channel, bytes) {
        Ok(difference) if difference.field == "key" => NodesError::Key { peer: channel.peer().into() },
        Ok(Difference { field, leader, worker }) => NodesError::Refused { rank, field, leader, worker },
        Err(error) => error,
    }
}

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::channel::{Patience, kind};
use crate::{Channel, NodesError};

type Result<T> = std::result::Result<T, NodesError>;

/// Bytes for the other side; shared, since a leader says most things to several.
pub type Message = Arc<Vec<u8>>;

/// How both sides of a connection notice that the other has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Liveness {
    /// A side that has nothing to say says so after this time.
    pub beat: Duration,
    /// A side that says nothing at all for this time is lost.
    pub silence: Duration,
}

impl Default for Liveness {
    fn default() -> Self {
        Self { beat: Duration::from_millis(500), silence: Duration::from_secs(5) }
    }
}

/// A [`Channel`] with a thread that sends and one that receives. Nobody who sends ever waits for the other side; what waits to
/// be sent is bounded by whoever sends. The end of the other process shows at once, that it has stopped after
/// [`Liveness::silence`], with no need of the system's keepalive.
pub struct Connection {
    peer: String,
    /// `None` once the connection is being closed.
    queue: Mutex<Option<Sender<Message>>>,
    /// Hears the ends of the two threads.
    ended: Mutex<Receiver<()>>,
    /// For its end.
    channel: Channel,
}

impl Connection {
    /// Takes over `channel`. `handler` gets what the other side sends, on a thread of its own, at most `most` bytes at once,
    /// and last of all why the connection ended.
    ///
    /// # Errors
    /// [`NodesError::System`].
    pub fn open(
        channel: Channel,
        liveness: Liveness,
        most: usize,
        handler: impl FnMut(Result<Vec<u8>>) + Send + 'static,
    ) -> Result<Self> {
        let peer = channel.peer().to_owned();
        let open = || {
            let (sending, rest) = channel.split()?;
            let (receiving, channel) = rest.split()?;
            let (queue, messages) = self::channel();
            let (end, ended) = self::channel();
            let start = |name: &str, run: Box<dyn FnOnce() + Send>| {
                let end = end.clone();
                thread::Builder::new().name(format!("longhaul-{name}")).spawn(move || {
                    run();
                    // Nobody may be interested.
                    let _ = end.send(());
                })
            };
            start("send", Box::new(move || send(sending, &messages, liveness)))?;
            start("receive", Box::new(move || receive(receiving, liveness, most, handler)))?;
            Ok(Self { peer: peer.clone(), queue: Mutex::new(Some(queue)), ended: Mutex::new(ended), channel })
        };
        open().map_err(|source| NodesError::System { what: format!("the connection to {peer}"), source })
    }

    /// Who is at the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Sends a message after those before it. Without effect once the connection has ended, which the handler hears.
    pub fn send(&self, message: Message) {
        if let Some(queue) = &*self.queue.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = queue.send(message);
        }
    }

    /// Sends what waits, then waits for the other side to close the connection, all of it for `patience` at the longest.
    pub fn close(&self, patience: Duration) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + patience;
        for _ in ["send", "receive"] {
            let left = deadline.saturating_duration_since(Instant::now());
            if matches!(ended.recv_timeout(left), Err(RecvTimeoutError::Timeout)) {
                break;
            }
        }
        self.channel.shutdown();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.channel.shutdown();
    }
}

fn send(mut channel: Channel, messages: &Receiver<Message>, liveness: Liveness) {
    loop {
        let sent = match messages.recv_timeout(liveness.beat) {
            Ok(message) => channel.send(&message, liveness.silence),
            Err(RecvTimeoutError::Timeout) => {
                channel.send_frame(kind::BEAT, &[], Instant::now() + liveness.silence)
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if sent.is_err() {
            // Whoever receives says so.
            channel.shutdown();
            return;
        }
    }
}

fn receive(mut channel: Channel, liveness: Liveness, most: usize, mut handler: impl FnMut(Result<Vec<u8>>)) {
    loop {
        match channel.receive_patiently(most, &mut Patience::silence(liveness.silence)) {
            Ok((kind::BEAT, _)) => {}
            Ok((kind::DATA, message)) => handler(Ok(message)),
            Ok((kind, _)) => {
                handler(Err(channel.malformed(format!("a frame of kind {kind}, not data"))));
                return;
            }
            Err(error) => {
                handler(Err(error));
                return;
            }
        }
    }
}

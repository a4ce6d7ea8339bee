use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use longhaul_backend::Collective;
use longhaul_collective::Mirror;
use longhaul_nodes::{Channel, Connection, Liveness, MOST_BYTES, NodesError};

use super::message::{self, FIRST_KIND, Message};
use super::{FAREWELL, LAST_WORDS, Star, ended, lose};
use crate::Result;
use crate::ranks::{Grace, Member};
use crate::runner::Order;

/// How often a wait looks whether the group still stands.
const LOOK: Duration = Duration::from_millis(20);

/// The other nodes of a group, as the leader sees them.
pub(crate) struct RemoteNodes {
    star: Arc<Star>,
    nodes: Vec<RemoteNode>,
    group: Arc<dyn Collective>,
    /// Number of the last order.
    step: u64,
}

struct RemoteNode {
    ranks: Range<usize>,
    heard: Receiver<Message>,
}

impl RemoteNodes {
    /// `channels` are the workers' in order of their nodes, which have the ranks `of`.
    pub(super) fn open(
        star: Arc<Star>,
        channels: Vec<Channel>,
        of: Vec<Range<usize>>,
        liveness: Liveness,
        mirror: &Mirror,
        group: Arc<dyn Collective>,
    ) -> Result<Self> {
        let mut nodes = Vec::new();
        let open = |(node, (channel, ranks)): (usize, (Channel, Range<usize>))| {
            let (hear, heard) = self::channel();
            let listener =
                Listener { node, ranks: ranks.clone(), star: star.clone(), mirror: mirror.clone(), hear };
            nodes.push(RemoteNode { ranks, heard });
            Ok(Connection::open(channel, liveness, MOST_BYTES, move |said| listener.hear(said))?)
        };
        star.start(channels.into_iter().zip(of).enumerate().map(open).collect())?;
        Ok(Self { star, nodes, group, step: 0 })
    }

    /// Waits until every node has loaded its ranks.
    ///
    /// # Errors
    /// The group has ended.
    pub(crate) fn wait_until_ready(&self) -> Result<()> {
        self.nodes.iter().try_for_each(|node| self.wait_for(node, &Message::Ready))
    }

    /// Ends the group because the leader cannot take part.
    pub(crate) fn abort(&self, message: &str) {
        self.group.abort(message);
    }

    /// Waits for a node to say `expected`, while the group stands.
    fn wait_for(&self, node: &RemoteNode, expected: &Message) -> Result<()> {
        loop {
            match node.heard.recv_timeout(LOOK) {
                Ok(message) if message == *expected => return Ok(()),
                Ok(message) => {
                    let error = format!("it said {message:?} instead of {expected:?}");
                    self.group.abort(&format!("node of rank {}: {error}", node.ranks.start));
                    return ended(&*self.group);
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            ended(&*self.group)?;
        }
    }
}

impl Member for RemoteNodes {
    fn rank(&self) -> usize {
        self.nodes.first().map_or(0, |node| node.ranks.start)
    }

    fn start(&mut self, order: &Order) {
        self.step += 1;
        self.star.send_to_all(message::order(self.step, order));
    }

    fn finish(&mut self, _: &mut Grace) -> Result<()> {
        let expected = Message::Done { number: self.step };
        self.nodes.iter().try_for_each(|node| self.wait_for(node, &expected))
    }
}

impl Drop for RemoteNodes {
    fn drop(&mut self) {
        if self.group.check().is_ok() && !std::thread::panicking() {
            self.star.ending.store(true, Ordering::SeqCst);
            self.star.send_to_all(message::end());
            self.star.close(FAREWELL);
        } else {
            self.group.abort("the leader ended");
            self.star.close(LAST_WORDS);
            self.star.ending.store(true, Ordering::SeqCst);
        }
    }
}

/// Hears one worker.
struct Listener {
    /// Index among the workers.
    node: usize,
    ranks: Range<usize>,
    star: Arc<Star>,
    mirror: Mirror,
    hear: Sender<Message>,
}

impl Listener {
    fn hear(&self, said: std::result::Result<Vec<u8>, NodesError>) {
        let taken = match said {
            Ok(message) if message.first().is_some_and(|&kind| kind < FIRST_KIND) => {
                let taken = self.mirror.receive(&self.ranks, &message);
                if taken.is_ok() {
                    self.pass_on(message);
                }
                taken
            }
            Ok(message) => Message::decode(&message).map(|message| {
                // Whoever waited has given up.
                let _ = self.hear.send(message);
            }),
            Err(_) if self.star.is_ending() => return,
            Err(error) => {
                lose(&self.mirror, self.ranks.start, error.to_string());
                return;
            }
        };
        if let Err(message) = taken {
            lose(&self.mirror, self.ranks.start, format!("its node sent {message}"));
        }
    }

    /// To the other workers.
    fn pass_on(&self, message: Vec<u8>) {
        let message = Arc::new(message);
        for (node, connection) in self.star.connections().iter().enumerate() {
            if node != self.node {
                connection.send(message.clone());
            }
        }
    }
}

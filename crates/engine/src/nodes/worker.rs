use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use longhaul_backend::Collective;
use longhaul_collective::Mirror;
use longhaul_nodes::{Channel, Connection, Liveness, MOST_BYTES, NodesError};

use super::message::{self, FIRST_KIND, Message};
use super::{LAST_WORDS, Star, ended, lose};
use crate::ranks::{Follower, Grace, Member, Watch, first_cause, is_consequence};
use crate::runner::Order;
use crate::{EngineError, Result};

/// How often a worker without work looks whether the group still stands.
const LOOK: Duration = Duration::from_millis(50);

/// A worker's end of the group: does what the leader says.
pub(crate) struct Worker {
    star: Arc<Star>,
    heard: Receiver<Message>,
    group: Arc<dyn Collective>,
}

impl Worker {
    /// `channels` has the one to the leader; `ranks` are those of the whole group.
    pub(super) fn open(
        star: Arc<Star>,
        channels: Vec<Channel>,
        ranks: usize,
        liveness: Liveness,
        mirror: &Mirror,
        group: Arc<dyn Collective>,
    ) -> Result<Self> {
        let (hear, heard) = self::channel::<Message>();
        let open = |channel| {
            let (star, mirror, hear) = (star.clone(), mirror.clone(), hear.clone());
            let listen = move |said: std::result::Result<Vec<u8>, NodesError>| {
                let taken = match said {
                    Ok(message) if message.first().is_some_and(|&kind| kind < FIRST_KIND) => {
                        mirror.receive(&(0..ranks), &message)
                    }
                    Ok(message) => Message::decode(&message).map(|message| {
                        if message == Message::End {
                            star.ending.store(true, Ordering::SeqCst);
                        }
                        // The worker may be ending itself.
                        let _ = hear.send(message);
                    }),
                    Err(_) if star.is_ending() => Ok(()),
                    Err(error) => {
                        lose(&mirror, 0, error.to_string());
                        Ok(())
                    }
                };
                if let Err(message) = taken {
                    lose(&mirror, 0, format!("the leader sent {message}"));
                }
            };
            Ok(Connection::open(channel, liveness, MOST_BYTES, listen)?)
        };
        star.start(channels.into_iter().map(open).collect())?;
        Ok(Self { star, heard, group })
    }

    /// Ends the group because this node cannot take part.
    pub(crate) fn abort(&self, message: &str) {
        self.group.abort(message);
    }

    /// Runs the leader's steps on `followers`, this node's ranks, until the leader ends the group.
    ///
    /// # Errors
    /// Why the group ended.
    pub(crate) fn run(&self, mut followers: Vec<Follower>, watch: &Watch) -> Result<()> {
        self.star.send_to_all(message::ready());
        loop {
            match self.heard.recv_timeout(LOOK) {
                Ok(Message::Order { number, order }) => {
                    let _running = watch.watch(&order);
                    obey(&mut followers, &order)?;
                    self.star.send_to_all(message::done(number));
                }
                Ok(Message::End) => return Ok(()),
                Ok(other) => self.group.abort(&format!("the leader said {other:?} to a worker")),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => ended(&*self.group)?,
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.star.is_ending() {
            self.group.abort("a worker ended");
            self.star.close(LAST_WORDS);
        }
        // The leader waits for this end.
        self.star.close(Duration::ZERO);
    }
}

/// All ranks of this node do it; the first failure that is a cause.
fn obey(followers: &mut [Follower], order: &Order) -> Result<()> {
    followers.iter_mut().for_each(|follower| follower.start(order));
    let mut grace = Grace::default();
    let results = followers.iter_mut().map(|follower| {
        follower.finish(&mut grace).map_err(|source| match is_consequence(&source) {
            true => source,
            false => EngineError::Rank { rank: follower.rank(), source: Box::new(source) },
        })
    });
    first_cause(results).map(drop)
}

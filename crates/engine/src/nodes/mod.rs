//! A tensor-parallel group over several nodes, one process each.
//!
//! Rank `r` lives on one node; node 0, the leader, has rank 0 and hands every step to the others. One connection joins each
//! worker to the leader, who passes on what a worker's ranks say to the others: a star. Ranks on CPUs exchange their
//! partial sums over it ([`longhaul_collective::Spanning`]); what ranks on GPUs exchange goes over NCCL instead.
//!
//! The group fails as one: a node that is lost, stops, or says what makes no sense ends the group on all nodes, and each
//! process then ends with the exit code that asks its launcher to start it again.

mod identity;
mod leader;
mod message;
mod worker;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use longhaul_backend::{Collective, CollectiveError, Error as BackendError};
use longhaul_collective::{Link, Mirror, Options as GroupOptions, Pulse, Spanning};
use longhaul_nodes::{Connection, Identity, Key, Leader, Liveness, Placement, Timeouts, join};

pub(crate) use identity::{Plan, identity, sha256};
pub(crate) use leader::RemoteNodes;
pub(crate) use worker::Worker;

use crate::{EngineError, Result};

/// How long a node may be without a sign of life while nothing runs; in a step, the watchdog is stricter.
const SILENCE: Duration = Duration::from_secs(15);
/// What a lost group gets to tell the other nodes.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// What workers get to end in an orderly way.
const FAREWELL: Duration = Duration::from_secs(2);

/// A group of nodes and this process's place in it.
#[derive(Clone)]
pub struct NodeOptions {
    /// Which node this is, of how many.
    pub placement: Placement,
    /// The secret that the nodes share.
    pub key: Key,
    /// How long nodes wait for each other.
    pub timeouts: Timeouts,
    /// Hears what happens while they wait.
    pub log: fn(&str),
}

impl std::fmt::Debug for NodeOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeOptions").field("placement", &self.placement).finish_non_exhaustive()
    }
}

/// The ranks of node `node` of `nodes` in a group of `ranks`: whole, in order, the first nodes have one more where they cannot
/// be equal.
pub(crate) fn ranks_of_node(node: usize, nodes: usize, ranks: usize) -> Range<usize> {
    let (each, more) = (ranks / nodes.max(1), ranks % nodes.max(1));
    let start = |node: usize| node * each + node.min(more);
    start(node)..start(node + 1)
}

/// The connections of a node: of the leader to all workers, of a worker to the leader.
#[derive(Default)]
struct Star {
    connections: OnceLock<Vec<Connection>>,
    /// The group ends well: connections that end are no losses.
    ending: AtomicBool,
}

impl Star {
    /// Waits for the connections, all of which are opened at once.
    fn connections(&self) -> &[Connection] {
        self.connections.wait()
    }

    /// Takes the connections, once; without them the group is over before it began.
    fn start(&self, connections: Result<Vec<Connection>>) -> Result<()> {
        let (connections, result) = match connections {
            Ok(connections) => (connections, Ok(())),
            Err(error) => (Vec::new(), Err(error)),
        };
        self.ending.store(result.is_err(), Ordering::SeqCst);
        // Set once, here.
        let _ = self.connections.set(connections);
        result
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    fn send_to_all(&self, message: Vec<u8>) {
        let message = Arc::new(message);
        self.connections().iter().for_each(|connection| connection.send(message.clone()));
    }

    fn close(&self, patience: Duration) {
        self.connections().iter().for_each(|connection| connection.close(patience));
    }
}

impl Link for Star {
    fn send(&self, message: Vec<u8>) {
        // Ranks that leave a group that ends have nobody to tell.
        if !self.is_ending() {
            self.send_to_all(message);
        }
    }
}

/// This node's ranks in a group that has met.
pub(crate) struct NodeGroup {
    /// This node's ranks in order.
    pub ranks: Vec<Arc<dyn Collective>>,
    pub pulse: Pulse,
    pub role: Role,
}

/// What a node does beside running its ranks.
pub(crate) enum Role {
    Leader(RemoteNodes),
    Worker(Worker),
}

/// Meets the other nodes of a group of `ranks`, which must all have `identity`; `limit` is that of a step.
///
/// # Errors
/// [`EngineError::Nodes`].
pub(crate) fn meet(
    options: &NodeOptions,
    identity: &Identity,
    ranks: usize,
    limit: Option<Duration>,
) -> Result<NodeGroup> {
    let Placement { rank: node, size, leader, .. } = &options.placement;
    let mut report = |waiting: &longhaul_nodes::Waiting<'_>| (options.log)(&waiting.to_string());
    let channels = if *node == 0 {
        let leader = bind(leader)?;
        leader.gather(&options.key, identity, options.timeouts, &mut report)?
    } else {
        vec![join(leader, *node, &options.key, identity, options.timeouts, &mut report)?]
    };

    (options.log)(&format!("all {size} nodes have met; this is node {node}"));

    let star = Arc::new(Star::default());
    let link: Arc<dyn Link> = star.clone();
    let local = ranks_of_node(*node, *size, ranks);
    // Ranks wait without end: the watchdog ends a step in which nothing moves.
    let group = GroupOptions { timeout: Duration::MAX, ..GroupOptions::default() };
    let (spanning, mirror) =
        Spanning::group(ranks, local, group, &link).map_err(|e| EngineError::Backend(e.into()))?;
    let first = spanning.first().ok_or(EngineError::Parameter {
        name: "--tp",
        message: format!("{ranks} ranks are too few for {size} nodes"),
    })?;
    let pulse = first.pulse();
    let ranks_here: Vec<Arc<dyn Collective>> =
        spanning.into_iter().map(|rank| Arc::new(rank) as Arc<dyn Collective>).collect();
    let Some(group) = ranks_here.first().cloned() else {
        return Err(EngineError::Parameter { name: "--tp", message: "no ranks on this node".into() });
    };
    let silence = limit.map_or(SILENCE, |limit| limit.max(Duration::from_secs(1)));
    let liveness = Liveness { silence, beat: (silence / 5).min(Duration::from_millis(500)) };
    let role = if *node == 0 {
        let of = (1..*size).map(|node| ranks_of_node(node, *size, ranks)).collect();
        Role::Leader(RemoteNodes::open(star, channels, of, liveness, &mirror, group)?)
    } else {
        Role::Worker(Worker::open(star, channels, ranks, liveness, &mirror, group)?)
    };
    Ok(NodeGroup { ranks: ranks_here, pulse, role })
}

/// Where the leader of `address` listens, in order of preference: on all interfaces, since its name may mean another address
/// inside than outside, by IPv6 (which takes IPv4 too) where there is any; on the loopback interface alone where all nodes are
/// on one machine.
fn listening_addresses(address: &str) -> Result<Vec<String>> {
    match address.rsplit_once(':') {
        Some((host @ ("localhost" | "127.0.0.1" | "[::1]"), port)) => Ok(vec![format!("{host}:{port}")]),
        Some((_, port)) => Ok(vec![format!("[::]:{port}"), format!("0.0.0.0:{port}")]),
        None => Err(EngineError::Parameter { name: "--leader", message: format!("{address} has no port") }),
    }
}

fn bind(address: &str) -> Result<Leader> {
    let mut last = None;
    for address in listening_addresses(address)? {
        match Leader::bind(address.as_str()) {
            Ok(leader) => return Ok(leader),
            Err(error) => last = Some(error),
        }
    }
    let nowhere = || EngineError::Parameter { name: "--leader", message: format!("{address}: nowhere") };
    Err(last.map_or_else(nowhere, EngineError::Nodes))
}

/// Ends the group on all nodes because of what node `node`, whose first rank is `rank`, did.
fn lose(mirror: &Mirror, rank: usize, message: String) {
    mirror.fail(&CollectiveError::RankFailed { rank, message });
}

fn ended(group: &dyn Collective) -> Result<()> {
    group.check().map_err(|error| EngineError::Backend(BackendError::Collective(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_dealt_in_order() {
        assert_eq!([0, 1].map(|n| ranks_of_node(n, 2, 4)), [0..2, 2..4]);
        assert_eq!([0, 1, 2].map(|n| ranks_of_node(n, 3, 8)), [0..3, 3..6, 6..8]);
        assert_eq!(ranks_of_node(0, 1, 5), 0..5);
    }

    #[test]
    fn a_leader_listens_where_it_can_be_reached() {
        assert_eq!(listening_addresses("127.0.0.1:20000").unwrap(), ["127.0.0.1:20000"]);
        assert_eq!(listening_addresses("[::1]:7").unwrap(), ["[::1]:7"]);
        assert_eq!(listening_addresses("node-0.group:20000").unwrap(), ["[::]:20000", "0.0.0.0:20000"]);
    }
}

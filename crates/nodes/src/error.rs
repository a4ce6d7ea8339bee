use std::io;
use std::time::Duration;

/// Why a group of nodes did not come together, or ended.
#[derive(Debug, thiserror::Error)]
pub enum NodesError {
    /// The nodes do not fit together. Said on both sides.
    #[error("node {rank} does not fit the group: {field} is {worker}, the leader's is {leader}")]
    Refused {
        /// The worker that was refused.
        rank: usize,
        /// What differs.
        field: String,
        /// The leader's value.
        leader: String,
        /// The worker's value.
        worker: String,
    },
    /// The other side has another shared key, or is not one of ours.
    #[error("{peer} has another shared key; give all nodes the same")]
    Key {
        /// Its address.
        peer: String,
    },
    /// The leader ended the group while it came together.
    #[error("the leader ended the group: {message}")]
    Ended {
        /// Its reason.
        message: String,
    },
    /// Not all ranks came.
    #[error("after {after:?} node {} had not joined{}", list(missing), note(refused))]
    Incomplete {
        /// The ranks that are missing.
        missing: Vec<usize>,
        /// How long was waited.
        after: Duration,
        /// The last connection that was turned away, and why.
        refused: Option<String>,
    },
    /// The leader was not there.
    #[error("the leader at {leader} could not be reached within {after:?}: {message}")]
    NoLeader {
        /// Where it should listen.
        leader: String,
        /// How long was tried.
        after: Duration,
        /// The last failure.
        message: String,
    },
    /// The other side is gone, or silent beyond the deadline.
    #[error("{peer} is lost: {message}")]
    Lost {
        /// Which side.
        peer: String,
        /// What happened to the connection.
        message: String,
    },
    /// The other side sent something that is not of this protocol.
    #[error("{peer} sent {message}")]
    Malformed {
        /// Which side.
        peer: String,
        /// What it sent.
        message: String,
    },
    /// The shared key is too short to be a secret.
    #[error("the shared key has {bytes} bytes; at least {least} are needed")]
    WeakKey {
        /// Its length.
        bytes: usize,
        /// The shortest that is taken.
        least: usize,
    },
    /// The system refused.
    #[error("{what}: {source}")]
    System {
        /// What was asked for.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
}

impl NodesError {
    /// The exit code of a process that ends with it: 65 for nodes that do not fit (starting again does not help), 71 for a
    /// refusal of the system, 75 for all that a restart may mend.
    pub fn exit_code(&self) -> u8 {
        match self {
            NodesError::Refused { .. } | NodesError::Key { .. } | NodesError::WeakKey { .. } => 65,
            NodesError::System { .. } => 71,
            NodesError::Ended { .. }
            | NodesError::Incomplete { .. }
            | NodesError::NoLeader { .. }
            | NodesError::Lost { .. }
            | NodesError::Malformed { .. } => 75,
        }
    }
}

fn list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

fn note(refused: &Option<String>) -> String {
    refused.as_ref().map(|why| format!("; last turned away: {why}")).unwrap_or_default()
}

//! How the processes of a group of nodes (one process a node) find and check each other.
//!
//! [`Placement`] says which rank this process is, of how many, and where the leader (rank 0) listens: from flags or from the
//! environment of the launcher. [`Leader`] and [`join`] meet over TCP, in any order of starting: both prove that they have
//! the shared key, compare what must be equal on all nodes, and start together. What goes over the connection afterwards
//! is authenticated, not encrypted: a [`Connection`] carries messages in both directions and notices when the other side has
//! ended, or has stopped.
#![forbid(unsafe_code)]

mod channel;
mod connection;
mod error;
mod handshake;
mod identity;
mod placement;

pub use channel::{Channel, Key, MOST_BYTES};
pub use connection::{Connection, Liveness, Message};
pub use error::NodesError;
pub use handshake::{Leader, Timeouts, Waiting, join};
pub use identity::{Identity, PROTOCOL};
pub use placement::{Launcher, Placement, PlacementError, PlacementFlags};

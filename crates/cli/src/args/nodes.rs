use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use longhaul_engine::{EngineError, NodeOptions};
use longhaul_nodes::{Key, Placement, PlacementFlags, Timeouts};

use super::values::seconds;

/// Port of a leader that is given without one.
const PORT: u16 = 20_000;

/// Several nodes, one process each. Run the same command on all of them.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Nodes")]
pub struct NodesArgs {
    /// Nodes that the ranks of --tp are dealt over, one process each, all with this command. Node 0, the leader, answers; the
    /// others work for it and print nothing to stdout. What --nnodes, --node-rank and --leader do not say, the launcher does,
    /// if there is a --node-key-file: LeaderWorkerSet, srun, mpirun and torchrun are understood
    #[arg(long, alias = "nodes", value_name = "N")]
    pub nnodes: Option<usize>,
    /// This node, from 0
    #[arg(long, value_name = "R")]
    pub node_rank: Option<usize>,
    /// Where node 0 listens for the others
    #[arg(long, visible_aliases = ["dist-init-addr", "master-addr"], value_name = "HOST[:PORT]")]
    pub leader: Option<String>,
    /// Port of a leader that is given without one
    #[arg(long, default_value_t = PORT, value_name = "PORT")]
    pub master_port: u16,
    /// File with the secret that all nodes share, 16 bytes at least
    #[arg(long, env = "LONGHAUL_NODE_KEY_FILE", value_name = "FILE")]
    pub node_key_file: Option<PathBuf>,
    /// How long nodes wait for each other
    #[arg(long, value_parser = seconds, default_value = "600", value_name = "SECONDS")]
    pub join_timeout: Duration,
    /// How long ranks (--tp) may go without progress in a step, and a node without a sign of life, before the group ends with
    /// exit code 75 [default: 20 times the 99th percentile of earlier steps of that size, at least 5, 120 for a first step;
    /// 15 for a sign of life]
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    pub step_timeout: Option<Duration>,
}

impl NodesArgs {
    /// This process's place in a group of nodes; `None` when it is alone.
    ///
    /// # Errors
    /// A group that is not described whole; a key that cannot be used.
    pub fn options(&self) -> Result<Option<NodeOptions>, EngineError> {
        let flags = PlacementFlags { rank: self.node_rank, size: self.nnodes, leader: self.leader.clone() };
        let Some(path) = &self.node_key_file else {
            // The environment of a launcher alone makes no group: this may be one of many programs it starts.
            return match flags {
                PlacementFlags { rank: None | Some(0), size: None | Some(1), leader: None } => Ok(None),
                _ => Err(EngineError::Parameter {
                    name: "--node-key-file",
                    message: "is needed by a group of nodes: a file with the same secret on all of them"
                        .into(),
                }),
            };
        };
        let variable = |name: &str| std::env::var(name).ok();
        let placement = Placement::detect(&flags, &variable, self.master_port)
            .map_err(|e| EngineError::Parameter { name: "--nnodes", message: e.to_string() })?;
        let Some(placement) = placement.filter(|placement| placement.size > 1) else { return Ok(None) };
        let key = std::fs::read(path).map_err(|e| EngineError::File {
            path: path.display().to_string(),
            message: format!("cannot be read: {e}; --node-key-file names the nodes' shared secret"),
        })?;
        Ok(Some(NodeOptions {
            placement,
            key: Key::new(&key)?,
            timeouts: Timeouts { join: self.join_timeout, ..Timeouts::default() },
            log: |line| eprintln!("nodes: {line}"),
        }))
    }
}

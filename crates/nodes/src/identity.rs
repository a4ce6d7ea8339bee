use serde::{Deserialize, Serialize};

/// Version of the handshake, of the frames, and of what nodes tell each other in them.
pub const PROTOCOL: u32 = 2;

/// What must be equal on all nodes of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// Version and commit of the program.
    pub build: String,
    /// Hash of the checkpoint.
    pub model: String,
    /// Hash of the tokenizer.
    pub tokenizer: String,
    /// Hash of the shard plan and of the options that shape a step.
    pub plan: String,
    /// Processes in the group.
    pub world_size: usize,
}

impl Identity {
    /// The first field in which `other` differs: its name, our value, theirs.
    pub fn difference(&self, other: &Identity) -> Option<(&'static str, String, String)> {
        [
            ("protocol", self.protocol.to_string(), other.protocol.to_string()),
            ("world size", self.world_size.to_string(), other.world_size.to_string()),
            ("build", self.build.clone(), other.build.clone()),
            ("model", self.model.clone(), other.model.clone()),
            ("tokenizer", self.tokenizer.clone(), other.tokenizer.clone()),
            ("plan", self.plan.clone(), other.plan.clone()),
        ]
        .into_iter()
        .find(|(_, ours, theirs)| ours != theirs)
    }
}

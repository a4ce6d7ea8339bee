//! Everything that can be wrong with weights, one variant a cause, each with the file, tensor or id it is about.

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::Slice;

/// Result with [`WeightsError`].
pub type Result<T> = std::result::Result<T, WeightsError>;

/// Why weights could not be found, checked or read.
///
/// `file` fields hold the path of a file, or the origin given to [`crate::Checkpoint::from_bytes`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The model directory does not exist.
    #[error("model directory {}: no such directory", .dir.display())]
    NoSuchDirectory {
        /// The path asked for.
        dir: PathBuf,
    },
    /// The model path is a file.
    #[error(
        "{}: expected a model directory, found a file; pass the directory that holds config.json and \
         model.safetensors", .path.display()
    )]
    NotADirectory {
        /// The path asked for.
        path: PathBuf,
    },
    /// The directory holds no safetensors checkpoint.
    #[error(
        "{}: expected model.safetensors or model.safetensors.index.json, found {found}; {remedy}", .dir.display()
    )]
    NoCheckpoint {
        /// The directory.
        dir: PathBuf,
        /// What is there instead, in words.
        found: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The operating system refused to open or inspect a file or directory.
    #[error("{}: cannot {action}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A git-lfs pointer stands where the weights should be.
    #[error(
        "{file}: this is a git-lfs pointer of {bytes} bytes, not the weights; run `git lfs install && git lfs pull` in \
         its repository, or download the file itself"
    )]
    GitLfsPointer {
        /// The pointer file.
        file: String,
        /// Its size.
        bytes: u64,
    },
    /// The file is of another kind altogether.
    #[error("{file}: expected a safetensors file, found {found}; download the .safetensors file again")]
    NotSafetensors {
        /// The file.
        file: String,
        /// What its first bytes say it is.
        found: &'static str,
    },
    /// A safetensors header is wrong as a whole.
    #[error("{file}: safetensors {field}: found {found}, expected {expected}")]
    Header {
        /// The file.
        file: String,
        /// The part of the format concerned.
        field: &'static str,
        /// What the file has.
        found: String,
        /// What the format asks for.
        expected: String,
    },
    /// One tensor's entry in a safetensors header is wrong.
    #[error("{file}: tensor `{}`: {field}: found {found}, expected {expected}", shown(.tensor))]
    TensorHeader {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The field of its entry.
        field: &'static str,
        /// What the entry has.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// The shard index is wrong.
    #[error("{file}: {field}: found {found}, expected {expected}")]
    Index {
        /// The index file.
        file: String,
        /// The key concerned, such as `` weight_map `lm_head.weight` ``.
        field: String,
        /// What the index has.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// Two shards hold a tensor of the same name.
    #[error(
        "tensor `{}`: found in both {first} and {second}, expected in one; delete stale shards or download again",
        shown(.tensor)
    )]
    TensorInTwoFiles {
        /// The tensor.
        tensor: String,
        /// The first file.
        first: String,
        /// The second file.
        second: String,
    },
    /// Tensors that the model needs are not there.
    #[error(
        "{file}: missing {count} of {expected} tensors: {}; the checkpoint is incomplete or config.json does not belong \
         to it", listed_similar(.names, *.count, .similar)
    )]
    MissingTensors {
        /// The file or directory searched.
        file: String,
        /// How many are missing.
        count: usize,
        /// How many the model needs.
        expected: usize,
        /// The first few missing names.
        names: Vec<String>,
        /// For some of them, a tensor of the checkpoint with a similar name.
        similar: Vec<(String, String)>,
    },
    /// The checkpoint is in a quantised layout (GPTQ, AWQ, FP8).
    #[error(
        "{file}: found `{}`, a tensor of a quantised checkpoint; only unquantised BF16, F16 and F32 weights are read, use \
         the unquantised release of the model", shown(.tensor)
    )]
    Quantised {
        /// The file or directory.
        file: String,
        /// The tensor that shows it.
        tensor: String,
    },
    /// The checkpoint holds tensors that the model does not know.
    #[error(
        "{file}: {count} tensor(s) that this model has no use for: {}; the checkpoint is of another architecture or \
         config.json does not belong to it", listed(.names, *.count)
    )]
    UnexpectedTensors {
        /// The file or directory.
        file: String,
        /// How many.
        count: usize,
        /// The first few names.
        names: Vec<String>,
    },
    /// A tensor has another shape than config.json implies.
    #[error(
        "{file}: tensor `{}`: found shape {found:?}, expected {expected:?}; config.json and the weights do not belong \
         together", shown(.tensor)
    )]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the model needs.
        expected: Vec<usize>,
    },
    /// A tensor has an element type that cannot be loaded.
    #[error(
        "{file}: tensor `{}`: found dtype {found}, expected BF16, F16 or F32; quantised checkpoints are not supported, \
         use the unquantised one", shown(.tensor)
    )]
    DType {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its dtype in safetensors' spelling.
        found: String,
    },
    /// A tensor was asked for that was not among the expected ones.
    #[error("{file}: tensor `{}` is not among the expected tensors of this source", shown(.tensor))]
    UnknownTensor {
        /// The source.
        file: String,
        /// The name asked for.
        tensor: String,
    },
    /// A slice does not fit its tensor: a bug of the caller's shard plan.
    #[error("tensor `{}` of shape {shape:?}: cannot take {slice}: {problem}", shown(.tensor))]
    Slice {
        /// The tensor.
        tensor: String,
        /// The slice asked for.
        slice: Slice,
        /// The tensor's full shape.
        shape: Vec<usize>,
        /// What is wrong.
        problem: &'static str,
    },
    /// Reading tensor data failed after the header was accepted.
    #[error(
        "{file}: tensor `{}`: cannot read {len} bytes at offset {offset}: {source}; the file changed or its disk \
         failed after it was checked", shown(.tensor)
    )]
    Read {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Byte offset in the file.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Host memory for a tensor could not be had.
    #[error("tensor `{}`: cannot allocate {bytes} bytes of host memory", shown(.tensor))]
    OutOfMemory {
        /// The tensor.
        tensor: String,
        /// Bytes asked for.
        bytes: u64,
    },
    /// The bytes do not make the tensor they should: a bug of this crate.
    #[error("tensor `{}`: {source}", shown(.tensor))]
    Tensor {
        /// The tensor.
        tensor: String,
        /// The backend's reason.
        source: longhaul_backend::Error,
    },
    /// What the user typed is neither a directory nor a hub id.
    #[error(
        "model `{}`: {problem}; pass an existing directory, or a hub id such as Qwen/Qwen2-0.5B-Instruct or \
         Qwen/Qwen2-0.5B-Instruct@main", shown(.model)
    )]
    ModelId {
        /// What was typed.
        model: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A hub model is neither a directory, nor complete in the cache, nor could it be downloaded.
    #[error(
        "model `{model}`: not a directory; {}; could not be downloaded because {reason}. Remedies: pass a directory that \
         holds config.json, tokenizer.json and the .safetensors files; or copy the cache of a machine that has it and \
         set HF_HUB_CACHE (or HF_HOME); or connect to the network with HF_HUB_OFFLINE unset", in_cache(.cache, .missing)
    )]
    Unavailable {
        /// The hub id.
        model: String,
        /// Where the cache would hold it.
        cache: PathBuf,
        /// Files that a partial cache entry lacks; empty when there is no entry.
        missing: Vec<String>,
        /// Why it was not downloaded.
        reason: String,
    },
}

/// A name from a file, safe and short enough for a terminal: control characters escaped, long text cut.
pub(crate) fn shown(name: &str) -> String {
    const LONGEST: usize = 160;
    let escaped: String = name.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if name.chars().nth(LONGEST).is_some() { format!("{escaped}... ({} bytes)", name.len()) } else { escaped }
}

/// How many names a message lists.
pub(crate) const LISTED: usize = 4;

fn listed(names: &[String], count: usize) -> String {
    listed_with(names, count, |_| None)
}

/// The first few of `count` names, each with what `similar` finds for it.
fn listed_with<'a>(names: &[String], count: usize, similar: impl Fn(&str) -> Option<&'a str>) -> String {
    let show = |name: &String| match similar(name) {
        Some(found) => format!("`{}` (found similar `{}`)", shown(name), shown(found)),
        None => format!("`{}`", shown(name)),
    };
    let mut text = names.iter().take(LISTED).map(show).collect::<Vec<_>>().join(", ");
    if count > names.len().min(LISTED) {
        let _ = write!(text, " and {} more", count - names.len().min(LISTED));
    }
    text
}

fn listed_similar(names: &[String], count: usize, similar: &[(String, String)]) -> String {
    listed_with(names, count, |name| similar.iter().find(|(n, _)| n == name).map(|(_, found)| found.as_str()))
}

fn in_cache(cache: &std::path::Path, missing: &[String]) -> String {
    if missing.is_empty() {
        format!("not in the hub cache at {}", cache.display())
    } else {
        format!(
            "incomplete in the hub cache at {} (missing {})",
            cache.display(),
            listed(missing, missing.len())
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_cannot_reach_the_terminal() {
        let error = WeightsError::UnknownTensor { file: "f".into(), tensor: "\u{1b}[2J\n".repeat(1000) };
        let message = error.to_string();
        assert!(!message.contains('\u{1b}') && !message.contains('\n'), "{message}");
        assert!(message.len() < 2000, "{}", message.len());
    }
}

//! The hub cache on disk: `models--org--name/refs/<revision>` names a commit, `snapshots/<commit>/` holds its files as
//! links into `blobs/`. Read here; written by hf-hub.

use std::path::{Path, PathBuf};

use crate::checkpoint::SINGLE_FILE;
use crate::hub_id::{self, HubId};
use crate::index::{self, INDEX_FILE};
use crate::{Result, Wanted};

/// Files without which no model starts.
pub(crate) const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
/// Files that are used when a model has them.
pub(crate) const OPTIONAL: [&str; 3] =
    ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"];

/// The snapshot that `id`'s revision points to, if the cache has one.
pub(crate) fn snapshot(cache_dir: &Path, id: &HubId) -> Option<PathBuf> {
    let folder = cache_dir.join(id.cache_folder());
    let commit = match std::fs::read_to_string(folder.join("refs").join(&id.revision)) {
        Ok(commit) => commit.trim().to_owned(),
        // A revision may itself be a commit hash.
        Err(_) => id.revision.clone(),
    };
    // The ref file is data: what it says becomes a path only if it looks like a hash.
    let snapshot = hub_id::is_commit(&commit).then(|| folder.join("snapshots").join(commit))?;
    snapshot.is_dir().then_some(snapshot)
}

/// The files that `dir` lacks for what is wanted; links whose blob is gone count as lacking.
///
/// # Errors
/// [`crate::WeightsError`] when the shard index is there but wrong.
pub(crate) fn missing_files(dir: &Path, wanted: Wanted) -> Result<Vec<String>> {
    let lacks = |name: &str| !dir.join(name).is_file();
    let mut missing: Vec<String> = REQUIRED.iter().filter(|n| lacks(n)).map(|n| (*n).to_owned()).collect();
    if wanted == Wanted::Weights && lacks(SINGLE_FILE) {
        if lacks(INDEX_FILE) {
            missing.push(format!("{SINGLE_FILE} or {INDEX_FILE}"));
        } else {
            missing.extend(shards(&dir.join(INDEX_FILE))?.into_iter().filter(|n| lacks(n)));
        }
    }
    Ok(missing)
}

/// The shards that an index names, each once, in order.
pub(crate) fn shards(index: &Path) -> Result<Vec<String>> {
    let names: std::collections::BTreeSet<String> = index::read(index)?.into_values().collect();
    Ok(names.into_iter().collect())
}

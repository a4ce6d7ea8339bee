//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::de::{DeserializeSeed as _, Error as _};
use serde::{Deserialize, Deserializer};

use crate::error::shown;
use crate::json_map::{Entries, Object};
use crate::storage::Storage;
use crate::{Result, WeightsError};

/// Name of the index in a checkpoint directory.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// The longest index read. Qwen2-57B-A14B's GPTQ form, the longest of the family, has 2.5 MB.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// Tensor name to shard file name; every file name is bare.
pub(crate) type WeightMap = BTreeMap<String, String>;

/// The index as written. `metadata.total_size` is advisory (published indexes disagree on tied tensors) and is not
/// read: the sizes that matter are checked in the shards.
#[derive(Deserialize)]
struct RawIndex {
    weight_map: RawMap,
}

/// Entries in file order, duplicates refused.
struct RawMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for RawMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let mut current = None;
        let entries = Entries::new(&mut current).deserialize(deserializer);
        entries.map(RawMap).map_err(|error| match current {
            Some(name) => D::Error::custom(format!("weight_map entry `{name}`: {error}")),
            None => error,
        })
    }
}

/// Reads and checks the index at `path`.
pub(crate) fn read(path: &Path) -> Result<WeightMap> {
    let storage = Storage::open(path)?;
    let file = storage.origin();
    let refuse = |field: &str, found: String, expected: &str| {
        Err(WeightsError::Index {
            file: file.to_owned(),
            field: field.to_owned(),
            found,
            expected: expected.to_owned(),
        })
    };
    if storage.len() > MAX_INDEX_BYTES {
        return refuse("file size", format!("{} bytes", storage.len()), "at most 100 MB");
    }
    let mut text = vec![0; storage.len() as usize];
    if let Err(source) = storage.read_exact_at(&mut text, 0) {
        return Err(WeightsError::Io { path: path.to_owned(), action: "read", source });
    }
    if text.starts_with(b"version https://git-lfs") {
        return Err(WeightsError::GitLfsPointer { file: file.to_owned(), bytes: storage.len() });
    }
    let raw: RawIndex = match serde_json::from_slice(&text) {
        Ok(Object(raw)) => raw,
        Err(error) => {
            let expected = "one JSON object with `weight_map`, an object of tensor name to shard file name";
            return refuse("shard index", shown(&error.to_string()), expected);
        }
    };
    if raw.weight_map.0.is_empty() {
        return refuse("weight_map", "no entries".to_owned(), "one entry a tensor");
    }
    for (tensor, shard) in &raw.weight_map.0 {
        let field = format!("weight_map `{}`", shown(tensor));
        if !is_bare_file_name(shard) {
            let expected = "the bare name of a file beside the index, without `/`, `\\`, `..` or `:`";
            return refuse(&field, format!("`{}`", shown(shard)), expected);
        }
        if !shard.ends_with(".safetensors") {
            return refuse(
                &field,
                format!("`{}`", shown(shard)),
                "a .safetensors file; no other format is read",
            );
        }
    }
    Ok(raw.weight_map.0.into_iter().collect())
}

/// Whether `name` can only mean a file in the same directory, on any system.
pub(crate) fn is_bare_file_name(name: &str) -> bool {
    const LONGEST: usize = 255;
    let mut components = Path::new(name).components();
    let one_normal = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    let foreign = |c: char| matches!(c, '/' | '\\' | ':') || c.is_control();
    one_normal && name.len() <= LONGEST && !name.contains("..") && !name.contains(foreign)
}

#[cfg(test)]
mod tests {
    use super::is_bare_file_name;

    #[test]
    fn only_bare_names_pass() {
        assert!(is_bare_file_name("model-00001-of-00004.safetensors"));
        let long = "a".repeat(256);
        for name in
            ["", ".", "..", "a/b", "/a", "a\\b", "C:a", "../a", "a/", "./a", "a\0b", "x..y", long.as_str()]
        {
            assert!(!is_bare_file_name(name), "{name:?}");
        }
    }
}

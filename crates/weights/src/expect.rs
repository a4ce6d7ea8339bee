//! Compares what a checkpoint holds with what the model needs: names, shapes, dtypes.

use std::collections::{BTreeMap, HashMap};

use longhaul_backend::DType;
use safetensors::tensor::Dtype;

use crate::error::LISTED;
use crate::header::Stored;
use crate::{Result, TensorSpec, WeightsError};

/// Endings of the tensors in which GPTQ, AWQ and FP8 checkpoints differ from the published layout.
const QUANTISED: [&str; 4] = [".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv"];

/// A tensor of a checkpoint and the shard (by position) that holds it.
#[derive(Debug, Clone)]
pub(crate) struct Located {
    pub shard: usize,
    pub stored: Stored,
}

/// A tensor that may be loaded: expected, of the right shape and a loadable dtype.
#[derive(Debug, Clone)]
pub(crate) struct Accepted {
    pub shard: usize,
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub offset: u64,
    pub bytes: u64,
}

/// Checks `found` against `expected`; tensors matching `optional` may be there but are not accepted.
///
/// `origin` names the checkpoint, `file_of` a shard by position.
pub(crate) fn accept(
    origin: &str,
    file_of: impl Fn(usize) -> String,
    mut found: BTreeMap<String, Located>,
    expected: &[TensorSpec],
    optional: &[&str],
) -> Result<HashMap<String, Accepted>> {
    let mut accepted = HashMap::with_capacity(expected.len());
    let mut missing = Vec::new();
    // The first tensor of a wrong shape is reported, but only if nothing is missing: a missing tensor says more.
    let mut wrong = None;
    for spec in expected {
        let Some(Located { shard, stored }) = found.remove(&spec.name) else {
            if !accepted.contains_key(&spec.name) {
                missing.push(spec.name.clone());
            }
            continue;
        };
        if stored.shape != spec.shape {
            wrong.get_or_insert_with(|| WeightsError::Shape {
                file: file_of(shard),
                tensor: spec.name.clone(),
                found: stored.shape.clone(),
                expected: spec.shape.clone(),
            });
        }
        let Some(dtype) = loadable(stored.dtype) else {
            wrong.get_or_insert_with(|| WeightsError::DType {
                file: file_of(shard),
                tensor: spec.name.clone(),
                found: stored.dtype.to_string(),
            });
            continue;
        };
        let Stored { shape, offset, bytes, .. } = stored;
        accepted.insert(spec.name.clone(), Accepted { shard, dtype, shape, offset, bytes });
    }

    let extra: Vec<&String> = found.keys().filter(|name| !is_optional(name, optional)).collect();
    if !missing.is_empty() {
        if let Some(tensor) = extra.iter().find(|name| QUANTISED.iter().any(|suffix| name.ends_with(suffix)))
        {
            return Err(WeightsError::Quantised { file: origin.to_owned(), tensor: (*tensor).clone() });
        }
        let similar = missing
            .iter()
            .take(LISTED)
            .filter_map(|name| most_similar(name, &extra).map(|found| (name.clone(), found.clone())))
            .collect();
        return Err(WeightsError::MissingTensors {
            file: origin.to_owned(),
            count: missing.len(),
            expected: expected.len(),
            names: missing.into_iter().take(LISTED).collect(),
            similar,
        });
    }
    if let Some(error) = wrong {
        return Err(error);
    }
    if !extra.is_empty() {
        return Err(WeightsError::UnexpectedTensors {
            file: origin.to_owned(),
            count: extra.len(),
            names: extra.into_iter().take(LISTED).cloned().collect(),
        });
    }
    Ok(accepted)
}

/// The dtypes that a device can take.
fn loadable(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Whether `name` is one of `optional`, or ends with one as whole dot-separated parts.
pub(crate) fn is_optional(name: &str, optional: &[&str]) -> bool {
    optional.iter().any(|o| name.strip_suffix(o).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
}

/// The candidate that `name` was most likely meant to be, if any is close: by edit distance, or because one is the other
/// with a prefix (`transformer.` and the like).
fn most_similar<'a>(name: &str, candidates: &[&'a String]) -> Option<&'a String> {
    /// Longer names are not compared: edit distance is quadratic and names come from the file.
    const LONGEST: usize = 256;
    let limit = name.len() / 4;
    let distance = |candidate: &str| {
        let prefixed = candidate.ends_with(&format!(".{name}")) || name.ends_with(&format!(".{candidate}"));
        if prefixed { 0 } else { strsim::levenshtein(name, candidate) }
    };
    candidates
        .iter()
        .filter(|c| c.len() <= LONGEST && name.len() <= LONGEST)
        .map(|c| (distance(c), *c))
        .min()
        .filter(|(distance, _)| *distance <= limit)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optional_names_match_whole_parts_only() {
        let optional = ["lm_head.weight", "rotary_emb.inv_freq"];
        assert!(is_optional("lm_head.weight", &optional));
        assert!(is_optional("model.layers.0.self_attn.rotary_emb.inv_freq", &optional));
        assert!(!is_optional("other_lm_head.weight", &optional));
        assert!(!is_optional("lm_head.weight.scale", &optional));
    }

    #[test]
    fn similar_names_are_found_and_strangers_are_not() {
        let names = ["model.layers.0.mlp.up_proj.weights".to_owned(), "transformer.h.0.attn".to_owned()];
        let candidates: Vec<&String> = names.iter().collect();
        assert_eq!(most_similar("model.layers.0.mlp.up_proj.weight", &candidates), Some(&names[0]));
        assert_eq!(most_similar("lm_head.weight", &candidates), None);
        assert_eq!(most_similar("h.0.attn", &candidates), Some(&names[1]));
    }
}

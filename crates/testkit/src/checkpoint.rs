//! A whole model directory written for one test, with a hook for every part that a test may want to be wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use longhaul_backend::DType;
use serde_json::{Map, Value, json};

use crate::config::TinyConfig;
use crate::safetensors_file::{TinyTensor, edit_header, encode_safetensors};
use crate::tokenizer::{ENDOFTEXT, IM_END, tokenizer_config_json, tokenizer_json};

type TensorEdit = Box<dyn FnOnce(&mut Vec<TinyTensor>)>;
type JsonEdit = Box<dyn FnOnce(&mut Value)>;
type HeaderEdit = Box<dyn FnOnce(&mut Map<String, Value>)>;
type BytesEdit = Box<dyn FnOnce(&mut Vec<u8>)>;

/// Builder of a model directory: config.json, model.safetensors (or shards with an index), generation_config.json,
/// tokenizer.json and tokenizer_config.json.
///
/// Edits are applied in the order tensors, JSON files, headers, raw bytes, removals, whatever the order of calls.
pub struct TinyCheckpoint {
    config: TinyConfig,
    seed: u64,
    shards: usize,
    tensors: Vec<TensorEdit>,
    json: Vec<(String, JsonEdit)>,
    headers: Vec<(String, HeaderEdit)>,
    bytes: Vec<(String, BytesEdit)>,
    removed: Vec<String>,
}

/// A model directory that is deleted when this is dropped.
#[derive(Debug)]
pub struct TinyModel {
    dir: tempfile::TempDir,
    config: TinyConfig,
}

impl TinyModel {
    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The sizes it was made with (before any edit of config.json).
    pub fn config(&self) -> &TinyConfig {
        &self.config
    }
}

impl TinyCheckpoint {
    /// A checkpoint of these sizes.
    pub fn new(config: TinyConfig) -> Self {
        Self {
            config,
            seed: 0,
            shards: 1,
            tensors: Vec::new(),
            json: Vec::new(),
            headers: Vec::new(),
            bytes: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// [`TinyConfig::dense`].
    pub fn dense() -> Self {
        Self::new(TinyConfig::dense())
    }

    /// [`TinyConfig::moe`].
    pub fn moe() -> Self {
        Self::new(TinyConfig::moe())
    }

    /// Stores all tensors as `dtype` and says so in config.json.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.config.dtype = dtype;
        self
    }

    /// Seed of the random weights.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Splits the tensors over this many files with an index; 1 writes `model.safetensors`.
    pub fn shards(mut self, shards: usize) -> Self {
        assert!(shards > 0, "a checkpoint has at least one file");
        self.shards = shards;
        self
    }

    /// Changes the tensors before they are written: rename, drop, add, reshape.
    pub fn edit_tensors(mut self, edit: impl FnOnce(&mut Vec<TinyTensor>) + 'static) -> Self {
        self.tensors.push(Box::new(edit));
        self
    }

    /// Changes config.json.
    pub fn edit_config(self, edit: impl FnOnce(&mut Value) + 'static) -> Self {
        self.edit_json("config.json", edit)
    }

    /// Changes any of the JSON files.
    pub fn edit_json(mut self, file: &str, edit: impl FnOnce(&mut Value) + 'static) -> Self {
        self.json.push((file.to_owned(), Box::new(edit)));
        self
    }

    /// Changes the header of a safetensors file; its data stays as it was.
    pub fn edit_header(mut self, file: &str, edit: impl FnOnce(&mut Map<String, Value>) + 'static) -> Self {
        self.headers.push((file.to_owned(), Box::new(edit)));
        self
    }

    /// Changes the bytes of any file; a file that does not exist starts empty.
    pub fn edit_bytes(mut self, file: &str, edit: impl FnOnce(&mut Vec<u8>) + 'static) -> Self {
        self.bytes.push((file.to_owned(), Box::new(edit)));
        self
    }

    /// Leaves a file out.
    pub fn remove(mut self, file: &str) -> Self {
        self.removed.push(file.to_owned());
        self
    }

    /// Writes everything to a new temporary directory.
    ///
    /// # Panics
    /// When an edit names a file that is not there, or writing fails.
    pub fn build(self) -> TinyModel {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let config = self.config.clone();
        self.write(dir.path());
        TinyModel { dir, config }
    }

    /// Writes everything into `dir`, which exists.
    ///
    /// # Panics
    /// As [`TinyCheckpoint::build`].
    pub fn write(self, dir: &Path) {
        for (name, bytes) in self.files() {
            let path: PathBuf = dir.join(&name);
            std::fs::write(&path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }

    /// The files by name, as [`TinyCheckpoint::write`] writes them.
    ///
    /// # Panics
    /// When an edit names a file that is not there.
    pub fn files(self) -> BTreeMap<String, Vec<u8>> {
        let mut tensors = random_tensors(&self.config, self.seed);
        for edit in self.tensors {
            edit(&mut tensors);
        }
        let mut documents = BTreeMap::from([
            ("config.json".to_owned(), self.config.to_json()),
            ("generation_config.json".to_owned(), generation_config_json()),
            ("tokenizer.json".to_owned(), tokenizer_json()),
            ("tokenizer_config.json".to_owned(), tokenizer_config_json()),
        ]);
        let mut files = BTreeMap::new();
        if self.shards == 1 {
            files.insert("model.safetensors".to_owned(), encode_safetensors(&tensors));
        } else {
            let mut map = Map::new();
            let total: usize = tensors.iter().map(|t| t.data.len()).sum();
            for (index, part) in split(&tensors, self.shards).into_iter().enumerate() {
                let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, self.shards);
                map.extend(part.iter().map(|t| (t.name.clone(), json!(name))));
                files.insert(name, encode_safetensors(part));
            }
            let index = json!({"metadata": {"total_size": total}, "weight_map": map});
            documents.insert("model.safetensors.index.json".to_owned(), index);
        }
        for (name, edit) in self.json {
            edit(documents.get_mut(&name).unwrap_or_else(|| panic!("no JSON file {name} to edit")));
        }
        for (name, document) in documents {
            let text = serde_json::to_vec_pretty(&document).expect("a JSON value can be written");
            files.insert(name, text);
        }
        for (name, edit) in self.headers {
            let bytes = files.get_mut(&name).unwrap_or_else(|| panic!("no file {name} to edit"));
            *bytes = edit_header(bytes, edit);
        }
        for (name, edit) in self.bytes {
            edit(files.entry(name).or_default());
        }
        for name in self.removed {
            assert!(files.remove(&name).is_some(), "no file {name} to remove");
        }
        files
    }
}

/// Cuts `tensors` into `shards` runs of nearly equal count.
fn split(tensors: &[TinyTensor], shards: usize) -> Vec<&[TinyTensor]> {
    (0..shards).map(|i| &tensors[tensors.len() * i / shards..tensors.len() * (i + 1) / shards]).collect()
}

/// As the published instruct models have it.
fn generation_config_json() -> Value {
    json!({
        "bos_token_id": ENDOFTEXT, "pad_token_id": ENDOFTEXT, "do_sample": true, "eos_token_id": [IM_END, ENDOFTEXT],
        "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0",
    })
}

/// Random weights in which every part matters: norms scatter around 1, biases are as large as their products, and
/// linear weights keep the scale of their input.
fn random_tensors(config: &TinyConfig, seed: u64) -> Vec<TinyTensor> {
    let mut random = Random(seed ^ 0x5eed_0f7e_57ab_1e00);
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let count = shape.iter().product();
        let (mean, deviation) = match *shape.as_slice() {
            _ if name.ends_with("norm.weight") => (1.0, 0.1),
            [_, inputs] if !name.ends_with("embed_tokens.weight") => (0.0, 1.0 / (inputs as f32).sqrt()),
            _ => (0.0, 0.5),
        };
        let values: Vec<f32> = (0..count).map(|_| mean + deviation * random.normal()).collect();
        TinyTensor::new(name, config.dtype, &shape, &values)
    };
    config.tensors().into_iter().map(tensor).collect()
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Approximately standard normal: the sum of twelve uniform variables, less its mean (variance 12/12).
    fn normal(&mut self) -> f32 {
        let uniform = |random: &mut Self| (random.next() >> 40) as f32 / (1u64 << 24) as f32;
        (0..12).map(|_| uniform(self)).sum::<f32>() - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_crate_reads_every_layout() {
        for (config, shards) in [(TinyConfig::dense(), 1), (TinyConfig::dense(), 3), (TinyConfig::moe(), 4)] {
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let files = TinyCheckpoint::new(config.clone()).dtype(dtype).shards(shards).files();
                let mut found: Vec<(String, Vec<usize>)> = Vec::new();
                for (_, bytes) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
                    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
                    found.extend(file.iter().map(|(name, view)| (name.to_owned(), view.shape().to_vec())));
                }
                let mut expected = config.tensors();
                found.sort();
                expected.sort();
                assert_eq!(found, expected);
                assert_eq!(files.contains_key("model.safetensors.index.json"), shards > 1);
            }
        }
    }

    #[test]
    fn seeds_repeat_and_edits_apply() {
        let files = |seed| TinyCheckpoint::dense().seed(seed).files();
        assert_eq!(files(1), files(1));
        assert_ne!(files(1)["model.safetensors"], files(2)["model.safetensors"]);
        let model = TinyCheckpoint::dense()
            .edit_config(|c| c["hidden_size"] = json!(65))
            .edit_header("model.safetensors", |h| drop(h.remove("model.norm.weight")))
            .edit_tensors(|t| t.truncate(5))
            .edit_bytes("extra.py", |b| b.extend_from_slice(b"raise"))
            .remove("tokenizer.json")
            .build();
        let config: Value =
            serde_json::from_slice(&std::fs::read(model.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["hidden_size"], 65);
        assert!(model.path().join("extra.py").is_file() && !model.path().join("tokenizer.json").exists());
    }

    #[test]
    fn weights_have_the_intended_scale() {
        let tensors = random_tensors(&TinyConfig { dtype: DType::F32, ..TinyConfig::dense() }, 4);
        let down = tensors.iter().find(|t| t.name.ends_with("down_proj.weight")).unwrap();
        let (chunks, _) = down.data.as_chunks::<4>();
        let values: Vec<f64> = chunks.iter().map(|c| f64::from(f32::from_le_bytes(*c))).collect();
        let variance = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
        assert!((variance * 96.0 - 1.0).abs() < 0.1, "{variance}");
    }
}

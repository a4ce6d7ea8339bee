//! From what the user names to a running [`Engine`]: files, config, positions, device, weights, KV pool.

use std::path::{Path, PathBuf};

use longhaul_backend::DType;
use longhaul_model::{LongContext, ModelSpec, PositionProfile, family, family_names};
use longhaul_text::{ChatTemplate, GenerationConfig, Tokenizer};
use longhaul_weights::{Checkpoint, Dummy, TensorSource, Wanted, locate};

use crate::blocks::BlockPool;
use crate::device::{DeviceOptions, open};
use crate::engine::Engine;
use crate::{EngineError, Result, demo};

/// Which model, as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// The checkpoint embedded in the binary.
    Demo,
    /// A member of the family by name, such as `qwen2-7b`.
    Family(String),
    /// A directory with a checkpoint.
    Directory(PathBuf),
    /// `org/name` on the hub.
    Hub(String),
}

impl ModelRef {
    /// Reads a `--model` value: `demo`, a family name, an existing directory, or a hub id.
    ///
    /// # Errors
    /// [`EngineError::UnknownModel`] with what would be understood.
    pub fn parse(model: &str) -> Result<ModelRef> {
        if model == "demo" {
            return Ok(ModelRef::Demo);
        }
        if let Some(member) = family(model) {
            return Ok(ModelRef::Family(member.name.into()));
        }
        let path = Path::new(model);
        if path.is_dir() {
            return Ok(ModelRef::Directory(path.into()));
        }
        if path.is_file() {
            let hint = if model.ends_with(".gguf") {
                "GGUF files are not supported yet; use the safetensors checkpoint"
            } else {
                "is a file; name the directory that holds config.json and the safetensors files"
            };
            return Err(EngineError::UnknownModel(format!("--model {model}: {hint}")));
        }
        let looks_like_hub_id = model.split('/').count() == 2 && !model.starts_with(['.', '/', '~']);
        if looks_like_hub_id {
            return Ok(ModelRef::Hub(model.into()));
        }
        let names: Vec<&str> = family_names().collect();
        Err(EngineError::UnknownModel(format!(
            "--model {model}: no such directory, and neither a hub id (org/name) nor a known name (demo, {})",
            names.join(", ")
        )))
    }
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The checkpoint's safetensors files.
    #[default]
    Auto,
    /// Random weights of a sensible scale, from a seed: shapes without files.
    Dummy,
}

/// Everything that decides how a model is loaded.
#[derive(Debug, Clone)]
pub struct Loader {
    /// Which model.
    pub model: ModelRef,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Where and how it runs.
    pub device: DeviceOptions,
    /// Tokens of context; `None` = what the checkpoint says.
    pub max_model_len: Option<usize>,
    /// Long-context mode; `None` = what the checkpoint and the context ask for.
    pub long_context: Option<LongContext>,
    /// Seed of dummy weights.
    pub dummy_seed: u64,
    /// Never use the network.
    pub offline: bool,
}

impl Loader {
    /// `model` with every default.
    pub fn new(model: ModelRef) -> Self {
        Self {
            model,
            load_format: LoadFormat::Auto,
            device: DeviceOptions::default(),
            max_model_len: None,
            long_context: None,
            dummy_seed: 0,
            offline: false,
        }
    }

    /// Reads the files that describe the model; its weights are neither read nor downloaded.
    ///
    /// # Errors
    /// Missing or malformed files, named.
    pub fn files(&self) -> Result<ModelFiles> {
        self.files_with(Wanted::Description)
    }

    fn files_with(&self, wanted: Wanted) -> Result<ModelFiles> {
        match &self.model {
            ModelRef::Demo => ModelFiles::demo(),
            ModelRef::Family(name) if self.load_format == LoadFormat::Dummy => ModelFiles::family(name),
            ModelRef::Family(name) => {
                let hub_id = family(name).map_or(name.as_str(), |m| m.hub_id);
                ModelFiles::directory(hub_id, &locate(hub_id, wanted, self.offline)?)
            }
            ModelRef::Hub(id) => ModelFiles::directory(id, &locate(id, wanted, self.offline)?),
            ModelRef::Directory(path) => {
                let name = path.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_str()?.to_owned()));
                ModelFiles::directory(&name.unwrap_or_else(|| path.display().to_string()), path)
            }
        }
    }

    /// Loads the model; `progress` hears (bytes read, bytes in all).
    ///
    /// # Errors
    /// Files, config, context, memory: each named with its remedy.
    pub fn load(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine> {
        let wanted = match self.load_format {
            LoadFormat::Auto => Wanted::Weights,
            LoadFormat::Dummy => Wanted::Description,
        };
        let files = self.files_with(wanted)?;
        let positions = PositionProfile::new(&files.spec, self.long_context, self.max_model_len)?;
        let expected = files.spec.tensors();
        let source: Box<dyn TensorSource + Sync> = match (self.load_format, &files.weights) {
            (LoadFormat::Dummy, _) | (_, WeightFiles::None) => {
                Box::new(Dummy::new(expected, files.spec.dtype.unwrap_or(DType::BF16), self.dummy_seed))
            }
            (LoadFormat::Auto, WeightFiles::Embedded) => {
                Box::new(Checkpoint::from_bytes(demo::WEIGHTS, "demo/model.safetensors", &expected, &[])?)
            }
            (LoadFormat::Auto, WeightFiles::Directory(path)) => {
                Box::new(Checkpoint::open(path, &expected, &files.spec.ignorable_tensors())?)
            }
        };
        let device = open(&self.device)?;
        let mut notes: Vec<String> = device.note.iter().cloned().collect();
        let profile = |tokens| Ok(PositionProfile::new(&files.spec, self.long_context, Some(tokens))?);
        let asked = self.max_model_len.is_some();
        let weight_bytes = source.total_bytes();
        let (positions, note) =
            device.fit(&self.device, &files.spec, weight_bytes, positions, asked, &profile)?;
        notes.extend(note);
        let placed = device.load(&self.device, &files.spec, &positions, source.as_ref(), progress)?;
        Ok(Engine {
            name: files.name,
            runner: placed.runner,
            blocks: BlockPool::new(placed.blocks),
            block_size: placed.block_size,
            spec: files.spec,
            positions,
            tokenizer: files.tokenizer,
            template: files.template,
            generation: files.generation,
            device: placed.description,
            notes,
        })
    }
}

/// A model's files, read and checked, without its weights.
pub struct ModelFiles {
    /// Name for reports.
    pub name: String,
    /// From `config.json`.
    pub spec: ModelSpec,
    /// From `tokenizer.json`, if there is one.
    pub tokenizer: Option<Tokenizer>,
    /// From `tokenizer_config.json` or `chat_template.jinja`.
    pub template: Option<ChatTemplate>,
    /// From `generation_config.json`.
    pub generation: GenerationConfig,
    weights: WeightFiles,
}

enum WeightFiles {
    None,
    Embedded,
    Directory(PathBuf),
}

impl ModelFiles {
    fn demo() -> Result<Self> {
        Ok(Self {
            name: "demo".into(),
            spec: ModelSpec::from_config(demo::CONFIG, "demo/config.json")?,
            tokenizer: Some(Tokenizer::from_bytes(demo::TOKENIZER, "demo/tokenizer.json")?),
            template: ChatTemplate::from_config_bytes(demo::TOKENIZER_CONFIG, "demo/tokenizer_config.json")?,
            generation: GenerationConfig::from_bytes(demo::GENERATION_CONFIG, "demo/generation_config.json")?,
            weights: WeightFiles::Embedded,
        })
    }

    fn family(name: &str) -> Result<Self> {
        let member =
            family(name).ok_or_else(|| EngineError::UnknownModel(format!("--model {name}: unknown")))?;
        Ok(Self {
            name: member.name.into(),
            spec: member.spec,
            tokenizer: None,
            template: None,
            generation: GenerationConfig::default(),
            weights: WeightFiles::None,
        })
    }

    fn directory(name: &str, dir: &Path) -> Result<Self> {
        let origin = |file: &str| dir.join(file).display().to_string();
        let config = required(&dir.join("config.json"))?;
        let spec = ModelSpec::from_config(&config, &origin("config.json"))?;
        let tokenizer = match optional(&dir.join("tokenizer.json"))? {
            Some(bytes) => Some(Tokenizer::from_bytes(&bytes, &origin("tokenizer.json"))?),
            None => None,
        };
        if let Some(tokenizer) = &tokenizer
            && tokenizer.vocab_size() > spec.vocab_size
        {
            return Err(EngineError::File {
                path: origin("tokenizer.json"),
                message: format!(
                    "has token ids up to {}, but config.json's vocab_size is {}; the files do not belong together",
                    tokenizer.vocab_size() - 1,
                    spec.vocab_size
                ),
            });
        }
        let tokenizer_config = optional(&dir.join("tokenizer_config.json"))?;
        // Newer checkpoints keep the template in a file of its own, which then is the one that counts.
        let template = match (optional(&dir.join("chat_template.jinja"))?, &tokenizer_config) {
            (Some(bytes), config) => {
                let source = String::from_utf8(bytes).map_err(|e| EngineError::File {
                    path: origin("chat_template.jinja"),
                    message: format!("is not UTF-8: {e}"),
                })?;
                let token = |field| config.as_deref().and_then(|config| special_token(config, field));
                let (bos, eos) = (token("bos_token"), token("eos_token"));
                let file = origin("chat_template.jinja");
                Some(ChatTemplate::new(&source, bos.as_deref(), eos.as_deref(), &file)?)
            }
            (None, Some(bytes)) => ChatTemplate::from_config_bytes(bytes, &origin("tokenizer_config.json"))?,
            (None, None) => None,
        };
        let generation = match optional(&dir.join("generation_config.json"))? {
            Some(bytes) => GenerationConfig::from_bytes(&bytes, &origin("generation_config.json"))?,
            None => GenerationConfig::default(),
        };
        Ok(Self {
            name: name.into(),
            spec,
            tokenizer,
            template,
            generation,
            weights: WeightFiles::Directory(dir.into()),
        })
    }
}

/// A special token of `tokenizer_config.json`: a string, or an object with its `content`.
fn special_token(config: &[u8], field: &str) -> Option<String> {
    let config: serde_json::Value = serde_json::from_slice(config).ok()?;
    let token = config.get(field)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// Config files beyond this are not config files.
const MAX_CONFIG_BYTES: u64 = 256 << 20;

fn required(path: &Path) -> Result<Vec<u8>> {
    optional(path)?.ok_or_else(|| EngineError::File {
        path: path.display().to_string(),
        message: "is missing; a model directory holds config.json beside its safetensors files".into(),
    })
}

fn optional(path: &Path) -> Result<Option<Vec<u8>>> {
    let failed = |message: String| EngineError::File { path: path.display().to_string(), message };
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed(format!("cannot be read: {e}"))),
        Ok(meta) if !meta.is_file() => Err(failed("is not a file".into())),
        Ok(meta) if meta.len() > MAX_CONFIG_BYTES => {
            Err(failed(format!("has {} bytes; at most {MAX_CONFIG_BYTES} are read", meta.len())))
        }
        Ok(_) => std::fs::read(path).map(Some).map_err(|e| failed(format!("cannot be read: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_are_strings_or_objects() {
        let config = br#"{"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}, "unk_token": null}"#;
        assert_eq!(special_token(config, "eos_token").as_deref(), Some("<|im_end|>"));
        assert_eq!(special_token(config, "bos_token").as_deref(), Some("<s>"));
        assert_eq!(special_token(config, "unk_token"), None);
        assert_eq!(special_token(b"{", "eos_token"), None);
    }
}

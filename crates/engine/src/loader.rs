//! From what the user names to a running [`Engine`]: files, config, positions, device, weights, KV pool.

use std::ops::Range;
use std::path::{Path, PathBuf};

use longhaul_backend::DType;
use longhaul_model::{LongContext, ModelSpec, PositionProfile, ShardPlan, family, family_names};
use longhaul_nodes::Placement;
use longhaul_text::{ChatTemplate, GenerationConfig, Tokenizer};
use longhaul_weights::{Checkpoint, Dummy, TensorSource, Wanted, locate};

use crate::blocks::BlockPool;
use crate::device::{DeviceOptions, Fitted, Opened, open, shard_plan};
use crate::engine::Engine;
use crate::local_ranks::{Loading, LocalRanks};
use crate::nodes::{self, NodeGroup, NodeOptions, Plan, Role, identity, ranks_of_node, sha256};
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
    /// The group of nodes that runs the model; `None` = this process alone.
    pub nodes: Option<NodeOptions>,
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
            nodes: None,
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

    /// Whether this process does what a leader on another node says: [`Self::follow`] is for it.
    pub fn is_worker(&self) -> bool {
        self.nodes.as_ref().is_some_and(|nodes| nodes.placement.rank > 0)
    }

    /// Loads the model; `progress` hears (bytes read, bytes in all). The leader of several nodes waits for them first.
    ///
    /// # Errors
    /// Files, config, context, memory: each named with its remedy. Nodes that do not come, or do not fit.
    pub fn load(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine> {
        let Prepared { files, positions, blocks, source, device, plan, notes } = self.prepare()?;
        let source = source.as_ref();
        let loading = self.loading(&files, (&positions, blocks), source, &plan);
        let placed = match self.meet(&files, (&positions, blocks), source, &plan, &device)? {
            None => device.load(loading, progress)?,
            Some(group) => {
                let local = LocalRanks { ranks: group.ranks, pulse: group.pulse };
                let Role::Leader(nodes) = group.role else {
                    return Err(EngineError::Parameter {
                        name: "--node-rank",
                        message: "a worker runs no requests of its own".into(),
                    });
                };
                device.lead(loading, local, nodes, progress)?
            }
        };
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

    /// Joins the leader, loads this node's part of the model, and does what the leader says until it ends the group.
    ///
    /// # Errors
    /// As [`Self::load`]; why the group ended, if not well.
    pub fn follow(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let Prepared { files, positions, blocks, source, device, plan, .. } = self.prepare()?;
        let source = source.as_ref();
        let loading = self.loading(&files, (&positions, blocks), source, &plan);
        match self.meet(&files, (&positions, blocks), source, &plan, &device)? {
            Some(NodeGroup { ranks, pulse, role: Role::Worker(worker) }) => {
                let local = LocalRanks { ranks, pulse };
                device.work(loading, local, &worker, progress)
            }
            _ => Err(EngineError::Parameter {
                name: "--node-rank",
                message: "only a node beside the leader follows".into(),
            }),
        }
    }

    /// Everything but weights.
    fn prepare(&self) -> Result<Prepared> {
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
        let device = open(&self.device, self.local_ranks()?)?;
        device.check_overlap(&self.device)?;
        let mut notes: Vec<String> = device.note.iter().cloned().collect();
        let profile = |tokens| Ok(PositionProfile::new(&files.spec, self.long_context, Some(tokens))?);
        let asked = self.max_model_len.is_some();
        let weight_bytes = source.total_bytes();
        let Fitted { positions, blocks, note } =
            device.fit(&self.device, &files.spec, weight_bytes, positions, asked, &profile)?;
        notes.extend(note);
        let plan = shard_plan(&self.device, &files.spec)?;
        Ok(Prepared { files, positions, blocks, source, device, plan, notes })
    }

    /// Meets the other nodes, if there are to be any.
    fn meet(
        &self,
        files: &ModelFiles,
        (positions, blocks): (&PositionProfile, usize),
        source: &dyn TensorSource,
        shards: &ShardPlan,
        device: &Opened,
    ) -> Result<Option<NodeGroup>> {
        let Some(options) = self.nodes.as_ref().filter(|nodes| nodes.placement.size > 1) else {
            return Ok(None);
        };
        let (nodes, ranks) = (options.placement.size, shards.ranks().len());
        let precision = device.between_nodes(&self.device, &files.spec)?;
        let plan = Plan { shards, positions, blocks, precision };
        let identity = identity(&files.spec, source, &files.tokenizer_hash, &plan, nodes);
        nodes::meet(options, &identity, ranks, self.device.step_timeout).map(Some)
    }

    fn loading<'a>(
        &'a self,
        files: &'a ModelFiles,
        (positions, blocks): (&'a PositionProfile, usize),
        source: &'a (dyn TensorSource + Sync),
        plan: &'a ShardPlan,
    ) -> Loading<'a> {
        Loading { options: &self.device, spec: &files.spec, positions, blocks, plan, source }
    }

    /// The ranks of this node.
    ///
    /// # Errors
    /// [`EngineError::Parameter`] when there are fewer ranks than nodes.
    fn local_ranks(&self) -> Result<Range<usize>> {
        let ranks = self.device.tensor_parallel.max(1);
        let Some(Placement { rank: node, size: nodes, .. }) =
            self.nodes.as_ref().map(|nodes| &nodes.placement)
        else {
            return Ok(0..ranks);
        };
        if ranks < *nodes {
            return Err(EngineError::Parameter {
                name: "--tp",
                message: format!("{ranks} ranks are too few for {nodes} nodes; give each node one at least"),
            });
        }
        Ok(ranks_of_node(*node, *nodes, ranks))
    }
}

/// A model on its way to a device, before any weight is read.
struct Prepared {
    files: ModelFiles,
    positions: PositionProfile,
    blocks: usize,
    source: Box<dyn TensorSource + Sync>,
    device: Opened,
    plan: ShardPlan,
    notes: Vec<String>,
}

/// [`ModelFiles`]' hash where there is nothing to hash.
const NO_TOKENIZER: &str = "none";

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
    /// Hash of `tokenizer.json`, or that there is none.
    tokenizer_hash: String,
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
            tokenizer_hash: sha256(demo::TOKENIZER),
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
            tokenizer_hash: NO_TOKENIZER.into(),
            weights: WeightFiles::None,
        })
    }

    fn directory(name: &str, dir: &Path) -> Result<Self> {
        let origin = |file: &str| dir.join(file).display().to_string();
        let config = required(&dir.join("config.json"))?;
        let spec = ModelSpec::from_config(&config, &origin("config.json"))?;
        let (tokenizer, tokenizer_hash) = match optional(&dir.join("tokenizer.json"))? {
            Some(bytes) => (Some(Tokenizer::from_bytes(&bytes, &origin("tokenizer.json"))?), sha256(&bytes)),
            None => (None, NO_TOKENIZER.into()),
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
            tokenizer_hash,
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

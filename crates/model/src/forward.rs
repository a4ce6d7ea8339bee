//! The Qwen2 forward pass, written once over [`Backend`].

use longhaul_backend::{
    Backend, Error as BackendError, ExpertWeights, HostTensor, Linear, MoeWeights, SharedExpert,
};
use longhaul_backend::{KvLayout, StepInputs};
use longhaul_weights::TensorSource;

use crate::manifest::layer_tensor;
use crate::{
    Mlp as MlpKind, ModelError, ModelSpec, MoeSpec, PositionProfile, RankShard, Result, Role, ShardPlan,
};

/// The weights of a model, or of one rank's shard of it, on a device, and how to run them.
pub struct Model<B: Backend> {
    backend: B,
    embedding: B::Matrix,
    /// The first id of the embedding's rows.
    first_id: usize,
    vocab_size: usize,
    /// Columns of the logits on every rank.
    vocabulary_shares: Vec<usize>,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    lm_head: B::Matrix,
    rope: B::Rope,
    eps: f32,
}

struct Layer<B: Backend> {
    input_norm: B::Vector,
    qkv: Linear<B>,
    qkv_bias: Option<B::Vector>,
    output: Linear<B>,
    post_attention_norm: B::Vector,
    mlp: Mlp<B>,
}

enum Mlp<B: Backend> {
    Dense { gate_up: B::Matrix, down: Linear<B> },
    Sparse(MoeWeights<B>),
}

/// Reads a rank's part of tensors by name and hands them to the device.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: &'a dyn TensorSource,
    shard: &'a RankShard,
}

impl<'a, B: Backend> Loader<'a, B> {
    fn read(&self, role: Role, name: &str) -> Result<HostTensor<'a>> {
        Ok(self.source.tensor(name, self.shard.slice(role))?)
    }

    fn parts(&self, tensors: &[(Role, String)]) -> Result<Vec<HostTensor<'a>>> {
        tensors.iter().map(|(role, name)| self.read(*role, name)).collect()
    }

    fn vector(&self, tensors: &[(Role, String)]) -> Result<B::Vector> {
        Ok(self.backend.vector(self.parts(tensors)?)?)
    }

    fn matrix(&self, tensors: &[(Role, String)]) -> Result<B::Matrix> {
        Ok(self.backend.matrix(self.parts(tensors)?)?)
    }

    fn linear(&self, tensors: &[(Role, String)]) -> Result<Linear<B>> {
        Ok(Linear { weight: self.matrix(tensors)?, bias: None })
    }

    fn layer(&self, spec: &ModelSpec, layer: usize) -> Result<Layer<B>> {
        let name = |suffix: &str| layer_tensor(layer, suffix);
        let norm = |suffix: &str| self.vector(&[(Role::Replicated, name(suffix))]);
        let qkv = |kind: &str| {
            [(Role::Query, "q"), (Role::KeyValue, "k"), (Role::KeyValue, "v")]
                .map(|(role, p)| (role, name(&format!("self_attn.{p}_proj.{kind}"))))
        };
        let qkv_bias = if spec.qkv_bias { Some(self.vector(&qkv("bias"))?) } else { None };
        let mlp = match &spec.moe {
            Some(moe) if spec.is_sparse(layer) => Mlp::Sparse(self.experts(moe, layer)?),
            _ => Mlp::Dense {
                gate_up: self.matrix(&gate_up(MlpKind::Dense, |p| name(&format!("mlp.{p}_proj.weight"))))?,
                down: self.linear(&[(Role::Down(MlpKind::Dense), name("mlp.down_proj.weight"))])?,
            },
        };
        Ok(Layer {
            input_norm: norm("input_layernorm.weight")?,
            qkv: self.linear(&qkv("weight"))?,
            qkv_bias,
            output: self.linear(&[(Role::Output, name("self_attn.o_proj.weight"))])?,
            post_attention_norm: norm("post_attention_layernorm.weight")?,
            mlp,
        })
    }

    fn experts(&self, moe: &MoeSpec, layer: usize) -> Result<MoeWeights<B>> {
        let name = |suffix: &str| layer_tensor(layer, suffix);
        let ours = self.shard.experts.clone();
        let experts = self.backend.experts(ours.len(), &mut |index| {
            let expert = ours.start + index;
            let read = |role: fn(MlpKind) -> Role, projection: &str| {
                let name = name(&format!("mlp.experts.{expert}.{projection}_proj.weight"));
                self.read(role(MlpKind::Expert(expert)), &name).map_err(|e| BackendError::Load(Box::new(e)))
            };
            Ok(ExpertWeights {
                gate: read(Role::Up, "gate")?,
                up: read(Role::Up, "up")?,
                down: read(Role::Down, "down")?,
            })
        })?;
        let shared = if moe.shared_intermediate_size > 0 {
            let projection = |p: &str| name(&format!("mlp.shared_expert.{p}_proj.weight"));
            Some(SharedExpert {
                gate_up: self.matrix(&gate_up(MlpKind::Shared, projection))?,
                down: self.matrix(&[(Role::Down(MlpKind::Shared), projection("down"))])?,
                gate: self.matrix(&[(Role::Replicated, name("mlp.shared_expert_gate.weight"))])?,
            })
        } else {
            None
        };
        Ok(MoeWeights {
            router: self.matrix(&[(Role::Replicated, name("mlp.gate.weight"))])?,
            experts,
            first_expert: ours.start,
            top_k: moe.top_k,
            norm_topk_prob: moe.norm_topk_prob,
            shared,
        })
    }
}

/// The gate and the up projection of `mlp`, whose names `name` knows.
fn gate_up(mlp: MlpKind, name: impl Fn(&str) -> String) -> [(Role, String); 2] {
    ["gate", "up"].map(|projection| (Role::Up(mlp), name(projection)))
}

impl<B: Backend> Model<B> {
    /// Reads every tensor of `spec` from `source` and moves it to `backend`; `progress` hears (bytes read, bytes in all)
    /// after every layer.
    ///
    /// # Errors
    /// A tensor that cannot be read, or a device that cannot hold it.
    pub fn load(
        backend: B,
        spec: &ModelSpec,
        positions: &PositionProfile,
        source: &dyn TensorSource,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let shard = RankShard::whole(spec);
        Self::load_part(backend, spec, positions, &shard, vec![spec.vocab_size], source, progress)
    }

    /// Reads what `rank` of `plan` holds, and nothing else, and moves it to `backend`, which is that rank of its group.
    ///
    /// # Errors
    /// As [`Model::load`]; [`ModelError::Shard`] for a rank that the plan does not have.
    pub fn load_shard(
        backend: B,
        spec: &ModelSpec,
        positions: &PositionProfile,
        (plan, rank): (&ShardPlan, usize),
        source: &dyn TensorSource,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let shares = plan.ranks().iter().map(|shard| shard.vocabulary.len()).collect();
        let shard = plan.ranks().get(rank).ok_or_else(|| {
            ModelError::Shard(format!("rank {rank} of a plan for {} ranks", plan.ranks().len()))
        })?;
        Self::load_part(backend, spec, positions, shard, shares, source, progress)
    }

    fn load_part(
        backend: B,
        spec: &ModelSpec,
        positions: &PositionProfile,
        shard: &RankShard,
        vocabulary_shares: Vec<usize>,
        source: &dyn TensorSource,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let loader = Loader { backend: &backend, source, shard };
        let mut report = || progress(source.bytes_read(), source.total_bytes());
        let embedding = loader.matrix(&[(Role::Embedding, "model.embed_tokens.weight".into())])?;
        // The largest tensors come first: while the device makes its own form of one, the file's form is there, too.
        let head = if spec.tied_embeddings {
            embedding.clone()
        } else {
            loader.matrix(&[(Role::Head, "lm_head.weight".into())])?
        };
        let mut layers = Vec::with_capacity(spec.layers);
        for layer in 0..spec.layers {
            report();
            layers.push(loader.layer(spec, layer)?);
        }
        let norm = loader.vector(&[(Role::Replicated, "model.norm.weight".into())])?;
        let rope = backend.rope(positions.tables())?;
        report();
        Ok(Self {
            embedding,
            first_id: shard.vocabulary.start,
            vocab_size: spec.vocab_size,
            vocabulary_shares,
            layers,
            norm,
            lm_head: head,
            rope,
            eps: spec.rms_norm_eps as f32,
            backend,
        })
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Takes the KV pool's memory.
    ///
    /// # Errors
    /// The device's.
    pub fn kv_cache(&self, layout: KvLayout) -> Result<B::KvCache> {
        Ok(self.backend.kv_cache(layout)?)
    }

    /// Runs one step: writes the rows' K and V to `kv` and returns the logits of the rows that want them (`None` if none
    /// does), of this rank's share of the vocabulary: `[logit_rows, share]`. Every rank of a group runs the same steps.
    ///
    /// In the last layer only K and V are needed of the rows without logits, so everything after them runs on the logit
    /// rows alone.
    ///
    /// # Errors
    /// An inconsistent step, or the device's.
    pub fn forward(&self, inputs: StepInputs, kv: &mut B::KvCache) -> Result<Option<B::Tensor>> {
        let b = &self.backend;
        let wants_logits = !inputs.logit_rows.is_empty();
        let tail = inputs.logit_tail().filter(|tail| tail.rows() < inputs.rows());
        let step = b.begin_step(inputs, kv)?;
        let last = self.layers.len().saturating_sub(1);
        // This rank's part of what is added to the residual stream next.
        let mut x = b.embed(&self.embedding, self.first_id, self.vocab_size, &step)?;
        let mut residual = None;
        let mut narrowed = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let (normed, mut stream) = b.all_reduce_add_rms_norm(x, residual, &layer.input_norm, self.eps)?;
            let qkv = b.linear(&normed, &layer.qkv)?;
            let mut q = b.rope_and_cache(qkv, layer.qkv_bias.as_ref(), &self.rope, &step, kv, index)?;
            if index == last {
                if !wants_logits {
                    return Ok(None);
                }
                if let Some(tail) = &tail {
                    q = b.logit_rows(&q, &step)?;
                    stream = b.logit_rows(&stream, &step)?;
                    narrowed = Some(b.begin_step(tail.clone(), kv)?);
                }
            }
            let step = narrowed.as_ref().unwrap_or(&step);
            let attended = b.attention(&q, &self.rope, step, kv, index)?;
            let attended = b.linear_to_residual(&attended, &layer.output)?;
            let (normed, stream) =
                b.all_reduce_add_rms_norm(attended, Some(stream), &layer.post_attention_norm, self.eps)?;
            x = match &layer.mlp {
                Mlp::Dense { gate_up, down } => {
                    b.linear_to_residual(&b.linear_silu_and_mul(&normed, gate_up)?, down)?
                }
                Mlp::Sparse(moe) => b.moe(&normed, moe)?,
            };
            residual = Some(stream);
        }
        let step = narrowed.as_ref().unwrap_or(&step);
        let x = b.logit_rows(&x, step)?;
        let residual = residual.map(|stream| b.logit_rows(&stream, step)).transpose()?;
        let (normed, _) = b.all_reduce_add_rms_norm(x, residual, &self.norm, self.eps)?;
        Ok(Some(b.logits(&normed, &self.lm_head)?))
    }

    /// The whole logits `[logit_rows, vocab]` of what [`Model::forward`] returned, the same on all ranks; all must ask.
    ///
    /// # Errors
    /// The device's, or a rank that failed.
    pub fn gather_logits(&self, logits: B::Tensor) -> Result<B::Tensor> {
        Ok(self.backend.all_gather(logits, &self.vocabulary_shares)?)
    }
}

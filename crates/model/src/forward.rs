//! The Qwen2 forward pass, written once over [`Backend`].

use std::num::NonZeroUsize;

use longhaul_backend::{
    Backend, Error as BackendError, ExpertWeights, HostTensor, Linear, MoeWeights, Pending, SharedExpert,
};
use longhaul_backend::{Draw, KvLayout, SamplingRow, StepInputs};
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
    /// Rows from which a step runs in two halves.
    overlap_rows: Option<NonZeroUsize>,
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

/// Rows that go through the layers together: a step, or one half of it, in which sums over the ranks are `overlapped` with the
/// other half's work.
struct Part<B: Backend> {
    step: B::Step,
    /// The logit rows alone, where they are fewer, for the last layer.
    tail: Option<StepInputs>,
    wants_logits: bool,
    overlapped: bool,
    x: Addend<B>,
    residual: Option<B::Tensor>,
}

/// What is added to the residual stream next.
enum Addend<B: Backend> {
    /// This rank's part of it.
    Own(B::Tensor),
    /// The sum over the ranks, under way.
    Started(Pending<B::Tensor>),
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
            overlap_rows: None,
            backend,
        })
    }

    /// The same model, whose steps of at least `rows` rows (`None`: no step) run in two halves, layer by layer: while the
    /// ranks sum one half, they compute the other. The results are the same bits where a row's do not depend on the other
    /// rows of its step.
    #[must_use]
    pub fn overlapping(self, rows: Option<NonZeroUsize>) -> Self {
        Self { overlap_rows: rows, ..self }
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
        let halves = self.overlap_rows.is_some_and(|least| inputs.rows() >= least.get().max(2));
        let parts = if halves {
            let rows = inputs.rows().div_ceil(2);
            let (first, second) = inputs.split(rows);
            vec![first, second]
        } else {
            vec![inputs]
        };
        let mut parts =
            parts.into_iter().map(|part| self.begin(part, halves, kv)).collect::<Result<Vec<_>>>()?;
        let last = self.layers.len().saturating_sub(1);
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = parts.into_iter().map(|part| self.attend(part, (index, layer), last, kv));
            parts = attended.filter_map(Result::transpose).collect::<Result<_>>()?;
            parts = parts.into_iter().map(|part| self.mix(part, layer)).collect::<Result<_>>()?;
        }
        let ends = parts.into_iter().map(|part| self.end(part)).collect::<Result<Vec<_>>>()?;
        let logits = match ends.as_slice() {
            [] => return Ok(None),
            [normed] => b.logits(normed, &self.lm_head)?,
            several => b.logits(&b.stack_rows(several)?, &self.lm_head)?,
        };
        Ok(Some(logits))
    }

    /// A part of a step on its way into the first layer.
    fn begin(&self, inputs: StepInputs, overlapped: bool, kv: &B::KvCache) -> Result<Part<B>> {
        let b = &self.backend;
        let wants_logits = !inputs.logit_rows.is_empty();
        let tail = inputs.logit_tail().filter(|tail| tail.rows() < inputs.rows());
        let step = b.begin_step(inputs, kv)?;
        let embedded = b.embed(&self.embedding, self.first_id, self.vocab_size, &step)?;
        let x = self.addend(embedded, overlapped)?;
        Ok(Part { step, tail, wants_logits, overlapped, x, residual: None })
    }

    /// `x` of this rank, for the sum over the ranks that is added to the residual stream next.
    fn addend(&self, x: B::Tensor, overlapped: bool) -> Result<Addend<B>> {
        Ok(if overlapped { Addend::Started(self.backend.start_all_reduce(x)?) } else { Addend::Own(x) })
    }

    /// Adds the sum over the ranks to the residual stream, and norms that: `(normed, residual)`.
    fn add_norm(
        &self,
        x: Addend<B>,
        residual: Option<B::Tensor>,
        weight: &B::Vector,
    ) -> Result<(B::Tensor, B::Tensor)> {
        let b = &self.backend;
        Ok(match x {
            Addend::Own(x) => b.all_reduce_add_rms_norm(x, residual, weight, self.eps)?,
            Addend::Started(sum) => b.add_rms_norm(sum.finish()?, residual, weight, self.eps)?,
        })
    }

    /// The first half of layer `index`. In the `last` one, `None` of a part that wants no logits.
    fn attend(
        &self,
        part: Part<B>,
        (index, layer): (usize, &Layer<B>),
        last: usize,
        kv: &mut B::KvCache,
    ) -> Result<Option<Part<B>>> {
        let b = &self.backend;
        let Part { mut step, mut tail, wants_logits, overlapped, x, residual } = part;
        let (normed, mut stream) = self.add_norm(x, residual, &layer.input_norm)?;
        let qkv = b.linear(&normed, &layer.qkv)?;
        let mut q = b.rope_and_cache(qkv, layer.qkv_bias.as_ref(), &self.rope, &step, kv, index)?;
        if index == last {
            if !wants_logits {
                return Ok(None);
            }
            if let Some(tail) = tail.take() {
                q = b.logit_rows(&q, &step)?;
                stream = b.logit_rows(&stream, &step)?;
                step = b.begin_step(tail, kv)?;
            }
        }
        let attended = b.attention(&q, &self.rope, &step, kv, index)?;
        let x = self.addend(b.linear_to_residual(&attended, &layer.output)?, overlapped)?;
        Ok(Some(Part { step, tail, wants_logits, overlapped, x, residual: Some(stream) }))
    }

    /// The second half of a layer.
    fn mix(&self, part: Part<B>, layer: &Layer<B>) -> Result<Part<B>> {
        let b = &self.backend;
        let (normed, stream) = self.add_norm(part.x, part.residual, &layer.post_attention_norm)?;
        let mixed = match &layer.mlp {
            Mlp::Dense { gate_up, down } => {
                b.linear_to_residual(&b.linear_silu_and_mul(&normed, gate_up)?, down)?
            }
            Mlp::Sparse(moe) => b.moe(&normed, moe)?,
        };
        let x = self.addend(mixed, part.overlapped)?;
        Ok(Part { x, residual: Some(stream), ..part })
    }

    /// What the output head reads: the logit rows, normed.
    fn end(&self, part: Part<B>) -> Result<B::Tensor> {
        let b = &self.backend;
        let x = match part.x {
            Addend::Own(x) => Addend::Own(b.logit_rows(&x, &part.step)?),
            Addend::Started(sum) => {
                Addend::Started(Pending::ready(b.logit_rows(&sum.finish()?, &part.step)?))
            }
        };
        let residual = part.residual.map(|stream| b.logit_rows(&stream, &part.step)).transpose()?;
        Ok(self.add_norm(x, residual, &self.norm)?.0)
    }

    /// Draws a token for each row of what [`Model::forward`] returned, the same on all ranks; all must ask, with equal rows.
    ///
    /// # Errors
    /// As [`Backend::sample`].
    pub fn sample(&self, logits: &B::Tensor, rows: &[SamplingRow<'_>]) -> Result<Vec<Draw>> {
        Ok(self.backend.sample(logits, &self.vocabulary_shares, rows)?)
    }

    /// The whole logits `[logit_rows, vocab]` of what [`Model::forward`] returned, the same on all ranks; all must ask.
    ///
    /// # Errors
    /// The device's, or a rank that failed.
    pub fn gather_logits(&self, logits: B::Tensor) -> Result<B::Tensor> {
        Ok(self.backend.all_gather(logits, &self.vocabulary_shares)?)
    }
}

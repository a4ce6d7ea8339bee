//! The Qwen2 forward pass, written once over [`Backend`].

use longhaul_backend::{
    Backend, Error as BackendError, ExpertWeights, HostTensor, Linear, MoeWeights, SharedExpert,
};
use longhaul_backend::{KvLayout, StepInputs};
use longhaul_weights::{Slice, TensorSource};

use crate::manifest::layer_tensor;
use crate::{ModelSpec, MoeSpec, PositionProfile, Result};

/// The weights of a model on a device, and how to run them.
pub struct Model<B: Backend> {
    backend: B,
    embedding: B::Matrix,
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

/// Reads tensors by name and hands them to the device.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: &'a dyn TensorSource,
}

impl<'a, B: Backend> Loader<'a, B> {
    fn read(&self, name: &str) -> Result<HostTensor<'a>> {
        Ok(self.source.tensor(name, Slice::All)?)
    }

    fn vector(&self, names: &[String]) -> Result<B::Vector> {
        let parts = names.iter().map(|n| self.read(n)).collect::<Result<Vec<_>>>()?;
        Ok(self.backend.vector(parts)?)
    }

    fn matrix(&self, names: &[String]) -> Result<B::Matrix> {
        let parts = names.iter().map(|n| self.read(n)).collect::<Result<Vec<_>>>()?;
        Ok(self.backend.matrix(parts)?)
    }

    fn linear(&self, names: &[String]) -> Result<Linear<B>> {
        Ok(Linear { weight: self.matrix(names)?, bias: None })
    }

    fn layer(&self, spec: &ModelSpec, layer: usize) -> Result<Layer<B>> {
        let name = |suffix: &str| layer_tensor(layer, suffix);
        let qkv = |kind: &str| ["q", "k", "v"].map(|p| name(&format!("self_attn.{p}_proj.{kind}")));
        let qkv_bias = if spec.qkv_bias { Some(self.vector(&qkv("bias"))?) } else { None };
        let mlp = match &spec.moe {
            Some(moe) if spec.is_sparse(layer) => Mlp::Sparse(self.experts(moe, layer)?),
            _ => Mlp::Dense {
                gate_up: self.matrix(&[name("mlp.gate_proj.weight"), name("mlp.up_proj.weight")])?,
                down: self.linear(&[name("mlp.down_proj.weight")])?,
            },
        };
        Ok(Layer {
            input_norm: self.vector(&[name("input_layernorm.weight")])?,
            qkv: self.linear(&qkv("weight"))?,
            qkv_bias,
            output: self.linear(&[name("self_attn.o_proj.weight")])?,
            post_attention_norm: self.vector(&[name("post_attention_layernorm.weight")])?,
            mlp,
        })
    }

    fn experts(&self, moe: &MoeSpec, layer: usize) -> Result<MoeWeights<B>> {
        let name = |suffix: &str| layer_tensor(layer, suffix);
        let read = |expert: usize, projection: &str| {
            self.read(&name(&format!("mlp.experts.{expert}.{projection}_proj.weight")))
                .map_err(|e| BackendError::Load(Box::new(e)))
        };
        let experts = self.backend.experts(moe.experts, &mut |expert| {
            Ok(ExpertWeights {
                gate: read(expert, "gate")?,
                up: read(expert, "up")?,
                down: read(expert, "down")?,
            })
        })?;
        let shared = if moe.shared_intermediate_size > 0 {
            let projection = |p: &str| name(&format!("mlp.shared_expert.{p}_proj.weight"));
            Some(SharedExpert {
                gate_up: self.matrix(&[projection("gate"), projection("up")])?,
                down: self.matrix(&[projection("down")])?,
                gate: self.matrix(&[name("mlp.shared_expert_gate.weight")])?,
            })
        } else {
            None
        };
        Ok(MoeWeights {
            router: self.matrix(&[name("mlp.gate.weight")])?,
            experts,
            top_k: moe.top_k,
            norm_topk_prob: moe.norm_topk_prob,
            shared,
        })
    }
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
        let loader = Loader { backend: &backend, source };
        let mut report = || progress(source.bytes_read(), source.total_bytes());
        let embedding = loader.matrix(&["model.embed_tokens.weight".into()])?;
        let mut layers = Vec::with_capacity(spec.layers);
        for layer in 0..spec.layers {
            report();
            layers.push(loader.layer(spec, layer)?);
        }
        let norm = loader.vector(&["model.norm.weight".into()])?;
        let head = if spec.tied_embeddings {
            embedding.clone()
        } else {
            loader.matrix(&["lm_head.weight".into()])?
        };
        let rope = backend.rope(positions.tables())?;
        report();
        Ok(Self { embedding, layers, norm, lm_head: head, rope, eps: spec.rms_norm_eps as f32, backend })
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

    /// Runs one step: writes the rows' K and V to `kv` and returns the logits `[logit_rows, vocab]` of the rows that
    /// want them (`None` if none does).
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
        let mut x = b.embed(&self.embedding, &step)?;
        let mut residual = None;
        let mut narrowed = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let (normed, mut stream) = b.add_rms_norm(x, residual, &layer.input_norm, self.eps)?;
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
            let attended = b.all_reduce(b.linear_to_residual(&attended, &layer.output)?)?;
            let (normed, stream) =
                b.add_rms_norm(attended, Some(stream), &layer.post_attention_norm, self.eps)?;
            let mixed = match &layer.mlp {
                Mlp::Dense { gate_up, down } => {
                    b.linear_to_residual(&b.linear_silu_and_mul(&normed, gate_up)?, down)?
                }
                Mlp::Sparse(moe) => b.moe(&normed, moe)?,
            };
            x = b.all_reduce(mixed)?;
            residual = Some(stream);
        }
        let step = narrowed.as_ref().unwrap_or(&step);
        let x = b.logit_rows(&x, step)?;
        let residual = residual.map(|stream| b.logit_rows(&stream, step)).transpose()?;
        let (normed, _) = b.add_rms_norm(x, residual, &self.norm, self.eps)?;
        Ok(Some(b.logits(&normed, &self.lm_head)?))
    }
}

//! [`Backend`] on a driver: every op is one function of [`crate::ops`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use longhaul_backend::{
    Backend, Draw, Error, ExpertWeights, HostTensor, KvLayout, Linear, MoeWeights, Result, RopeTables,
    SamplingRow, StepInputs, Widths, sample_slices,
};

use crate::arena::Arena;
use crate::context::{Context, Variant};
use crate::driver::{Driver, Element, GraphId, Memory};
use crate::group::Group;
use crate::kv::KvCache;
use crate::ops::{self, attention, embedding, gemm, moe, norm, rope, sampling, sampling_slice};
use crate::padded_cols;
use crate::rope::Rope;
use crate::sizes::{Limits, arena_bytes};
use crate::step::Step;
use crate::tensor::Tensor;
use crate::weights::{Experts, Matrix, Vector};

/// Step buffers: the step, and its logit rows for the last layer.
const STEP_BUFFERS: usize = 2;

/// One CUDA device (or emulated one) as a backend.
pub struct Cuda {
    ctx: Context,
    limits: Limits,
    step_memory: Vec<Arc<Memory>>,
    /// Where logits go: outside the arena, so that a recorded step leaves them at a fixed place.
    logits: Tensor,
    /// The step of a recording, uploaded before it began.
    prepared: Mutex<Option<Step>>,
    group: Group,
}

/// What [`Cuda::new`] takes from the driver, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepBytes {
    /// Tensors of a step.
    pub arena: usize,
    /// The integers of steps, and counters that kernels share.
    pub inputs: usize,
    /// Logits.
    pub logits: usize,
}

impl Cuda {
    /// What [`Cuda::new`] will take.
    pub fn step_bytes(widths: &Widths, limits: &Limits, element: Element, driver: &dyn Driver) -> StepBytes {
        let step = Step::capacity_bytes(limits.rows, limits.sequences, limits.blocks);
        StepBytes {
            arena: arena_bytes(widths, limits, element, driver),
            inputs: STEP_BUFFERS * step + Context::COUNTERS * 4,
            logits: logits_bytes(widths, limits) + driver.red_zone_bytes() + 256,
        }
    }

    /// Takes the memory of steps within `limits` of a model of these widths.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        driver: Arc<dyn Driver>,
        variant: Variant,
        element: Element,
        widths: &Widths,
        limits: Limits,
    ) -> crate::Result<Self> {
        let bytes = Self::step_bytes(widths, &limits, element, &*driver);
        let arena = Arena::new(&driver, bytes.arena)?;
        let step_bytes = Step::capacity_bytes(limits.rows, limits.sequences, limits.blocks);
        let step_memory = (0..STEP_BUFFERS)
            .map(|_| Memory::new(&driver, step_bytes, "step inputs").map(Arc::new))
            .collect::<crate::Result<_>>()?;
        let outputs = Arena::new(&driver, bytes.logits)?;
        let range = outputs.take(logits_bytes(widths, &limits), "logits")?;
        let logits = Tensor::new(range, limits.logit_rows, widths.vocabulary, Element::F32);
        let ctx = Context::new(driver, arena, variant, element)?;
        Ok(Self { ctx, limits, step_memory, logits, prepared: Mutex::new(None), group: Group::single() })
    }

    /// As a rank of `group`, which it joins: on the rank's own thread, before anything else.
    ///
    /// # Errors
    /// Those of [`Group::join`].
    pub fn in_group(self, group: Group) -> crate::Result<Self> {
        group.join(&*self.ctx.driver)?;
        Ok(Self { group, ..self })
    }

    /// The rank's place in its group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Driver, arena and kernel choice.
    pub fn context(&self) -> &Context {
        &self.ctx
    }

    /// What a step may hold.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Uploads a step now, for the next [`Backend::begin_step`] with equal rows, which then uploads nothing: a recording
    /// holds launches only, and a replay takes its lengths from here.
    ///
    /// # Errors
    /// As [`Backend::begin_step`].
    pub fn prepare(&self, inputs: StepInputs, kv: &KvCache) -> Result<()> {
        *self.prepared_step() = None;
        let step = self.upload(inputs, kv)?;
        *self.prepared_step() = Some(step);
        Ok(())
    }

    /// Records what `forward` launches. Nothing of it runs.
    ///
    /// # Errors
    /// Those of `forward` and of the driver.
    pub fn record<R>(&self, forward: impl FnOnce() -> Result<R>) -> Result<(GraphId, R)> {
        let recorded = self.ctx.driver.begin_recording().map(|()| {
            let result = forward();
            (self.ctx.driver.end_recording(), result)
        });
        // Whatever comes of it, its step buffer is free again.
        *self.prepared_step() = None;
        match recorded? {
            (Ok(graph), Ok(result)) => Ok((graph, result)),
            (Ok(graph), Err(error)) => {
                self.ctx.driver.drop_graph(graph);
                Err(error)
            }
            (Err(error), result) => Err(result.err().unwrap_or(error.into())),
        }
    }

    /// Gives a recording back.
    pub fn drop_graph(&self, graph: GraphId) {
        self.ctx.driver.drop_graph(graph);
    }

    /// Whether every rank of the group says yes. All must ask.
    ///
    /// # Errors
    /// A rank that failed.
    pub fn all_agree(&self, yes: bool) -> Result<bool> {
        let mut votes = [i32::from(yes)];
        self.group.collective().all_reduce(votes.as_mut_slice().into())?;
        Ok(votes[0] as usize == self.group.world_size())
    }

    /// Runs a recording on the step that was last prepared.
    ///
    /// # Errors
    /// The driver's.
    pub fn replay(&self, graph: GraphId) -> Result<()> {
        *self.prepared_step() = None;
        Ok(self.ctx.driver.replay(graph)?)
    }

    /// The first `rows` rows of the last step's logits.
    pub fn last_logits(&self, rows: usize) -> Tensor {
        self.logits.first_rows(rows)
    }

    fn prepared_step(&self) -> MutexGuard<'_, Option<Step>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn upload(&self, inputs: StepInputs, kv: &KvCache) -> Result<Step> {
        self.check(&inputs, kv)?;
        // The first free buffer: equal sequences of steps get equal addresses.
        let free = self.step_memory.iter().find(|memory| Arc::strong_count(memory) == 1);
        let memory = free.ok_or_else(|| Error::Step("more than two steps are alive at once".into()))?;
        Ok(Step::upload(&self.ctx.driver, memory.clone(), inputs)?)
    }

    /// Whether a step can run, before anything of it does.
    ///
    /// # Errors
    /// [`Error::Step`]: it contradicts itself or the pool, or is larger than [`Cuda::limits`].
    pub fn check(&self, inputs: &StepInputs, kv: &KvCache) -> Result<()> {
        inputs.check(kv.layout())?;
        let blocks: usize = inputs.sequences.iter().map(|s| s.block_table.len()).sum();
        let holds = Limits {
            rows: inputs.rows(),
            sequences: inputs.sequences.len(),
            blocks,
            logit_rows: inputs.logit_rows.len(),
        };
        match self.limits.exceeded_by(&holds) {
            Some(excess) => Err(Error::Step(excess)),
            None => Ok(()),
        }
    }
}

impl Backend for Cuda {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Vector = Vector;
    type Experts = Experts;
    type Rope = Rope;
    type KvCache = KvCache;
    type Step = Step;

    fn matrix(&self, parts: Vec<HostTensor<'_>>) -> Result<Matrix> {
        Ok(Matrix::new(&self.ctx.driver, &parts, self.ctx.element)?)
    }

    fn vector(&self, parts: Vec<HostTensor<'_>>) -> Result<Vector> {
        Ok(Vector::new(&self.ctx.driver, &parts)?)
    }

    fn experts<'a>(
        &self,
        count: usize,
        load: &mut dyn FnMut(usize) -> Result<ExpertWeights<'a>>,
    ) -> Result<Experts> {
        let mut experts: Option<Experts> = None;
        for index in 0..count {
            let expert = load(index)?;
            let (intermediate, hidden) = expert.gate.matrix_dims()?;
            let driver = &self.ctx.driver;
            let all = match &mut experts {
                Some(all) => all,
                none => none.insert(Experts::new(driver, count, intermediate, hidden, self.ctx.element)?),
            };
            all.set(driver, index, &expert.gate, &expert.up, &expert.down)?;
        }
        match experts {
            Some(experts) => Ok(experts),
            None => Ok(Experts::new(&self.ctx.driver, 0, 0, 0, self.ctx.element)?),
        }
    }

    fn rope(&self, tables: RopeTables) -> Result<Rope> {
        Ok(Rope::new(&self.ctx.driver, tables)?)
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<KvCache> {
        Ok(KvCache::new(&self.ctx.driver, layout)?)
    }

    fn copy_blocks(&self, kv: &mut KvCache, pairs: &[(u32, u32)]) -> Result<()> {
        ops::kv::copy_blocks(&self.ctx, kv, pairs)
    }

    fn read_blocks(&self, kv: &KvCache, blocks: &[u32]) -> Result<Vec<u8>> {
        ops::kv::read_blocks(&self.ctx, kv, blocks)
    }

    fn write_blocks(&self, kv: &mut KvCache, blocks: &[u32], bytes: &[u8]) -> Result<()> {
        ops::kv::write_blocks(&self.ctx, kv, blocks, bytes)
    }

    fn begin_step(&self, inputs: StepInputs, kv: &KvCache) -> Result<Step> {
        if let Some(step) = &*self.prepared_step()
            && *step.inputs == inputs
        {
            return Ok(step.clone());
        }
        self.upload(inputs, kv)
    }

    fn embed(&self, table: &Matrix, first_id: usize, vocab_size: usize, step: &Step) -> Result<Tensor> {
        Ok(embedding::embed_slice(&self.ctx, table, first_id, vocab_size, step)?)
    }

    fn add_rms_norm(
        &self,
        x: Tensor,
        residual: Option<Tensor>,
        weight: &Vector,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        Ok(norm::add_rms_norm(&self.ctx, &x, residual.as_ref(), weight, eps)?)
    }

    fn linear(&self, x: &Tensor, linear: &Linear<Self>) -> Result<Tensor> {
        Ok(gemm::linear(&self.ctx, x, &linear.weight, linear.bias.as_ref(), self.ctx.element)?)
    }

    fn linear_to_residual(&self, x: &Tensor, linear: &Linear<Self>) -> Result<Tensor> {
        Ok(gemm::linear(&self.ctx, x, &linear.weight, linear.bias.as_ref(), Element::F32)?)
    }

    fn rope_and_cache(
        &self,
        qkv: Tensor,
        bias: Option<&Vector>,
        rope: &Rope,
        step: &Step,
        kv: &mut KvCache,
        layer: usize,
    ) -> Result<Tensor> {
        Ok(rope::rope_and_cache(&self.ctx, &qkv, bias, rope, step, kv, layer)?)
    }

    fn attention(&self, q: &Tensor, rope: &Rope, step: &Step, kv: &KvCache, layer: usize) -> Result<Tensor> {
        Ok(attention::attention(&self.ctx, q, rope, step, kv, layer)?)
    }

    fn linear_silu_and_mul(&self, x: &Tensor, gate_up: &Matrix) -> Result<Tensor> {
        Ok(gemm::linear_silu_and_mul(&self.ctx, x, gate_up)?)
    }

    fn moe(&self, x: &Tensor, weights: &MoeWeights<Self>) -> Result<Tensor> {
        let ctx = &self.ctx;
        let (routing, routed) = if weights.experts.is_empty() {
            (moe::Routing::none(ctx, x.rows)?, ctx.tensor("moe", 0, x.cols, Element::F32)?)
        } else {
            let scores = gemm::linear(ctx, x, &weights.router, None, Element::F32)?;
            let ours = weights.first_expert..weights.first_expert + weights.experts.count;
            let routing = moe::route_to(ctx, &scores, weights.top_k, weights.norm_topk_prob, ours)?;
            let routed = moe::experts(ctx, x, &routing, &weights.experts)?;
            (routing, routed)
        };
        let shared = match &weights.shared {
            Some(shared) => {
                let gated = gemm::linear_silu_and_mul(ctx, x, &shared.gate_up)?;
                let out = gemm::linear(ctx, &gated, &shared.down, None, Element::F32)?;
                Some((out, gemm::linear(ctx, x, &shared.gate, None, Element::F32)?))
            }
            None => None,
        };
        Ok(moe::combine(ctx, &routed, &routing, shared.as_ref().map(|(out, gate)| (out, gate)))?)
    }

    fn logits(&self, x: &Tensor, weight: &Matrix) -> Result<Tensor> {
        if x.rows > self.logits.rows || weight.rows != self.logits.cols {
            return Err(Error::shape(
                "logits",
                format!(
                    "{} rows of {} logits for a buffer of [{}, {}]",
                    x.rows, weight.rows, self.logits.rows, self.logits.cols
                ),
            ));
        }
        let out = self.logits.first_rows(x.rows);
        gemm::linear_into(&self.ctx, x, weight, None, &out)?;
        Ok(out)
    }

    fn all_reduce(&self, x: Tensor) -> Result<Tensor> {
        Ok(self.group.all_reduce(&self.ctx, x)?)
    }

    fn all_reduce_add_rms_norm(
        &self,
        x: Tensor,
        residual: Option<Tensor>,
        weight: &Vector,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        Ok(self.group.all_reduce_add_rms_norm(&self.ctx, x, residual.as_ref(), weight, eps)?)
    }

    fn all_gather(&self, x: Tensor, shares: &[usize]) -> Result<Tensor> {
        Ok(self.group.all_gather(&self.ctx, x, shares)?)
    }

    fn logit_rows(&self, x: &Tensor, step: &Step) -> Result<Tensor> {
        Ok(embedding::gather_logit_rows(&self.ctx, x, step)?)
    }

    fn stack_rows(&self, parts: &[Tensor]) -> Result<Tensor> {
        Ok(embedding::stack_rows(&self.ctx, parts)?)
    }

    fn to_host(&self, x: &Tensor) -> Result<Vec<f32>> {
        let values = self.ctx.tensor_to_f32(x);
        // What a group gave up on is wrong, and says why.
        self.group.check(&self.ctx)?;
        Ok(values?)
    }

    fn sample(&self, logits: &Tensor, shares: &[usize], rows: &[SamplingRow<'_>]) -> Result<Vec<Draw>> {
        let rank = self.group.rank();
        if shares.len() != self.group.world_size() || shares.get(rank) != Some(&logits.cols) {
            let detail = format!("{} columns on rank {rank} for shares {shares:?}", logits.cols);
            return Err(Error::shape("sample", detail));
        }
        let sampled = if shares.len() == 1 {
            sampling::sample(&self.ctx, logits, rows)
        } else {
            let first_id = shares.iter().take(rank).sum();
            sampling_slice::Slice::new(&self.ctx, logits, first_id, rows).and_then(|mut slice| {
                sample_slices(&**self.group.collective(), &mut slice, shares.iter().sum(), rows)
            })
        };
        self.group.check(&self.ctx)?;
        sampled
    }
}

fn logits_bytes(widths: &Widths, limits: &Limits) -> usize {
    limits.logit_rows * padded_cols(widths.vocabulary, Element::F32) * 4
}

/// What the device is and how it computes, for reports.
pub fn describe(ctx: &Context) -> String {
    let precision = match ctx.element {
        Element::F32 => "float32",
        _ => "bfloat16",
    };
    let variant = match ctx.variant {
        Variant::Auto => "",
        Variant::Plain => ", plain kernels",
        Variant::Mma => ", mma kernels",
    };
    let properties = ctx.driver.properties();
    let capability = properties.compute_capability;
    format!("{}, sm_{capability}, {precision}{variant}", properties.name)
}

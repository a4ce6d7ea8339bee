use crate::{Draw, HostTensor, KvLayout, Pending, Result, RopeTables, SamplingRow, StepInputs};

/// A linear layer: `y = x · weightᵀ + bias`.
#[derive(Debug)]
pub struct Linear<B: Backend + ?Sized> {
    /// `[out, in]` in the backend's packing.
    pub weight: B::Matrix,
    /// `[out]`.
    pub bias: Option<B::Vector>,
}

/// The shared expert of a mixture-of-experts layer.
#[derive(Debug)]
pub struct SharedExpert<B: Backend + ?Sized> {
    /// `[2 * intermediate, hidden]`: gate rows, then up rows.
    pub gate_up: B::Matrix,
    /// `[hidden, intermediate]`.
    pub down: B::Matrix,
    /// `[1, hidden]`: its sigmoid weighs the expert's output.
    pub gate: B::Matrix,
}

/// Weights and routing of a mixture-of-experts layer (the published implementation of `Qwen2MoeForCausalLM`).
#[derive(Debug)]
pub struct MoeWeights<B: Backend + ?Sized> {
    /// `[experts, hidden]`.
    pub router: B::Matrix,
    /// The experts of this rank, all of them without expert parallelism. May be none.
    pub experts: B::Experts,
    /// The first of them; the router's rows count all experts.
    pub first_expert: usize,
    /// Experts a token visits.
    pub top_k: usize,
    /// Whether the chosen weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// The expert every token visits.
    pub shared: Option<SharedExpert<B>>,
}

/// One expert on its way to the device.
#[derive(Debug)]
pub struct ExpertWeights<'a> {
    /// gate `[intermediate, hidden]`.
    pub gate: HostTensor<'a>,
    /// up `[intermediate, hidden]`.
    pub up: HostTensor<'a>,
    /// down `[hidden, intermediate]`.
    pub down: HostTensor<'a>,
}

/// What the forward pass needs from a device. The law of this crate (`docs/architecture.md`).
///
/// Tensors are row-major `[rows, cols]` activations of the current step. Weights live as long as the model. All ops of a
/// step run in call order; a device may queue them and return early.
///
/// A rank of a tensor-parallel group may hold nothing of a matrix or no heads: widths of 0 are in order everywhere, and a
/// product over 0 inputs is zero (plus the bias).
pub trait Backend {
    /// An activation of the current step.
    type Tensor;
    /// A weight matrix `[out, in]` in the device's packing. Cloning shares it.
    type Matrix: Clone;
    /// A weight vector.
    type Vector;
    /// All experts of one layer.
    type Experts;
    /// Rotation tables on the device.
    type Rope;
    /// Paged K and V of all layers.
    type KvCache;
    /// The inputs of one step on the device.
    type Step;

    /// Moves a matrix to the device; `parts` are stacked by rows (q, k, v; gate, up).
    ///
    /// # Errors
    /// Parts of different widths, an unsupported dtype, or no memory.
    fn matrix(&self, parts: Vec<HostTensor<'_>>) -> Result<Self::Matrix>;

    /// Moves a vector to the device; `parts` are concatenated.
    ///
    /// # Errors
    /// As [`Backend::matrix`].
    fn vector(&self, parts: Vec<HostTensor<'_>>) -> Result<Self::Vector>;

    /// Moves `count` experts to the device, asking `load` for one at a time.
    ///
    /// # Errors
    /// Those of `load`, and as [`Backend::matrix`].
    fn experts<'a>(
        &self,
        count: usize,
        load: &mut dyn FnMut(usize) -> Result<ExpertWeights<'a>>,
    ) -> Result<Self::Experts>;

    /// Moves the rotation tables to the device.
    ///
    /// # Errors
    /// No memory.
    fn rope(&self, tables: RopeTables) -> Result<Self::Rope>;

    /// Takes the memory of the KV pool.
    ///
    /// # Errors
    /// No memory, or an unsupported dtype.
    fn kv_cache(&self, layout: KvLayout) -> Result<Self::KvCache>;

    /// Copies the K and V of all layers from the first to the second block of each pair (copy on write of a sequence that
    /// forks).
    ///
    /// # Errors
    /// [`crate::Error::Blocks`] as [`KvLayout::check_copies`]; the device's.
    fn copy_blocks(&self, kv: &mut Self::KvCache, pairs: &[(u32, u32)]) -> Result<()>;

    /// The contents of `blocks` in the host's memory (swap out). Opaque: for [`Backend::write_blocks`] on a pool of the same
    /// device, layout and dtype; the number of blocks may differ.
    ///
    /// # Errors
    /// [`crate::Error::Blocks`] for a block outside the pool; the device's.
    fn read_blocks(&self, kv: &Self::KvCache, blocks: &[u32]) -> Result<Vec<u8>>;

    /// Writes what [`Backend::read_blocks`] returned to as many `blocks` (swap in).
    ///
    /// # Errors
    /// [`crate::Error::Blocks`] as [`KvLayout::check_writes`]; the device's.
    fn write_blocks(&self, kv: &mut Self::KvCache, blocks: &[u32], bytes: &[u8]) -> Result<()>;

    /// Starts a step: checks the plan against the pool and hands its integers to the device.
    ///
    /// # Errors
    /// An inconsistent plan ([`StepInputs::check`]).
    fn begin_step(&self, inputs: StepInputs, kv: &Self::KvCache) -> Result<Self::Step>;

    /// Rows of `table` for the step's ids: `[rows, hidden]`. The table holds the rows of the vocabulary (`vocab_size` ids)
    /// from `first_id` on; ids of other ranks' rows give zeros, so that the sum over the ranks is the embedding.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    fn embed(
        &self,
        table: &Self::Matrix,
        first_id: usize,
        vocab_size: usize,
        step: &Self::Step,
    ) -> Result<Self::Tensor>;

    /// `residual += x` (or `= x` when there is none yet), `normed = residual / rms(residual) * weight`.
    /// Returns `(normed, residual)`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn add_rms_norm(
        &self,
        x: Self::Tensor,
        residual: Option<Self::Tensor>,
        weight: &Self::Vector,
        eps: f32,
    ) -> Result<(Self::Tensor, Self::Tensor)>;

    /// `x · weightᵀ + bias`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn linear(&self, x: &Self::Tensor, linear: &Linear<Self>) -> Result<Self::Tensor>;

    /// As [`Backend::linear`] for a result that [`Backend::add_rms_norm`] adds to the residual stream: in f32, whatever the
    /// precision of activations, since what is rounded here is felt by every later layer.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn linear_to_residual(&self, x: &Self::Tensor, linear: &Linear<Self>) -> Result<Self::Tensor> {
        self.linear(x, linear)
    }

    /// Adds `bias` to `qkv` (`[rows, (query_heads + 2 * kv_heads) * head_dim]`) and splits it, rotates k at its cache
    /// position, writes k and v to their blocks and returns the **unrotated** q `[rows, query_heads * head_dim]`: its
    /// rotation depends on the key.
    ///
    /// # Errors
    /// Shapes that do not fit, a position beyond the tables.
    fn rope_and_cache(
        &self,
        qkv: Self::Tensor,
        bias: Option<&Self::Vector>,
        rope: &Self::Rope,
        step: &Self::Step,
        kv: &mut Self::KvCache,
        layer: usize,
    ) -> Result<Self::Tensor>;

    /// Causal attention over the paged cache for all rows of the step: GQA, plain or dual-chunk positions, prefill and
    /// decode rows mixed, logits times the row's scale, one softmax. `[rows, query_heads * head_dim]`.
    ///
    /// # Errors
    /// Shapes that do not fit, a position beyond the tables.
    fn attention(
        &self,
        q: &Self::Tensor,
        rope: &Self::Rope,
        step: &Self::Step,
        kv: &Self::KvCache,
        layer: usize,
    ) -> Result<Self::Tensor>;

    /// The gated half of a dense MLP: `silu(x · gateᵀ) * (x · upᵀ)` for `gate_up` = gate rows stacked on up rows
    /// (`[2 * n, hidden]`): `[rows, n]`. One op, since the `[rows, 2 * n]` in between is the widest tensor of a layer.
    ///
    /// # Errors
    /// Shapes that do not fit, an odd number of rows of `gate_up`.
    fn linear_silu_and_mul(&self, x: &Self::Tensor, gate_up: &Self::Matrix) -> Result<Self::Tensor>;

    /// The mixture-of-experts block: router, chosen experts, shared expert.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn moe(&self, x: &Self::Tensor, weights: &MoeWeights<Self>) -> Result<Self::Tensor>;

    /// `x · weightᵀ` with the output embedding: logits in f32, whatever the precision of activations.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn logits(&self, x: &Self::Tensor, weight: &Self::Matrix) -> Result<Self::Tensor>;

    /// Sum over the ranks of the tensor-parallel group; the identity on one rank.
    ///
    /// # Errors
    /// A rank that failed.
    fn all_reduce(&self, x: Self::Tensor) -> Result<Self::Tensor>;

    /// [`Backend::add_rms_norm`] of the sum of `x` over the ranks: [`Backend::all_reduce`], then the norm, unless the device
    /// does both at once.
    ///
    /// # Errors
    /// Those of both.
    fn all_reduce_add_rms_norm(
        &self,
        x: Self::Tensor,
        residual: Option<Self::Tensor>,
        weight: &Self::Vector,
        eps: f32,
    ) -> Result<(Self::Tensor, Self::Tensor)> {
        self.add_rms_norm(self.all_reduce(x)?, residual, weight, eps)
    }

    /// Starts [`Backend::all_reduce`], so that other ops run meanwhile. Until [`Pending::finish`] has given the sum, no
    /// operation among the ranks may follow but more starts, which are summed in their order. A device that cannot do
    /// both at once takes the sum here.
    ///
    /// # Errors
    /// A rank that failed.
    fn start_all_reduce(&self, x: Self::Tensor) -> Result<Pending<Self::Tensor>> {
        Ok(Pending::ready(self.all_reduce(x)?))
    }

    /// Every rank's `x` (`[rows, shares[rank]]`) side by side: `[rows, sum of shares]`; the identity on one rank.
    ///
    /// # Errors
    /// A rank that failed, shapes that do not fit.
    fn all_gather(&self, x: Self::Tensor, shares: &[usize]) -> Result<Self::Tensor>;

    /// The rows whose logits the step wants: `[logit_rows, cols]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn logit_rows(&self, x: &Self::Tensor, step: &Self::Step) -> Result<Self::Tensor>;

    /// `parts`, which are equally wide, one below the other.
    ///
    /// # Errors
    /// Parts of different widths, or none.
    fn stack_rows(&self, parts: &[Self::Tensor]) -> Result<Self::Tensor>;

    /// Copies an activation to the host, row-major.
    ///
    /// # Errors
    /// The device's.
    fn to_host(&self, x: &Self::Tensor) -> Result<Vec<f32>>;

    /// Draws one token per row of logits that lie in slices of the vocabulary: `logits` is this rank's
    /// (`[rows, shares[rank]]`). The rows are equal on all ranks, and so are the tokens; the logits stay where they are
    /// ([`crate::sample_slices`]).
    ///
    /// # Errors
    /// On all ranks alike: those of [`SamplingRow::check`]. A rank that failed, shapes that do not fit. A row that draws
    /// nothing fails alone ([`crate::RowError`]).
    fn sample(&self, logits: &Self::Tensor, shares: &[usize], rows: &[SamplingRow<'_>]) -> Result<Vec<Draw>>;
}

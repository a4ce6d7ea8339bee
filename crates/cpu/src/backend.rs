use std::sync::Arc;

use candle_core::Tensor;
use longhaul_backend::{
    Backend, Collective, Draw, Error, ExpertWeights, HostTensor, KvLayout, Linear, MoeWeights, Pending,
    Result, RopeTables, SamplingRow, Single, StepInputs, sample_slices,
};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::attention::attention;
use crate::elementwise::add_rms_norm;
use crate::exchanger::Exchanger;
use crate::kv::KvCache;
use crate::linear::{Gemm, Precision};
use crate::matrix::Matrix;
use crate::moe::{Expert, moe};
use crate::sampling::Slice;
use crate::simd::UnknownIsa;
use crate::tensor::{dims, from_rows, with_values};

/// The CPU as a device: an instruction set, a precision of the matrix products, and a pool of threads.
pub struct Cpu {
    gemm: Gemm,
    pool: ThreadPool,
    group: Arc<dyn Collective>,
    exchanger: Option<Exchanger>,
}

/// The CPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The environment asks for an instruction set this CPU lacks.
    #[error(transparent)]
    Isa(#[from] UnknownIsa),
    /// Threads could not be started.
    #[error("cannot start {threads} threads: {message}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// What the system says.
        message: String,
    },
}

impl Cpu {
    /// A CPU device with `threads` threads (0 = all cores).
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn new(threads: usize, precision: Precision) -> std::result::Result<Self, CpuError> {
        let gemm = Gemm::new(precision)?;
        keep_freed_memory();
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("longhaul-cpu-{i}"))
            .build()
            .map_err(|e| CpuError::Threads { threads, message: e.to_string() })?;
        Ok(Self { gemm, pool, group: Arc::new(Single), exchanger: None })
    }

    /// The same device as a rank of a tensor-parallel group.
    #[must_use]
    pub fn in_group(self, group: Arc<dyn Collective>) -> Self {
        Self { group, exchanger: None, ..self }
    }

    /// The same rank with a thread of its own for [`Backend::start_all_reduce`].
    ///
    /// # Errors
    /// [`CpuError::Threads`].
    pub fn with_exchanger(mut self) -> std::result::Result<Self, CpuError> {
        let exchanger = Exchanger::start_thread(self.group.clone());
        let failed = |e: std::io::Error| CpuError::Threads { threads: 1, message: e.to_string() };
        self.exchanger = Some(exchanger.map_err(failed)?);
        Ok(self)
    }

    /// Threads of the pool.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// What the kernels run on, for reports: instruction set and precision.
    pub fn description(&self) -> String {
        let precision = match self.gemm.precision {
            Precision::F32 => "float32",
            Precision::Bf16 => "bfloat16",
        };
        format!("cpu, {} threads, {}, {precision} products", self.threads(), self.gemm.isa)
    }

    /// Runs `f` inside the pool, so that a step's ops do not hop threads one by one.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }
}

/// Lets glibc keep the memory of a step's temporaries for the next op.
///
/// By default it returns freed memory beyond 128 KiB to the system, and zeroing the same pages again for every op took 12 %
/// of a prefill. The threshold is dynamic: it follows the largest mapped block that is freed, up to 32 MiB, so freeing one
/// such block is enough. Other allocators are not harmed.
fn keep_freed_memory() {
    const BYTES: usize = (32 << 20) - (64 << 10);
    drop(std::hint::black_box(Vec::<u8>::with_capacity(BYTES)));
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Experts = Vec<Expert>;
    type Rope = RopeTables;
    type KvCache = KvCache;
    type Step = StepInputs;

    fn matrix(&self, parts: Vec<HostTensor<'_>>) -> Result<Matrix> {
        self.pool.install(|| Matrix::pack(&parts))
    }

    fn vector(&self, parts: Vec<HostTensor<'_>>) -> Result<Vec<f32>> {
        Ok(parts.iter().flat_map(HostTensor::to_f32).collect())
    }

    fn experts<'a>(
        &self,
        count: usize,
        load: &mut dyn FnMut(usize) -> Result<ExpertWeights<'a>>,
    ) -> Result<Vec<Expert>> {
        (0..count)
            .map(|index| {
                let expert = load(index)?;
                Ok(Expert {
                    gate_up: self.matrix(vec![expert.gate, expert.up])?,
                    down: self.matrix(vec![expert.down])?,
                })
            })
            .collect()
    }

    fn rope(&self, tables: RopeTables) -> Result<RopeTables> {
        Ok(tables)
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<KvCache> {
        KvCache::new(layout)
    }

    fn copy_blocks(&self, kv: &mut KvCache, pairs: &[(u32, u32)]) -> Result<()> {
        kv.copy_blocks(pairs)
    }

    fn read_blocks(&self, kv: &KvCache, blocks: &[u32]) -> Result<Vec<u8>> {
        kv.read_blocks(blocks)
    }

    fn write_blocks(&self, kv: &mut KvCache, blocks: &[u32], bytes: &[u8]) -> Result<()> {
        kv.write_blocks(blocks, bytes)
    }

    fn begin_step(&self, inputs: StepInputs, kv: &KvCache) -> Result<StepInputs> {
        inputs.check(kv.layout())?;
        Ok(inputs)
    }

    fn embed(&self, table: &Matrix, first_id: usize, vocab_size: usize, step: &StepInputs) -> Result<Tensor> {
        let cols = table.cols();
        let mut out = vec![0.0; step.rows() * cols];
        for (id, row) in step.ids.iter().zip(out.chunks_exact_mut(cols)) {
            let id = *id as usize;
            if id >= vocab_size {
                return Err(Error::Step(format!(
                    "token id {id} is outside the embedding of {vocab_size} rows"
                )));
            }
            if (first_id..first_id + table.rows()).contains(&id) {
                table.row_f32(id - first_id, row)?;
            }
        }
        from_rows("embed", out, step.rows())
    }

    fn add_rms_norm(
        &self,
        x: Tensor,
        residual: Option<Tensor>,
        weight: &Vec<f32>,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        const OP: &str = "add_rms_norm";
        let (rows, _) = dims(OP, &x)?;
        let norm = |x: &[f32], residual: Option<&[f32]>| {
            self.pool.install(|| add_rms_norm(self.gemm.isa, x, residual, weight, eps))
        };
        let (normed, sum) = with_values(OP, &x, |x| match &residual {
            None => norm(x, None),
            Some(residual) => with_values(OP, residual, |residual| norm(x, Some(residual))),
        })?;
        Ok((from_rows(OP, normed, rows)?, from_rows(OP, sum, rows)?))
    }

    fn linear(&self, x: &Tensor, linear: &Linear<Self>) -> Result<Tensor> {
        let (rows, _) = dims("linear", x)?;
        let bias = linear.bias.as_deref();
        let out = with_values("linear", x, |x| {
            self.pool.install(|| self.gemm.linear_vec(x, rows, &linear.weight, bias))
        })?;
        from_rows("linear", out, rows)
    }

    fn rope_and_cache(
        &self,
        qkv: Tensor,
        bias: Option<&Vec<f32>>,
        rope: &RopeTables,
        step: &StepInputs,
        kv: &mut KvCache,
        layer: usize,
    ) -> Result<Tensor> {
        const OP: &str = "rope_and_cache";
        let layout = *kv.layout();
        let (rows, cols) = dims(OP, &qkv)?;
        let (q_size, kv_size) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let bias_fits = bias.is_none_or(|bias| bias.len() == cols);
        if cols != q_size + 2 * kv_size || rows != step.rows() || !bias_fits {
            return Err(Error::shape(
                OP,
                format!(
                    "qkv [{rows}, {cols}], bias {:?} for {layout:?}, {} rows",
                    bias.map(Vec::len),
                    step.rows()
                ),
            ));
        }
        if cols == 0 {
            return from_rows(OP, Vec::new(), rows);
        }
        let mut q = Vec::with_capacity(rows * q_size);
        with_values(OP, &qkv, |qkv| {
            let mut lines = qkv.chunks_exact(cols);
            let mut biased = vec![0.0; cols];
            let mut rotated = vec![0.0; layout.head_dim];
            let half = layout.head_dim / 2;
            for sequence in &step.sequences {
                for (position, line) in (sequence.first_position()..sequence.kv_len).zip(&mut lines) {
                    let key_row = rope.key_row(position as u32);
                    let (cos, sin) = rope.row(key_row).ok_or_else(|| {
                        Error::Step(format!(
                            "position {position} is beyond the {} rows of the rotation tables",
                            rope.rows
                        ))
                    })?;
                    let block = sequence.block_table[position / layout.block_size] as usize;
                    let slot = position % layout.block_size;
                    biased.copy_from_slice(line);
                    if let Some(bias) = bias {
                        biased.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
                    }
                    let (line_q, line_kv) = biased.split_at(q_size);
                    q.extend_from_slice(line_q);
                    let (keys, values) = line_kv.split_at(kv_size);
                    let heads = keys.chunks_exact(layout.head_dim).zip(values.chunks_exact(layout.head_dim));
                    for (head, (key, value)) in heads.enumerate() {
                        for d in 0..half {
                            rotated[d] = key[d] * cos[d] - key[d + half] * sin[d];
                            rotated[d + half] = key[d + half] * cos[d] + key[d] * sin[d];
                        }
                        kv.write(layer, (block, slot), head, &rotated, value)?;
                    }
                }
            }
            Ok(())
        })?;
        from_rows(OP, q, rows)
    }

    fn attention(
        &self,
        q: &Tensor,
        rope: &RopeTables,
        step: &StepInputs,
        kv: &KvCache,
        layer: usize,
    ) -> Result<Tensor> {
        let out = with_values("attention", q, |q| {
            self.pool.install(|| attention(self.gemm.isa, q, step, rope, kv, layer))
        })?;
        from_rows("attention", out, step.rows())
    }

    fn linear_silu_and_mul(&self, x: &Tensor, gate_up: &Matrix) -> Result<Tensor> {
        const OP: &str = "linear_silu_and_mul";
        let (rows, _) = dims(OP, x)?;
        let out =
            with_values(OP, x, |x| self.pool.install(|| self.gemm.linear_silu_mul_vec(x, rows, gate_up)))?;
        from_rows(OP, out, rows)
    }

    fn moe(&self, x: &Tensor, weights: &MoeWeights<Self>) -> Result<Tensor> {
        let (rows, _) = dims("moe", x)?;
        let out = with_values("moe", x, |x| self.pool.install(|| moe(self.gemm, x, rows, weights)))?;
        from_rows("moe", out, rows)
    }

    fn logits(&self, x: &Tensor, weight: &Matrix) -> Result<Tensor> {
        let (rows, _) = dims("logits", x)?;
        let out =
            with_values("logits", x, |x| self.pool.install(|| self.gemm.linear_vec(x, rows, weight, None)))?;
        from_rows("logits", out, rows)
    }

    fn all_reduce(&self, x: Tensor) -> Result<Tensor> {
        if self.group.world_size() == 1 {
            return Ok(x);
        }
        let (rows, _) = dims("all_reduce", &x)?;
        let mut values = with_values("all_reduce", &x, |x| Ok(x.to_vec()))?;
        self.group.all_reduce(values.as_mut_slice().into())?;
        from_rows("all_reduce", values, rows)
    }

    fn start_all_reduce(&self, x: Tensor) -> Result<Pending<Tensor>> {
        const OP: &str = "all_reduce";
        let Some(exchanger) = &self.exchanger else {
            return Ok(Pending::ready(self.all_reduce(x)?));
        };
        let (rows, _) = dims(OP, &x)?;
        let sums = exchanger.start(with_values(OP, &x, |x| Ok(x.to_vec()))?)?;
        Ok(Pending::started(move || from_rows(OP, sums.wait()?, rows)))
    }

    fn all_gather(&self, x: Tensor, shares: &[usize]) -> Result<Tensor> {
        const OP: &str = "all_gather";
        let (rows, cols) = dims(OP, &x)?;
        if shares.len() != self.group.world_size() || shares.get(self.group.rank()) != Some(&cols) {
            return Err(Error::shape(
                OP,
                format!("{cols} columns on rank {} for shares {shares:?}", self.group.rank()),
            ));
        }
        if shares.len() == 1 {
            return Ok(x);
        }
        let width: usize = shares.iter().sum();
        let counts: Vec<usize> = shares.iter().map(|share| rows * share).collect();
        let mut by_rank = vec![0.0f32; rows * width];
        with_values(OP, &x, |x| {
            Ok(self.group.all_gather(x.into(), &counts, by_rank.as_mut_slice().into())?)
        })?;
        let mut out = vec![0.0; rows * width];
        let (mut first_column, mut rest) = (0, by_rank.as_slice());
        for &share in shares.iter().filter(|share| **share > 0) {
            let (part, later) = rest.split_at(rows * share);
            for (row, values) in part.chunks_exact(share).enumerate() {
                out[row * width + first_column..][..share].copy_from_slice(values);
            }
            (first_column, rest) = (first_column + share, later);
        }
        from_rows(OP, out, rows)
    }

    fn logit_rows(&self, x: &Tensor, step: &StepInputs) -> Result<Tensor> {
        let (rows, cols) = dims("logit_rows", x)?;
        let out = with_values("logit_rows", x, |x| {
            let mut out = Vec::with_capacity(step.logit_rows.len() * cols);
            for &row in &step.logit_rows {
                let line = x.get(row * cols..(row + 1) * cols);
                out.extend_from_slice(
                    line.ok_or_else(|| Error::shape("logit_rows", format!("row {row} of {rows}")))?,
                );
            }
            Ok(out)
        })?;
        from_rows("logit_rows", out, step.logit_rows.len())
    }

    fn stack_rows(&self, parts: &[Tensor]) -> Result<Tensor> {
        const OP: &str = "stack_rows";
        let Some((_, cols)) = parts.first().map(|part| dims(OP, part)).transpose()? else {
            return Err(Error::shape(OP, "no parts"));
        };
        let (mut rows, mut out) = (0, Vec::new());
        for part in parts {
            let (part_rows, part_cols) = dims(OP, part)?;
            if part_cols != cols {
                return Err(Error::shape(OP, format!("parts of {cols} and of {part_cols} columns")));
            }
            rows += part_rows;
            with_values(OP, part, |values| {
                out.extend_from_slice(values);
                Ok(())
            })?;
        }
        from_rows(OP, out, rows)
    }

    fn to_host(&self, x: &Tensor) -> Result<Vec<f32>> {
        with_values("to_host", x, |x| Ok(x.to_vec()))
    }

    fn sample(&self, logits: &Tensor, shares: &[usize], rows: &[SamplingRow<'_>]) -> Result<Vec<Draw>> {
        const OP: &str = "sample";
        let (count, cols) = dims(OP, logits)?;
        let rank = self.group.rank();
        if count != rows.len() || shares.len() != self.group.world_size() || shares.get(rank) != Some(&cols) {
            let detail =
                format!("logits [{count}, {cols}] of rank {rank}, {} rows, shares {shares:?}", rows.len());
            return Err(Error::shape(OP, detail));
        }
        let first_id = shares.iter().take(rank).sum();
        let vocab = shares.iter().sum();
        with_values(OP, logits, |values| {
            let mut slice = Slice::new(values, first_id, cols, vocab, rows)?;
            sample_slices(self.group.as_ref(), &mut slice, vocab, rows)
        })
    }
}

//! The shapes that are measured, with what each must read, write and compute.

use longhaul_backend::{
    Chunking, DType, HeadGroups, KvLayout, RopeTables, SamplingRow, SequenceInputs, StepInputs,
};
use longhaul_cuda::driver::Element;
use longhaul_cuda::ops::{activation, attention, embedding, gemm, moe, norm, rope, sampling};
use longhaul_cuda::{Context, CudaError, Result};
use longhaul_model::{ModelSpec, family, family_names};

use super::operands::Operands;

/// Runs an op once on operand set `index` (modulo the sets there are).
pub(super) type Run = Box<dyn Fn(&Context, usize) -> Result<()>>;

/// Takes the operands of a case.
type Prepare = Box<dyn Fn(&Operands) -> Result<Run>>;

/// One op at one shape.
pub struct Case {
    /// The op.
    pub op: &'static str,
    /// Family member.
    pub model: &'static str,
    /// The shape in words.
    pub shape: String,
    /// Bytes that must be read and written at least.
    pub bytes: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// Whether the op can be recorded (no copies to or from the host inside).
    pub(super) recordable: bool,
    /// Takes the operands.
    pub(super) prepare: Prepare,
}

const BF16: Element = Element::Bf16;
/// Rows of decode batches.
const BATCHES: [usize; 6] = [1, 4, 8, 16, 32, 64];
/// Rows of a prefill step.
const PREFILL: usize = 2048;
/// Sets of small operands (activations): enough that a launch does not find its own output in the cache.
const ROTATED_ROWS: usize = 8;

/// Every case, model by model.
pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for name in family_names() {
        let Some(member) = family(name) else { continue };
        let spec = &member.spec;
        elementwise(&mut all, member.name, spec);
        products(&mut all, member.name, spec);
        attention_cases(&mut all, member.name, spec);
        experts(&mut all, member.name, spec);
        sampling_cases(&mut all, member.name, spec);
    }
    all
}

fn elementwise(all: &mut Vec<Case>, model: &'static str, spec: &ModelSpec) {
    let h = spec.hidden_size;
    for rows in [1, 64, PREFILL] {
        all.push(Case {
            op: "add_rms_norm",
            model,
            shape: format!("{rows} x {h}"),
            bytes: (rows * h * (2 + 4 + 4 + 2) + 4 * h) as u64,
            flops: (5 * rows * h) as u64,
            recordable: true,
            prepare: Box::new(move |o| {
                let x = o.tensors(ROTATED_ROWS, rows, h, BF16)?;
                let residual = o.tensors(ROTATED_ROWS, rows, h, Element::F32)?;
                let weight = o.vector(h)?;
                Ok(Box::new(move |ctx, i| {
                    let i = i % ROTATED_ROWS;
                    norm::add_rms_norm(ctx, &x[i], Some(&residual[i]), &weight, 1e-6).map(drop)
                }))
            }),
        });
    }
    let (layout, vocab) = (layout(spec, 1, PREFILL), spec.vocab_size);
    let qkv = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim;
    for rows in [1, 64, PREFILL] {
        let step = move || decode_or_prefill(rows, rows.max(64), layout.block_size);
        all.push(Case {
            op: "embed",
            model,
            shape: format!("{rows} x {h}"),
            bytes: (rows * h * 4) as u64,
            flops: 0,
            recordable: true,
            prepare: Box::new(move |o| {
                let table = o.matrices(vocab, h, 1)?;
                let step = o.step(StepInputs {
                    ids: (0..rows).map(|i| ((i * 7919) % vocab) as u32).collect(),
                    ..step()
                })?;
                Ok(Box::new(move |ctx, _| embedding::embed(ctx, &table[0], &step).map(drop)))
            }),
        });
        all.push(Case {
            op: "rope_and_cache",
            model,
            shape: format!("{rows} x {qkv}"),
            bytes: (rows * qkv * 4) as u64,
            flops: (3 * rows * spec.kv_heads * spec.head_dim) as u64,
            recordable: true,
            prepare: Box::new(move |o| {
                let x = o.tensors(ROTATED_ROWS, rows, qkv, BF16)?;
                let (bias, rope_tables) = (o.vector(qkv)?, o.rope(tables(layout.head_dim, PREFILL, None))?);
                let kv = o.kv(layout)?;
                let step = o.step(step())?;
                Ok(Box::new(move |ctx, i| {
                    let x = &x[i % ROTATED_ROWS];
                    rope::rope_and_cache(ctx, x, Some(&bias), &rope_tables, &step, &kv, 0).map(drop)
                }))
            }),
        });
    }
    let n = spec.moe.as_ref().map_or(spec.intermediate_size, |m| m.shared_intermediate_size);
    all.push(Case {
        op: "silu_and_mul",
        model,
        shape: format!("{PREFILL} x {n}"),
        bytes: (PREFILL * n * 6) as u64,
        flops: (4 * PREFILL * n) as u64,
        recordable: true,
        prepare: Box::new(move |o| {
            let x = o.tensors(2, PREFILL, 2 * n, BF16)?;
            Ok(Box::new(move |ctx, i| activation::silu_and_mul(ctx, &x[i % 2]).map(drop)))
        }),
    });
}

fn products(all: &mut Vec<Case>, model: &'static str, spec: &ModelSpec) {
    let h = spec.hidden_size;
    let query = spec.query_heads * spec.head_dim;
    let qkv = query + 2 * spec.kv_heads * spec.head_dim;
    let wide = spec.moe.as_ref().map_or(spec.intermediate_size, |m| m.shared_intermediate_size);
    let matrices =
        [("qkv", qkv, h), ("output", h, query), ("down", h, wide), ("lm_head", spec.vocab_size, h)];
    for (name, n, k) in matrices {
        let out = if name == "lm_head" { Element::F32 } else { BF16 };
        for rows in BATCHES.into_iter().chain((name != "lm_head").then_some(PREFILL)) {
            all.push(Case {
                op: "linear",
                model,
                shape: format!("{rows} x {k} -> {n} ({name})"),
                bytes: (2 * n * k + 2 * rows * k + out.size() * rows * n) as u64,
                flops: (2 * rows * n * k) as u64,
                recordable: true,
                prepare: Box::new(move |o| {
                    let weights = o.matrices(n, k, o.copies(2 * n * k))?;
                    let x = o.tensors(1, rows, k, BF16)?;
                    Ok(Box::new(move |ctx, i| {
                        gemm::linear(ctx, &x[0], &weights[i % weights.len()], None, out).map(drop)
                    }))
                }),
            });
        }
    }
    for rows in BATCHES.into_iter().chain([PREFILL]) {
        all.push(Case {
            op: "linear_silu_and_mul",
            model,
            shape: format!("{rows} x {h} -> 2 x {wide}"),
            bytes: (2 * 2 * wide * h + 2 * rows * (h + wide)) as u64,
            flops: (2 * 2 * rows * wide * h + 4 * rows * wide) as u64,
            recordable: true,
            prepare: Box::new(move |o| {
                let weights = o.matrices(2 * wide, h, o.copies(4 * wide * h))?;
                let x = o.tensors(1, rows, h, BF16)?;
                Ok(Box::new(move |ctx, i| {
                    gemm::linear_silu_and_mul(ctx, &x[0], &weights[i % weights.len()]).map(drop)
                }))
            }),
        });
    }
}

fn attention_cases(all: &mut Vec<Case>, model: &'static str, spec: &ModelSpec) {
    let (heads, kv_heads, d) = (spec.query_heads, spec.kv_heads, spec.head_dim);
    let query = heads * d;
    for (context, chunking) in [
        (4096, None),
        (8192, None),
        (16384, None),
        (32768, None),
        (32768, Some(Chunking { chunk_size: 8192, local_size: 1024 })),
    ] {
        let layout = layout(spec, 1, context);
        let dca = if chunking.is_some() { ", DCA" } else { "" };
        all.push(Case {
            op: "attention_prefill",
            model,
            shape: format!("1 x {context}, {heads}/{kv_heads} x {d}{dca}"),
            bytes: (context * (2 * query + 2 * kv_heads * d) * 2) as u64,
            flops: (2 * context * context * query) as u64,
            recordable: true,
            prepare: Box::new(move |o| {
                let q = o.tensors(1, context, query, BF16)?;
                let kv = o.kv(layout)?;
                let rope = o.rope(tables(d, context, chunking))?;
                let step = o.step(decode_or_prefill(context, context, layout.block_size))?;
                Ok(Box::new(move |ctx, _| attention::attention(ctx, &q[0], &rope, &step, &kv, 0).map(drop)))
            }),
        });
    }
    for (batch, context) in [(1, 1024), (1, 4096), (1, 32768), (8, 4096), (8, 16384), (8, 32768), (32, 2048)]
    {
        // One cache per layer, as many as it takes to exceed the second-level cache.
        let kv_bytes = batch * context * 2 * kv_heads * d * 2;
        all.push(Case {
            op: "attention_decode",
            model,
            shape: format!("{batch} x {context}, {heads}/{kv_heads} x {d}"),
            bytes: (kv_bytes + 2 * batch * query * 2) as u64,
            flops: (4 * batch * context * query) as u64,
            recordable: true,
            prepare: Box::new({
                let spec = spec.clone();
                move |o| {
                    let layers = o.copies(kv_bytes);
                    let layout = layout(&spec, layers, batch * context);
                    let (q, kv) = (o.tensors(1, batch, query, BF16)?, o.kv(layout)?);
                    let rope = o.rope(tables(d, context, None))?;
                    let step = o.step(decode_batch(batch, context, layout.block_size))?;
                    Ok(Box::new(move |ctx, i| {
                        attention::attention(ctx, &q[0], &rope, &step, &kv, i % layers).map(drop)
                    }))
                }
            }),
        });
    }
}

fn experts(all: &mut Vec<Case>, model: &'static str, spec: &ModelSpec) {
    let Some(m) = spec.moe.clone() else { return };
    let (h, count, k, i) = (spec.hidden_size, m.experts, m.top_k, m.intermediate_size);
    for rows in [1, 8, 32, 128, PREFILL] {
        all.push(Case {
            op: "route",
            model,
            shape: format!("{rows} x {count}, top {k}"),
            bytes: (rows * (4 * count + 8 * k)) as u64,
            flops: (4 * rows * count) as u64,
            recordable: true,
            prepare: Box::new(move |o| {
                let scores = o.tensors(1, rows, count, Element::F32)?;
                Ok(Box::new(move |ctx, _| moe::route(ctx, &scores[0], k, false).map(drop)))
            }),
        });
        // Random routing: each row visits k of `count` experts.
        let distinct = count as f64 * (1.0 - (1.0 - k as f64 / count as f64).powi(rows as i32));
        let weight_bytes = distinct * (3 * h * i * 2) as f64;
        all.push(Case {
            op: "moe_experts",
            model,
            shape: format!("{rows} x {h}, {count} x {i}, top {k}"),
            bytes: weight_bytes as u64 + (rows * h * 2 * (1 + k)) as u64,
            flops: (rows * k * 6 * h * i) as u64,
            recordable: true,
            prepare: Box::new(move |o| {
                let scores = o.tensors(1, rows, count, Element::F32)?;
                let (x, experts) = (o.tensors(1, rows, h, BF16)?, o.experts(count, i, h)?);
                let routing = moe::route(o.context(), &scores[0], k, false)?;
                Ok(Box::new(move |ctx, _| moe::experts(ctx, &x[0], &routing, &experts).map(drop)))
            }),
        });
    }
}

fn sampling_cases(all: &mut Vec<Case>, model: &'static str, spec: &ModelSpec) {
    let vocab = spec.vocab_size;
    for (kind, temperature, top_k, top_p) in
        [("greedy", 0.0, 0, 1.0), ("top-p 0.9", 0.8, 0, 0.9), ("top-k 50, top-p 0.9", 0.8, 50, 0.9)]
    {
        for rows in [1, 8, 64] {
            all.push(Case {
                op: "sample",
                model,
                shape: format!("{rows} x {vocab}, {kind}"),
                bytes: (rows * vocab * 4) as u64,
                flops: 0,
                recordable: false,
                prepare: Box::new(move |o| {
                    let logits = o.tensors(1, rows, vocab, Element::F32)?;
                    Ok(Box::new(move |ctx, i| {
                        let row = |index: usize| SamplingRow {
                            temperature,
                            top_k,
                            top_p,
                            seed: index as u64,
                            position: i as u64,
                            ..SamplingRow::default()
                        };
                        let parameters: Vec<SamplingRow<'_>> = (0..rows).map(row).collect();
                        let drawn = sampling::sample(ctx, &logits[0], &parameters);
                        drawn
                            .map(drop)
                            .map_err(|e| CudaError::Call { call: "sample".into(), message: e.to_string() })
                    }))
                }),
            });
        }
    }
}

/// A pool of one block size for `tokens` tokens.
fn layout(spec: &ModelSpec, layers: usize, tokens: usize) -> KvLayout {
    let block_size = 64;
    KvLayout {
        layers,
        query_heads: spec.query_heads,
        kv_heads: spec.kv_heads,
        groups: HeadGroups::Even,
        head_dim: spec.head_dim,
        block_size,
        blocks: tokens.div_ceil(block_size),
        dtype: DType::BF16,
    }
}

/// One sequence whose last `rows` tokens are the step's.
fn decode_or_prefill(rows: usize, kv_len: usize, block_size: usize) -> StepInputs {
    StepInputs {
        ids: vec![0; rows],
        logit_scales: vec![0.1; rows],
        sequences: vec![SequenceInputs {
            rows,
            kv_len,
            block_table: (0..kv_len.div_ceil(block_size) as u32).collect(),
        }],
        logit_rows: vec![rows - 1],
    }
}

/// `batch` sequences of `context` tokens, their blocks dealt out in turn.
fn decode_batch(batch: usize, context: usize, block_size: usize) -> StepInputs {
    let blocks = context.div_ceil(block_size);
    let table = |s: usize| (0..blocks).map(|b| (b * batch + s) as u32).collect();
    StepInputs {
        ids: vec![0; batch],
        logit_scales: vec![0.1; batch],
        sequences: (0..batch)
            .map(|s| SequenceInputs { rows: 1, kv_len: context, block_table: table(s) })
            .collect(),
        logit_rows: (0..batch).collect(),
    }
}

/// Rotation tables; what they hold does not change the work.
fn tables(head_dim: usize, context: usize, chunking: Option<Chunking>) -> RopeTables {
    let rows = chunking.map_or(context, |c| c.chunk_size as usize + 1);
    let half_dim = head_dim / 2;
    RopeTables { half_dim, rows, cos: vec![1.0; rows * half_dim], sin: vec![0.0; rows * half_dim], chunking }
}

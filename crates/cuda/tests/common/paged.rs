//! Sequences in a paged cache, what attention makes of them, and what it should: for the tests of attention.
#![allow(dead_code)] // every test program uses a part

use std::sync::Arc;

use longhaul_backend::{
    Chunking, DType, HeadGroups, HostTensor, KvLayout, RopeTables, SequenceInputs, StepInputs,
};
use longhaul_cuda::driver::{Element, EmulatedOptions, Memory};
use longhaul_cuda::kv::KvCache;
use longhaul_cuda::ops::attention::attention;
use longhaul_cuda::ops::rope::rope_and_cache;
use longhaul_cuda::rope::Rope;
use longhaul_cuda::step::Step;
use longhaul_cuda::weights::Vector;
use longhaul_cuda::{Context, Tensor, Variant};

use crate::common::{Random, context, relative_error};

/// Shapes of one test: the model's and the sequences' (rows of the step, tokens in the cache after it).
#[derive(Clone)]
pub struct Shape {
    pub query_heads: usize,
    pub kv_heads: usize,
    pub groups: HeadGroups,
    pub head_dim: usize,
    pub block_size: usize,
    pub chunking: Option<Chunking>,
    /// Whether the logit scale grows with the position.
    pub growing_scale: bool,
    pub sequences: Vec<(usize, usize)>,
}

impl Shape {
    pub fn tables(&self) -> RopeTables {
        let longest = self.sequences.iter().map(|s| s.1).max().unwrap();
        let rows = self.chunking.map_or(longest, |c| c.chunk_size as usize + 1);
        let half = self.head_dim / 2;
        let angle = |i: usize| (i / half) as f64 / 10_000f64.powf((i % half) as f64 / half as f64);
        RopeTables {
            half_dim: half,
            rows,
            cos: (0..rows * half).map(|i| angle(i).cos() as f32).collect(),
            sin: (0..rows * half).map(|i| angle(i).sin() as f32).collect(),
            chunking: self.chunking,
        }
    }

    pub fn layout(&self, dtype: DType) -> KvLayout {
        let blocks: usize = self.sequences.iter().map(|s| s.1.div_ceil(self.block_size)).sum();
        KvLayout {
            layers: 2,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            groups: self.groups,
            head_dim: self.head_dim,
            block_size: self.block_size,
            // Some blocks belong to nobody: they stay poisoned.
            blocks: blocks + 3,
            dtype,
        }
    }
}

/// The token streams of every sequence, and the block tables they share a pool by.
pub struct Data {
    /// Per sequence, per token: q, k, v of all heads, rounded to the element.
    pub tokens: Vec<Vec<Vec<f32>>>,
    pub tables: Vec<Vec<u32>>,
    pub bias: Vec<f32>,
}

pub fn data(shape: &Shape, element: Element, seed: u64) -> Data {
    let mut random = Random(seed);
    let cols = (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim;
    let tokens = shape
        .sequences
        .iter()
        .map(|&(_, length)| (0..length).map(|_| random.exact(cols, element)).collect())
        .collect();
    let layout = shape.layout(DType::F32);
    let mut free: Vec<u32> = (0..layout.blocks as u32).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, random.below(i + 1));
    }
    let tables = shape
        .sequences
        .iter()
        .map(|&(_, length)| free.split_off(free.len() - length.div_ceil(shape.block_size)))
        .collect();
    let bias = random.values(cols).into_iter().map(|v| v * 0.1).collect();
    Data { tokens, tables, bias }
}

pub fn scale(shape: &Shape, position: usize) -> f32 {
    let growth = if shape.growing_scale { position as f64 / 1000.0 } else { 0.0 };
    ((shape.head_dim as f64).powf(-0.5) * (1.0 + growth)) as f32
}

pub fn step_inputs(shape: &Shape, data: &Data, parts: &[(usize, usize, usize)]) -> StepInputs {
    let mut inputs = StepInputs::default();
    for &(index, first, rows) in parts {
        inputs.ids.extend(vec![0; rows]);
        inputs.logit_scales.extend((first..first + rows).map(|p| scale(shape, p)));
        inputs.sequences.push(SequenceInputs {
            rows,
            kv_len: first + rows,
            block_table: data.tables[index].clone(),
        });
    }
    inputs
}

pub fn upload(ctx: &Context, inputs: StepInputs) -> Step {
    let blocks: usize = inputs.sequences.iter().map(|s| s.block_table.len()).sum();
    let bytes = Step::capacity_bytes(inputs.rows(), inputs.sequences.len(), blocks);
    let memory = Memory::new(&ctx.driver, bytes, "step").unwrap();
    Step::upload(&ctx.driver, Arc::new(memory), inputs).unwrap()
}

/// Writes `parts` (sequence, first token, rows) of layer 1 to the cache, and returns what attention takes.
fn cache(
    ctx: &Context,
    shape: &Shape,
    data: &Data,
    rope: &Rope,
    kv: &KvCache,
    parts: &[(usize, usize, usize)],
) -> (Tensor, Step) {
    let cols = data.bias.len();
    let values: Vec<f32> = parts
        .iter()
        .flat_map(|&(index, first, rows)| data.tokens[index][first..first + rows].iter().flatten().copied())
        .collect();
    let step = upload(ctx, step_inputs(shape, data, parts));
    let qkv = ctx.tensor_from_f32(&values, values.len() / cols, cols, ctx.element).unwrap();
    let host = HostTensor::from_f32(vec![cols], &data.bias).unwrap();
    let bias = Vector::new(&ctx.driver, &[host]).unwrap();
    (rope_and_cache(ctx, &qkv, Some(&bias), rope, &step, kv, 1).unwrap(), step)
}

/// Runs `parts` (sequence, first token, rows) as one step on layer 1: cache write, then attention.
pub fn run(
    ctx: &Context,
    shape: &Shape,
    data: &Data,
    rope: &Rope,
    kv: &KvCache,
    parts: &[(usize, usize, usize)],
) -> Vec<f32> {
    let (q, step) = cache(ctx, shape, data, rope, kv, parts);
    let out = attention(ctx, &q, rope, &step, kv, 1).unwrap();
    ctx.tensor_to_f32(&out).unwrap()
}

/// A pool whose every byte is NaN to begin with, for `shape`.
pub fn pool(ctx: &Context, shape: &Shape, dtype: DType) -> KvCache {
    let kv = KvCache::new(&ctx.driver, shape.layout(dtype)).unwrap();
    ctx.driver.fill(kv.address(), 0xff, kv.bytes()).unwrap();
    kv
}

/// Attention of one sequence in float64, from the definition: every key is rotated at its position modulo the chunk length,
/// the query by its distance in chunks.
pub struct Reference<'a> {
    shape: &'a Shape,
    data: &'a Data,
    tables: RopeTables,
    index: usize,
    /// Per KV head and token, rotated.
    keys: Vec<Vec<Vec<f64>>>,
    values: Vec<Vec<Vec<f64>>>,
}

impl<'a> Reference<'a> {
    pub fn new(shape: &'a Shape, data: &'a Data, index: usize) -> Self {
        let mut new = Self { shape, data, tables: shape.tables(), index, keys: vec![], values: vec![] };
        let tokens = 0..data.tokens[index].len();
        for head in 0..shape.kv_heads {
            let key = |token: usize| {
                let row = new.tables.key_row(token as u32) as usize;
                new.rotate(&new.part(token, shape.query_heads + head), row)
            };
            let keys = tokens.clone().map(key).collect();
            let value = |token: usize| new.part(token, shape.query_heads + shape.kv_heads + head);
            let values = tokens.clone().map(value).collect();
            new.keys.push(keys);
            new.values.push(values);
        }
        new
    }

    fn rotate(&self, values: &[f64], row: usize) -> Vec<f64> {
        let half = self.shape.head_dim / 2;
        let table = |t: &[f32], i: usize| f64::from(t[row * half + i % half]);
        (0..2 * half)
            .map(|i| {
                let other = if i < half { -values[i + half] } else { values[i - half] };
                values[i] * table(&self.tables.cos, i) + other * table(&self.tables.sin, i)
            })
            .collect()
    }

    fn part(&self, token: usize, head: usize) -> Vec<f64> {
        let d = self.shape.head_dim;
        let (values, bias) = (&self.data.tokens[self.index][token], &self.data.bias);
        (head * d..(head + 1) * d).map(|i| f64::from(values[i]) + f64::from(bias[i])).collect()
    }

    /// The result of token `position`, all heads.
    pub fn row(&self, position: usize) -> Vec<f64> {
        let shape = self.shape;
        let layout = shape.layout(DType::F32);
        let query_row = |key: usize| match shape.chunking {
            None => position,
            Some(c) => c.query_row(position as u32, key as u32 / c.len()) as usize,
        };
        let mut out = Vec::new();
        for head in 0..shape.query_heads {
            let kv_head = (0..shape.kv_heads).find(|kv| layout.query_heads_of(*kv).contains(&head)).unwrap();
            let (keys, values) = (&self.keys[kv_head], &self.values[kv_head]);
            let query = self.part(position, head);
            let mut rotated = (usize::MAX, Vec::new());
            let scores: Vec<f64> = (0..=position)
                .map(|key| {
                    if query_row(key) != rotated.0 {
                        rotated = (query_row(key), self.rotate(&query, query_row(key)));
                    }
                    rotated.1.iter().zip(&keys[key]).map(|(a, b)| a * b).sum::<f64>()
                        * f64::from(scale(shape, position))
                })
                .collect();
            let largest = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut result = vec![0.0; shape.head_dim];
            for (value, weight) in values.iter().zip(&weights) {
                for (r, x) in result.iter_mut().zip(value) {
                    *r += weight / sum * x;
                }
            }
            out.extend(result);
        }
        out
    }
}

/// All tokens of all sequences but those of the step are cached by an earlier step; the step's rows must match.
#[track_caller]
pub fn check(options: EmulatedOptions, variant: Variant, element: Element, shape: &Shape) {
    let ctx = context(options, variant, element);
    let data = data(shape, element, shape.sequences.len() as u64 + shape.head_dim as u64);
    let rope = Rope::new(&ctx.driver, shape.tables()).unwrap();
    let dtype = if element == Element::F32 { DType::F32 } else { DType::BF16 };
    let kv = pool(&ctx, shape, dtype);
    let before: Vec<_> = (0..shape.sequences.len())
        .map(|i| (i, 0, shape.sequences[i].1 - shape.sequences[i].0))
        .filter(|part| part.2 > 0)
        .collect();
    if !before.is_empty() {
        cache(&ctx, shape, &data, &rope, &kv, &before);
    }
    let parts: Vec<_> =
        shape.sequences.iter().enumerate().map(|(i, &(rows, length))| (i, length - rows, rows)).collect();
    let got = run(&ctx, shape, &data, &rope, &kv, &parts);
    let cols = shape.query_heads * shape.head_dim;
    let mut rows = got.chunks_exact(cols);
    for (index, first, count) in parts {
        let reference = Reference::new(shape, &data, index);
        for position in first..first + count {
            let exact = reference.row(position);
            let error = relative_error(rows.next().unwrap(), &exact);
            // bf16: the rotated keys and queries, the weights and the result are rounded.
            let tolerance = if element == Element::F32 { 2e-5 } else { 2e-2 };
            assert!(error <= tolerance, "sequence {index} position {position}: {error} ({options:?})");
        }
    }
}

pub fn shape(query_heads: usize, kv_heads: usize, head_dim: usize, sequences: &[(usize, usize)]) -> Shape {
    Shape {
        query_heads,
        kv_heads,
        groups: HeadGroups::Even,
        head_dim,
        block_size: 16,
        chunking: None,
        growing_scale: true,
        sequences: sequences.to_vec(),
    }
}

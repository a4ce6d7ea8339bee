//! Against a float64 reference that computes every pair from its relative distance, and against published vectors.

use longhaul_backend::{Chunking, DType, HeadGroups, KvLayout, RopeTables, SequenceInputs, StepInputs};

use super::attention;
use crate::kv::KvCache;
use crate::simd::Isa;

/// `x_{n+1} = 1664525 x_n + 1013904223 mod 2^32`, value `x / 2^31 - 1`: what the published vectors are computed from.
fn lcg(count: usize, seed: u32) -> Vec<f32> {
    let mut x = seed;
    (0..count)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (f64::from(x) / 2_147_483_648.0 - 1.0) as f32
        })
        .collect()
}

fn inv_freq(theta: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim as f64)).collect()
}

fn tables(theta: f64, dim: usize, rows: usize, chunking: Option<Chunking>) -> RopeTables {
    let angles = || (0..rows).flat_map(|p| inv_freq(theta, dim).into_iter().map(move |f| p as f64 * f));
    RopeTables {
        half_dim: dim / 2,
        rows,
        cos: angles().map(|a| a.cos() as f32).collect(),
        sin: angles().map(|a| a.sin() as f32).collect(),
        chunking,
    }
}

fn rotate(x: &[f32], position: f64, inv_freq: &[f64]) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = vec![0.0; x.len()];
    for d in 0..half {
        let (sin, cos) = (position * inv_freq[d]).sin_cos();
        let (a, b) = (f64::from(x[d]), f64::from(x[d + half]));
        out[d] = a * cos - b * sin;
        out[d + half] = b * cos + a * sin;
    }
    out
}

/// One sequence of random q, k, v with everything needed to attend.
struct Case {
    n: usize,
    heads: usize,
    kv_heads: usize,
    groups: HeadGroups,
    dim: usize,
    theta: f64,
    chunking: Option<Chunking>,
    block_size: usize,
    scale: f64,
    dtype: DType,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(
        n: usize,
        (heads, kv_heads, dim): (usize, usize, usize),
        chunking: Option<(u32, u32)>,
        block_size: usize,
    ) -> Self {
        Case {
            n,
            heads,
            kv_heads,
            groups: HeadGroups::Even,
            dim,
            theta: 1e6,
            chunking: chunking.map(|(chunk_size, local_size)| Chunking { chunk_size, local_size }),
            block_size,
            scale: 1.3 / (dim as f64).sqrt(),
            dtype: DType::F32,
            q: lcg(n * heads * dim, 1),
            k: lcg(n * kv_heads * dim, 2),
            v: lcg(n * kv_heads * dim, 3),
        }
    }

    /// Attention of row `i`, head `h`, in float64 by the definition: every pair rotated by its relative distance.
    fn reference(&self, i: usize, h: usize) -> (Vec<f64>, f64) {
        let freq = inv_freq(self.theta, self.dim);
        let kv = match self.groups {
            HeadGroups::Even => h / (self.heads / self.kv_heads),
            HeadGroups::Cut { size, skipped } => (h + skipped) / size,
        };
        let q = &self.q[(i * self.heads + h) * self.dim..][..self.dim];
        let logits: Vec<f64> = (0..=i)
            .map(|j| {
                let (pq, pk) = match self.chunking {
                    None => (i as u32, j as u32),
                    Some(c) => {
                        let len = c.len();
                        let (i, j) = (i as u32, j as u32);
                        let pq = match i / len - j / len {
                            0 => i % len,
                            1 => (i % len + len).min(c.chunk_size),
                            _ => (2 * len - 1).min(c.chunk_size),
                        };
                        (pq, j % len)
                    }
                };
                let k = &self.k[(j * self.kv_heads + kv) * self.dim..][..self.dim];
                let rotated = rotate(q, f64::from(pq) - f64::from(pk), &freq);
                self.scale * rotated.iter().zip(k).map(|(a, b)| a * f64::from(*b)).sum::<f64>()
            })
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        let mut out = vec![0.0; self.dim];
        for (j, l) in logits.iter().enumerate() {
            let v = &self.v[(j * self.kv_heads + kv) * self.dim..][..self.dim];
            for (o, v) in out.iter_mut().zip(v) {
                *o += (l - max).exp() / sum * f64::from(*v);
            }
        }
        (out, max + sum.ln())
    }

    fn blocks(&self) -> usize {
        self.n.div_ceil(self.block_size)
    }

    /// A pool whose unused slots are NaN, with the sequence's blocks in scrambled order.
    fn pool(&self, rope: &RopeTables) -> (KvCache, Vec<u32>) {
        let blocks = self.blocks();
        let mut kv = KvCache::new(KvLayout {
            layers: 2,
            query_heads: self.heads,
            kv_heads: self.kv_heads,
            groups: self.groups,
            head_dim: self.dim,
            block_size: self.block_size,
            blocks: blocks + 2,
            dtype: self.dtype,
        })
        .unwrap();
        kv.poison();
        let table: Vec<u32> = (0..blocks).map(|b| ((b * 7 + 3) % (blocks + 2)) as u32).collect();
        let distinct: std::collections::HashSet<_> = table.iter().collect();
        let table = if distinct.len() == table.len() { table } else { (0..blocks as u32).rev().collect() };
        self.write(&mut kv, rope, &table, 0..self.n);
        (kv, table)
    }

    fn write(&self, kv: &mut KvCache, rope: &RopeTables, table: &[u32], positions: std::ops::Range<usize>) {
        for j in positions {
            let (cos, sin) = rope.row(rope.key_row(j as u32)).unwrap();
            for head in 0..self.kv_heads {
                let at = (j * self.kv_heads + head) * self.dim;
                let (k, v) = (&self.k[at..][..self.dim], &self.v[at..][..self.dim]);
                let half = self.dim / 2;
                let rotated: Vec<f32> = (0..self.dim)
                    .map(|d| {
                        if d < half {
                            k[d] * cos[d] - k[d + half] * sin[d]
                        } else {
                            k[d] * cos[d - half] + k[d - half] * sin[d - half]
                        }
                    })
                    .collect();
                let place = (table[j / self.block_size] as usize, j % self.block_size);
                kv.write(1, place, head, &rotated, v).unwrap();
            }
        }
    }

    fn rope(&self) -> RopeTables {
        let rows = self.chunking.map_or(self.n, |c| c.chunk_size as usize + 1);
        tables(self.theta, self.dim, rows, self.chunking)
    }

    /// Rows `rows` of the sequence in one step.
    fn run(
        &self,
        isa: Isa,
        kv: &KvCache,
        rope: &RopeTables,
        table: &[u32],
        rows: std::ops::Range<usize>,
    ) -> Vec<f32> {
        let width = self.heads * self.dim;
        let step = StepInputs {
            ids: vec![0; rows.len()],
            logit_scales: vec![self.scale as f32; rows.len()],
            sequences: vec![SequenceInputs {
                rows: rows.len(),
                kv_len: rows.end,
                block_table: table.to_vec(),
            }],
            logit_rows: vec![],
        };
        attention(isa, &self.q[rows.start * width..rows.end * width], &step, rope, kv, 1).unwrap()
    }

    /// Compares every head of `rows` with the reference.
    fn check(&self, isa: Isa, rows: impl Iterator<Item = usize>) {
        let rope = self.rope();
        let (kv, table) = self.pool(&rope);
        let whole = self.run(isa, &kv, &rope, &table, 0..self.n);
        for i in rows {
            for h in 0..self.heads {
                let (expected, _) = self.reference(i, h);
                let got = &whole[(i * self.heads + h) * self.dim..][..self.dim];
                // bf16: rounded q, k, v and weights of magnitude about 1.
                let tolerance = if self.dtype == DType::BF16 { 2e-2 } else { 2e-5 };
                for (g, e) in got.iter().zip(&expected) {
                    assert!(
                        (f64::from(*g) - e).abs() < tolerance,
                        "{isa} n {} dim {} block {} {:?} row {i} head {h}: {g} is not {e}",
                        self.n,
                        self.dim,
                        self.block_size,
                        self.chunking
                    );
                }
            }
        }
    }
}

#[test]
fn reproduces_the_published_dual_chunk_vectors() {
    let text = include_str!("vectors.json");
    let numbers = |key: &str| -> Vec<f64> {
        let start = text.find(key).unwrap() + key.len();
        let rest = &text[start..];
        let end = rest.find("]\n ]").or_else(|| rest.find(']')).unwrap();
        rest[..end].split(|c: char| !"+-.eE0123456789".contains(c)).filter_map(|t| t.parse().ok()).collect()
    };
    let mut case = Case::new(53, (4, 2, 16), Some((24, 8)), 16);
    case.scale = 1.1 * 1.1 / 4.0;
    let rows: Vec<usize> = vec![0, 15, 16, 23, 24, 25, 31, 32, 40, 47, 48, 52];
    let expected = numbers("\"out_head3_first4\": [");
    let lse = {
        let start = text.find("\"lse_head3\": [").unwrap();
        let rest = &text[start + 14..];
        let list = &rest[..rest.find(']').unwrap()];
        list.split(',').map(|t| t.trim().parse::<f64>().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!((expected.len(), lse.len()), (48, 12));
    // The reference of these tests reproduces the vectors in float64, so it may judge the kernels.
    for (index, &row) in rows.iter().enumerate() {
        let (out, row_lse) = case.reference(row, 3);
        assert!((row_lse - lse[index]).abs() < 2e-6, "lse of row {row}");
        for d in 0..4 {
            assert!((out[d] - expected[index * 4 + d]).abs() < 1e-6, "row {row} column {d}");
        }
    }
    for isa in Isa::available() {
        let rope = case.rope();
        let (kv, table) = case.pool(&rope);
        let got = case.run(isa, &kv, &rope, &table, 0..53);
        for (index, &row) in rows.iter().enumerate() {
            for d in 0..4 {
                let g = f64::from(got[(row * 4 + 3) * 16 + d]);
                assert!((g - expected[index * 4 + d]).abs() < 2e-6, "{isa} row {row} column {d}: {g}");
            }
        }
        let sum: f64 = got.iter().map(|&x| f64::from(x)).sum();
        let abs: f64 = got.iter().map(|&x| f64::from(x).abs()).sum();
        assert!((sum - -31.372109677531938).abs() < 1e-3, "{sum}");
        assert!((abs - 402.1941735216346).abs() < 1e-3, "{abs}");
    }
}

#[test]
fn every_boundary_matches_the_reference() {
    // L = 16: lengths around L, L + w, C + 1, 2L, 3L, 5L + 3 (specification of the conformance tests).
    for n in [1, 15, 16, 17, 24, 25, 26, 31, 32, 33, 40, 48, 83] {
        Case::new(n, (4, 2, 16), Some((24, 8)), 16).check(Isa::available()[0], 0..n);
    }
    for isa in Isa::available() {
        for chunking in [None, Some((24, 8)), Some((20, 0)), Some((16, 15))] {
            for block_size in [1, 4, 16, 64] {
                if chunking.is_some_and(|(c, w): (u32, u32)| !((c - w) as usize).is_multiple_of(block_size)) {
                    continue;
                }
                let mut case = Case::new(83, (3, 1, 10), chunking, block_size);
                case.check(isa, (0..83).step_by(9));
                case.dtype = DType::BF16;
                case.check(isa, 0..83);
            }
        }
    }
}

#[test]
fn head_sizes_and_groups_match_the_reference() {
    for isa in Isa::available() {
        for (heads, kv_heads, dim) in
            [(7, 1, 64), (8, 1, 128), (2, 2, 32), (28, 4, 8), (5, 1, 96), (1, 1, 2), (6, 2, 80)]
        {
            Case::new(130, (heads, kv_heads, dim), Some((80, 16)), 64)
                .check(isa, [0, 63, 64, 79, 80, 96, 127, 128, 129].into_iter());
            let mut plain = Case::new(70, (heads, kv_heads, dim), None, 64);
            plain.check(isa, [0, 1, 47, 63, 64, 69].into_iter());
            plain.dtype = DType::BF16;
            plain.check(isa, 0..70);
        }
    }
}

/// A rank whose query heads begin or end inside a group.
#[test]
fn cut_groups_match_the_reference() {
    for isa in Isa::available() {
        for (heads, kv_heads, skipped) in [(10, 2, 0), (9, 2, 3), (9, 2, 5), (18, 3, 2)] {
            let mut case = Case::new(130, (heads, kv_heads, 32), Some((80, 16)), 64);
            case.groups = HeadGroups::Cut { size: 7, skipped };
            case.check(isa, [0, 63, 64, 80, 129].into_iter());
            case.dtype = DType::BF16;
            case.check(isa, [0, 63, 64, 80, 129].into_iter());
        }
    }
}

/// Whatever the split into steps, rows have the same bits; beyond one partition of keys too.
#[test]
fn chunked_prefill_and_decode_are_bit_identical_to_one_step() {
    for isa in Isa::available() {
        for (chunking, dtype) in [
            (None, DType::F32),
            (Some((80, 16)), DType::F32),
            (None, DType::BF16),
            (Some((80, 16)), DType::BF16),
        ] {
            let mut case = Case::new(300, (4, 2, 32), chunking, 64);
            case.dtype = dtype;
            let rope = case.rope();
            let (kv, table) = case.pool(&rope);
            let whole = case.run(isa, &kv, &rope, &table, 0..300);
            let width = 4 * 32;
            for chunk in [1, 7, 13, 64, 65, 129] {
                for start in (0..300).step_by(chunk) {
                    let rows = start..(start + chunk).min(300);
                    let part = case.run(isa, &kv, &rope, &table, rows.clone());
                    assert!(
                        part == whole[rows.start * width..rows.end * width],
                        "{isa} chunk {chunk} rows {rows:?}"
                    );
                }
            }
        }
    }
    let case = Case::new(9000, (2, 1, 16), Some((640, 128)), 64);
    let rope = case.rope();
    let (kv, table) = case.pool(&rope);
    let isa = Isa::available()[0];
    let whole = case.run(isa, &kv, &rope, &table, 8_900..9_000);
    let width = 2 * 16;
    for row in [8_900, 8_959, 8_999] {
        let alone = case.run(isa, &kv, &rope, &table, row..row + 1);
        assert!(alone == whole[(row - 8_900) * width..][..width], "row {row}");
    }
    case.check(isa, [4095, 4096, 8191, 8192, 8999].into_iter());
}

#[test]
fn short_prompts_under_dca_equal_plain_attention_bit_for_bit() {
    let isa = Isa::available()[0];
    let dca = Case::new(64, (4, 2, 32), Some((80, 16)), 64);
    let plain = Case::new(64, (4, 2, 32), None, 64);
    let run = |case: &Case| {
        let rope = case.rope();
        let (kv, table) = case.pool(&rope);
        case.run(isa, &kv, &rope, &table, 0..64)
    };
    assert!(run(&dca) == run(&plain));
}

#[test]
fn sequences_of_a_mixed_step_do_not_touch_each_other() {
    let isa = Isa::available()[0];
    let long = Case::new(150, (4, 2, 32), Some((80, 16)), 64);
    let mut short = Case::new(20, (4, 2, 32), Some((80, 16)), 64);
    short.q = lcg(20 * 4 * 32, 11);
    short.k = lcg(20 * 2 * 32, 12);
    short.v = lcg(20 * 2 * 32, 13);
    let rope = long.rope();
    let (mut kv, table) = long.pool(&rope);
    let free = (0..5u32).find(|b| !table.contains(b)).unwrap();
    short.write(&mut kv, &rope, &[free], 0..20);
    let alone_long = long.run(isa, &kv, &rope, &table, 149..150);
    let alone_short = short.run(isa, &kv, &rope, &[free], 5..20);
    let width = 4 * 32;
    let step = StepInputs {
        ids: vec![0; 16],
        logit_scales: vec![long.scale as f32; 16],
        sequences: vec![
            SequenceInputs { rows: 1, kv_len: 150, block_table: table },
            SequenceInputs { rows: 15, kv_len: 20, block_table: vec![free] },
        ],
        logit_rows: vec![],
    };
    let mut q = long.q[149 * width..].to_vec();
    q.extend_from_slice(&short.q[5 * width..]);
    let mixed = attention(isa, &q, &step, &rope, &kv, 1).unwrap();
    assert!(mixed[..width] == alone_long[..]);
    assert!(mixed[width..] == alone_short[..]);
}

#[test]
fn a_position_beyond_the_tables_is_an_error() {
    let case = Case::new(20, (2, 1, 8), None, 16);
    let rope = case.rope();
    let (kv, table) = case.pool(&rope);
    let short = tables(1e6, 8, 10, None);
    let step = StepInputs {
        ids: vec![0],
        logit_scales: vec![1.0],
        sequences: vec![SequenceInputs { rows: 1, kv_len: 20, block_table: table }],
        logit_rows: vec![],
    };
    let error = attention(Isa::Scalar, &case.q[..16], &step, &short, &kv, 1).unwrap_err().to_string();
    assert!(error.contains("beyond the 10 rows"), "{error}");
}

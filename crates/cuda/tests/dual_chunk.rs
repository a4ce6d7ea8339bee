//! Dual Chunk Attention (arXiv 2402.17463) at every boundary of chunks, local rows, pages and tiles.

mod common;
#[path = "common/paged.rs"]
mod paged;

use common::{context, schedules};
use longhaul_backend::{Chunking, DType};
use longhaul_cuda::Variant;
use longhaul_cuda::driver::{Element, EmulatedOptions};
use longhaul_cuda::rope::Rope;
use paged::{Data, Shape, check, data, pool, run, shape};

/// Chunks of `len` tokens, `local` rows of which see the previous chunk at true distance.
fn chunks(len: usize, local: usize) -> Option<Chunking> {
    Some(Chunking { chunk_size: (len + local) as u32, local_size: local as u32 })
}

/// Lengths at, before and behind every boundary of chunks of `len` tokens with `local` local rows.
fn boundaries(len: usize, local: usize) -> Vec<usize> {
    let (l, w) = (len, local);
    let mut all =
        vec![1, l - 1, l, l + 1, l + w, l + w + 1, l + w + 2, 2 * l - 1, 2 * l, 2 * l + 1, 2 * l + w, 3 * l];
    all.push(5 * l + 3);
    all.sort_unstable();
    all.dedup();
    all
}

/// Chunk length, local rows, page, heads, head size.
type Case = (usize, usize, usize, (usize, usize), usize);

/// Local rows: none, some, as many as a chunk has and more.
const CASES: [Case; 8] = [
    (32, 8, 16, (1, 1), 64),
    (32, 0, 32, (5, 1), 64),
    (64, 16, 64, (7, 1), 128),
    (64, 80, 16, (8, 1), 64),
    (32, 32, 32, (6, 2), 128),
    (64, 16, 16, (3, 1), 64),
    (16, 4, 16, (4, 1), 64),
    (128, 32, 64, (2, 1), 64),
];

fn case(index: usize, sequences: &[(usize, usize)]) -> Shape {
    let (len, local, block_size, (query_heads, kv_heads), head_dim) = CASES[index % CASES.len()];
    Shape {
        block_size,
        chunking: chunks(len, local),
        growing_scale: index.is_multiple_of(2),
        ..shape(query_heads, kv_heads, head_dim, sequences)
    }
}

#[test]
fn decode_is_right_at_every_boundary() {
    for (index, options) in schedules().into_iter().cycle().take(CASES.len()).enumerate() {
        let lengths: Vec<_> =
            boundaries(CASES[index].0, CASES[index].1).into_iter().map(|n| (1, n)).collect();
        check(options, Variant::Auto, Element::Bf16, &case(index, &lengths));
    }
}

/// Whole prompts, short and long in one step, with both widths of query tiles (one multiprocessor is always filled).
#[test]
fn prefill_is_right_at_every_boundary() {
    for (index, options) in schedules().into_iter().cycle().take(CASES.len()).enumerate() {
        let multiprocessors = if index.is_multiple_of(2) { 1 } else { 64 };
        let lengths: Vec<_> = boundaries(CASES[index].0, CASES[index].1)
            .into_iter()
            .filter(|n| *n <= 200)
            .map(|n| (n, n))
            .collect();
        check(
            EmulatedOptions { multiprocessors, ..options },
            Variant::Auto,
            Element::Bf16,
            &case(index, &lengths),
        );
    }
}

/// Prefill parts that begin anywhere, decode rows, sequences within one chunk and beyond several, in one step.
#[test]
fn short_and_long_rows_mix() {
    for (index, options) in schedules().into_iter().enumerate() {
        let (len, local, ..) = CASES[index];
        let sequences =
            [(1, 3), (2, 5 * len + 3), (len, len), (1, 2 * len + local), (37, 3 * len), (1, 5 * len + 3)];
        check(options, Variant::Auto, Element::Bf16, &case(index, &sequences));
    }
}

#[test]
fn the_plain_kernel_is_right_at_every_boundary() {
    for (index, element) in [Element::Bf16, Element::F32, Element::F32].into_iter().enumerate() {
        let (len, local, ..) = CASES[index];
        let mut sequences: Vec<_> = boundaries(len, local).into_iter().map(|n| (1, n)).collect();
        sequences.push((2 * len + 1, 2 * len + 1));
        let s = Shape { head_dim: 16, ..case(index, &sequences) };
        check(EmulatedOptions::default(), Variant::Plain, element, &s);
    }
}

/// All rows of sequence 0 of `shape`, prefilled in parts of `part` rows.
fn prefill(options: EmulatedOptions, shape: &Shape, data: &Data, part: usize) -> Vec<f32> {
    let ctx = context(options, Variant::Auto, Element::Bf16);
    let rope = Rope::new(&ctx.driver, shape.tables()).unwrap();
    let kv = pool(&ctx, shape, DType::BF16);
    let length = shape.sequences[0].1;
    (0..length)
        .step_by(part)
        .flat_map(|first| run(&ctx, shape, data, &rope, &kv, &[(0, first, part.min(length - first))]))
        .collect()
}

/// However a prompt is cut into steps, and however wide the query tiles are, every row has the same bits.
#[test]
fn cuts_of_a_prompt_change_no_bit() {
    for (index, options) in schedules().into_iter().enumerate() {
        let length = 163;
        let s = case(index, &[(length, length)]);
        let data = data(&s, Element::Bf16, index as u64);
        let whole = prefill(EmulatedOptions { multiprocessors: 1, ..options }, &s, &data, length);
        for part in [13, 64, 65, 129] {
            for multiprocessors in [1, 64] {
                let cut = prefill(EmulatedOptions { multiprocessors, ..options }, &s, &data, part);
                assert!(cut == whole, "parts of {part}, case {index}, {multiprocessors} multiprocessors");
            }
        }
    }
}

/// Within one chunk, dual-chunk positions are plain positions, bit for bit.
#[test]
fn one_chunk_is_plain_attention() {
    for (index, options) in schedules().into_iter().enumerate() {
        let (len, ..) = CASES[index];
        for length in [1, len - 1, len] {
            let dual = case(index, &[(length, length)]);
            let plain = Shape { chunking: None, ..dual.clone() };
            let data = data(&dual, Element::Bf16, length as u64);
            for part in [length, 1] {
                let (a, b) = (prefill(options, &dual, &data, part), prefill(options, &plain, &data, part));
                assert!(a == b, "{length} tokens, parts of {part}, case {index}");
            }
        }
    }
}

/// A prefix of one chunk whose keys nobody attends to moves everything by one chunk: no bit of the rest changes.
#[test]
fn a_shift_by_a_chunk_changes_no_bit() {
    for (index, options) in schedules().into_iter().enumerate() {
        let (len, ..) = CASES[index];
        let length = 2 * len + 5;
        let s = Shape { growing_scale: false, ..case(index, &[(length, length)]) };
        let (d, half) = (s.head_dim, s.head_dim / 2);
        let mut here = data(&s, Element::Bf16, 3);
        // The slowest pair hardly turns: with it, queries are orthogonal to no key of the prefix.
        let slowest = half - 1;
        for token in &mut here.tokens[0] {
            (0..s.query_heads).for_each(|head| token[head * d + slowest] = 8.0);
        }
        let shifted = Shape { sequences: vec![(length + len, length + len)], ..s.clone() };
        let mut there = data(&shifted, Element::Bf16, 4);
        there.bias = here.bias.clone();
        there.tokens[0].truncate(len);
        for token in &mut there.tokens[0] {
            (0..s.query_heads).for_each(|head| token[head * d + slowest] = 8.0);
            (s.query_heads..s.query_heads + s.kv_heads).for_each(|head| token[head * d + slowest] = -4096.0);
        }
        there.tokens[0].extend(here.tokens[0].iter().cloned());
        let cols = s.query_heads * d;
        let near = prefill(options, &s, &here, length);
        let far = prefill(options, &shifted, &there, length + len);
        assert!(far[len * cols..] == near[..], "case {index}");
    }
}

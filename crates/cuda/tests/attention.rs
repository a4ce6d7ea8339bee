//! Attention, rotation and the KV cache against float64.

mod common;
#[path = "common/paged.rs"]
mod paged;

use common::{context, relative_error, schedules};
use longhaul_backend::{Chunking, DType, HeadGroups, RopeTables, SequenceInputs, StepInputs};
use longhaul_cuda::driver::{Element, EmulatedOptions};
use longhaul_cuda::kv::KvCache;
use longhaul_cuda::ops::attention::attention;
use longhaul_cuda::ops::rope::rope_and_cache;
use longhaul_cuda::rope::Rope;
use longhaul_cuda::{CudaError, Variant};
use paged::{Reference, Shape, check, data, run, shape, step_inputs, upload};

const CHUNKS: Option<Chunking> = Some(Chunking { chunk_size: 40, local_size: 8 });

#[test]
fn plain_attention_takes_any_even_head() {
    for (head_dim, block_size) in [(2, 1), (16, 8), (32, 16), (48, 64), (80, 16), (256, 32)] {
        for element in [Element::Bf16, Element::F32] {
            let s = Shape { block_size, ..shape(6, 2, head_dim, &[(1, 1), (3, 20), (1, 37), (5, 5)]) };
            check(EmulatedOptions::default(), Variant::Plain, element, &s);
        }
    }
}

#[test]
fn plain_attention_crosses_tiles_and_chunks() {
    for options in schedules().into_iter().step_by(2) {
        let s = shape(2, 1, 16, &[(2, 515), (1, 513)]);
        check(options, Variant::Plain, Element::F32, &s);
        let s = Shape { block_size: 8, chunking: CHUNKS, ..shape(2, 2, 16, &[(70, 100), (1, 33), (1, 97)]) };
        check(options, Variant::Plain, Element::F32, &s);
    }
}

/// Lengths around tiles, blocks and splits; groups from 1 to 8; both head sizes.
#[test]
fn decode_matches_float64() {
    for (index, options) in schedules().into_iter().enumerate() {
        let groups = [(1, 1), (2, 1), (3, 1), (12, 2), (7, 1), (8, 1)];
        let (query_heads, kv_heads) = groups[index % groups.len()];
        let head_dim = if index % 2 == 0 { 64 } else { 128 };
        let lengths: Vec<_> =
            [1, 15, 16, 17, 63, 64, 65, 128, 129, 300].into_iter().map(|l| (1, l)).collect();
        check(options, Variant::Auto, Element::Bf16, &shape(query_heads, kv_heads, head_dim, &lengths));
    }
}

#[test]
fn decode_matches_float64_with_dual_chunks() {
    for (options, head_dim) in schedules().into_iter().zip([64, 128].into_iter().cycle()) {
        // L = 64 - 16: at, before and behind every boundary of chunks and local rows.
        let chunking = Some(Chunking { chunk_size: 64, local_size: 16 });
        let lengths: Vec<_> =
            [47, 48, 49, 64, 65, 95, 96, 97, 144, 145, 161].into_iter().map(|l| (1, l)).collect();
        check(options, Variant::Auto, Element::Bf16, &Shape { chunking, ..shape(4, 2, head_dim, &lengths) });
    }
}

#[test]
fn prefill_matches_float64() {
    for (index, options) in schedules().into_iter().enumerate() {
        let groups = [(1, 1), (2, 1), (5, 1), (6, 2), (7, 1), (8, 1)];
        let (query_heads, kv_heads) = groups[index % groups.len()];
        let head_dim = if index % 2 == 0 { 128 } else { 64 };
        let sequences = [(2, 2), (17, 17), (65, 65), (9, 73), (64, 130), (1, 40), (3, 3)];
        check(options, Variant::Auto, Element::Bf16, &shape(query_heads, kv_heads, head_dim, &sequences));
    }
}

/// Query tiles that straddle chunk boundaries, several chunks inside one tile, key tiles cut at boundaries.
#[test]
fn prefill_matches_float64_with_dual_chunks() {
    let chunkings = [(40, 8), (64, 16), (20, 4), (128, 32)];
    for (index, options) in schedules().into_iter().enumerate() {
        let (chunk_size, local_size) = chunkings[index % chunkings.len()];
        let chunking = Some(Chunking { chunk_size, local_size });
        let head_dim = if index % 2 == 0 { 64 } else { 128 };
        let s = Shape { chunking, ..shape(2, 1, head_dim, &[(100, 100), (70, 161), (2, 33), (1, 97)]) };
        check(options, Variant::Auto, Element::Bf16, &s);
    }
}

/// A rank's heads may begin and end inside a group: of groups of 7, the last 3 of one, a whole one, the first 2 of another.
#[test]
fn cut_groups_match_float64() {
    let cut = |query_heads, kv_heads, size, skipped, head_dim, sequences: &[(usize, usize)]| Shape {
        groups: HeadGroups::Cut { size, skipped },
        ..shape(query_heads, kv_heads, head_dim, sequences)
    };
    // Prefill tiles, decode with and without splits, in the mma kernels.
    let sequences = [(40, 40), (1, 300), (1, 17), (9, 73)];
    for (options, head_dim) in schedules().into_iter().step_by(2).zip([64, 128].into_iter().cycle()) {
        check(options, Variant::Auto, Element::Bf16, &cut(12, 3, 7, 4, head_dim, &sequences));
        check(options, Variant::Auto, Element::Bf16, &cut(4, 2, 3, 2, head_dim, &sequences));
    }
    for element in [Element::F32, Element::Bf16] {
        check(EmulatedOptions::default(), Variant::Plain, element, &cut(5, 3, 3, 2, 16, &sequences));
    }
}

/// A decode row has the same bits alone and among seven others.
#[test]
fn a_decode_row_does_not_depend_on_the_batch() {
    let s = shape(7, 1, 64, &[(1, 300), (1, 5), (1, 64), (1, 200), (1, 17), (1, 129), (1, 1), (1, 77)]);
    let data = data(&s, Element::Bf16, 1);
    let mut first: Option<Vec<f32>> = None;
    for options in schedules() {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        let rope = Rope::new(&ctx.driver, s.tables()).unwrap();
        let kv = KvCache::new(&ctx.driver, s.layout(DType::BF16)).unwrap();
        let before: Vec<_> = (0..8).map(|i| (i, 0, s.sequences[i].1 - 1)).filter(|p| p.2 > 0).collect();
        run(&ctx, &s, &data, &rope, &kv, &before);
        let parts: Vec<_> = (0..8).map(|i| (i, s.sequences[i].1 - 1, 1)).collect();
        let batch = run(&ctx, &s, &data, &rope, &kv, &parts);
        let alone = run(&ctx, &s, &data, &rope, &kv, &parts[..1]);
        assert!(batch[..alone.len()] == alone, "{options:?}");
        assert!(*first.get_or_insert_with(|| alone.clone()) == alone, "{options:?}: schedules differ");
    }
}

/// An fp8 cache with per-head scales: what is read back is what e4m3 can hold.
#[test]
fn an_fp8_cache_is_within_its_rounding() {
    for element in [Element::Bf16, Element::F32] {
        let s = Shape { chunking: CHUNKS, block_size: 8, ..shape(4, 2, 32, &[(1, 70), (33, 50)]) };
        let ctx = context(EmulatedOptions::default(), Variant::Auto, element);
        let data = data(&s, element, 5);
        let rope = Rope::new(&ctx.driver, s.tables()).unwrap();
        let scales: Vec<f32> = (0..8).map(|i| 0.01 + 0.005 * i as f32).collect();
        let kv =
            KvCache::with_element(&ctx.driver, s.layout(DType::BF16), Element::E4m3, Some(&scales)).unwrap();
        run(&ctx, &s, &data, &rope, &kv, &[(0, 0, 69), (1, 0, 17)]);
        let parts = [(0, 69, 1), (1, 17, 33)];
        let got = run(&ctx, &s, &data, &rope, &kv, &parts);
        let mut rows = got.chunks_exact(s.query_heads * s.head_dim);
        for (index, first, count) in parts {
            let reference = Reference::new(&s, &data, index);
            for position in first..first + count {
                let exact = reference.row(position);
                let error = relative_error(rows.next().unwrap(), &exact);
                // Three mantissa bits: half a unit is 2^-4 of a value; averaged over keys.
                assert!(error < 0.08, "{index} {position}: {error}");
                assert!(error > 1e-4, "an fp8 cache cannot be exact");
            }
        }
        assert!(
            KvCache::with_element(&ctx.driver, s.layout(DType::BF16), Element::E4m3, Some(&[1.0])).is_err()
        );
    }
}

/// Every e4m3 code and every tie, through the cache: what is written is the nearest code, ties to even, saturated.
#[test]
fn e4m3_rounds_to_nearest_even() {
    let decode = |code: u8| -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = match exponent {
            0 => mantissa * 2f64.powi(-9),
            _ => (8.0 + mantissa) * 2f64.powi(exponent - 10),
        };
        if code & 0x80 != 0 { -magnitude } else { magnitude }
    };
    // Codes, midpoints between neighbours, just beside midpoints, beyond the largest.
    let mut cases: Vec<(f32, u8)> = Vec::new();
    for code in 0..0x7fu8 {
        cases.push((decode(code) as f32, code));
        if code > 0 {
            cases.push((-decode(code) as f32, code | 0x80));
        }
        if code < 0x7e {
            let middle = ((decode(code) + decode(code + 1)) / 2.0) as f32;
            cases.push((middle, code + (code & 1)));
            cases.push((f32::from_bits(middle.to_bits() + 1), code + 1));
            cases.push((f32::from_bits(middle.to_bits() - 1), code));
        }
    }
    cases.extend([(449.0, 0x7e), (1e30, 0x7e), (-1e30, 0xfe), (1e-9, 0)]);
    let d = 256;
    let rows = cases.len().div_ceil(d);
    let mut values: Vec<f32> = cases.iter().map(|c| c.0).collect();
    values.resize(rows * d, 0.0);
    let s = Shape { block_size: 8, ..shape(1, 1, d, &[(rows, rows)]) };
    let ctx = context(EmulatedOptions::default(), Variant::Plain, Element::F32);
    let rope = Rope::new(&ctx.driver, s.tables()).unwrap();
    let kv = KvCache::with_element(&ctx.driver, s.layout(DType::BF16), Element::E4m3, None).unwrap();
    let table: Vec<u32> = (0..rows.div_ceil(8) as u32).collect();
    let sequence = SequenceInputs { rows, kv_len: rows, block_table: table };
    let inputs = StepInputs {
        ids: vec![0; rows],
        logit_scales: vec![1.0; rows],
        sequences: vec![sequence],
        logit_rows: vec![],
    };
    let mut qkv = Vec::new();
    for row in values.chunks_exact(d) {
        qkv.extend(vec![0.0; 2 * d]);
        qkv.extend(row);
    }
    let tensor = ctx.tensor_from_f32(&qkv, rows, 3 * d, Element::F32).unwrap();
    rope_and_cache(&ctx, &tensor, None, &rope, &upload(&ctx, inputs), &kv, 0).unwrap();
    let mut stored = vec![0u8; rows * d];
    ctx.driver.download(kv.layer(0).values, &mut stored).unwrap();
    for ((value, code), got) in cases.iter().zip(stored) {
        assert_eq!(got, *code, "{value:e}");
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let s = shape(2, 1, 16, &[(2, 2)]);
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let data = data(&s, Element::Bf16, 1);
    let rope = Rope::new(&ctx.driver, s.tables()).unwrap();
    let kv = KvCache::new(&ctx.driver, s.layout(DType::BF16)).unwrap();
    let step = upload(&ctx, step_inputs(&s, &data, &[(0, 0, 2)]));
    let q = |cols: usize| ctx.tensor_from_f32(&vec![0.0; 2 * cols], 2, cols, Element::Bf16).unwrap();
    for (tensor, layer) in [(q(31), 0), (q(32), 2)] {
        let error = attention(&ctx, &tensor, &rope, &step, &kv, layer).err().unwrap();
        assert!(matches!(error, CudaError::Shape { op: "attention", .. }), "{error}");
    }
    assert!(rope_and_cache(&ctx, &q(65), None, &rope, &step, &kv, 0).is_err());
    // A table of one row does not reach position 1.
    let short = RopeTables { rows: 1, ..s.tables() };
    let short = Rope::new(&ctx.driver, short).unwrap();
    let error = attention(&ctx, &q(32), &short, &step, &kv, 0).err().unwrap().to_string();
    assert!(error.contains("position 1"), "{error}");
}

//! Gathers and the gated activation against plain arithmetic.

mod common;

use std::sync::Arc;

use common::{Random, context, relative_error, schedules, tolerance};
use longhaul_backend::{HostTensor, SequenceInputs, StepInputs};
use longhaul_cuda::driver::{Element, EmulatedOptions, Memory};
use longhaul_cuda::ops::activation::silu_and_mul;
use longhaul_cuda::ops::embedding::{embed, embed_slice, gather_logit_rows};
use longhaul_cuda::step::Step;
use longhaul_cuda::weights::Matrix;
use longhaul_cuda::{Context, CudaError, Variant};

fn step(ctx: &Context, ids: Vec<u32>, logit_rows: Vec<usize>) -> Step {
    let rows = ids.len();
    let inputs = StepInputs {
        ids,
        logit_scales: vec![1.0; rows],
        sequences: vec![SequenceInputs { rows, kv_len: rows, block_table: vec![0] }],
        logit_rows,
    };
    let memory = Memory::new(&ctx.driver, Step::capacity_bytes(rows, 1, 1), "step").unwrap();
    Step::upload(&ctx.driver, Arc::new(memory), inputs).unwrap()
}

#[test]
fn gathers_copy_exactly() {
    for (options, element) in schedules().into_iter().zip([Element::Bf16, Element::F32].into_iter().cycle()) {
        let ctx = context(options, Variant::Auto, element);
        for (vocab, hidden) in [(1, 1), (331, 7), (50, 896), (9, 3584)] {
            let mut random = Random(hidden as u64);
            let table = random.exact(vocab * hidden, element);
            let host = HostTensor::from_f32(vec![vocab, hidden], &table).unwrap();
            let matrix = Matrix::new(&ctx.driver, &[host], element).unwrap();
            let ids: Vec<u32> =
                (0..5).map(|_| random.below(vocab) as u32).chain([vocab as u32 - 1]).collect();
            let step = step(&ctx, ids.clone(), vec![0, 3, 5]);
            let rows = embed(&ctx, &matrix, &step).unwrap();
            let expected: Vec<f32> =
                ids.iter().flat_map(|&id| table[id as usize * hidden..][..hidden].to_vec()).collect();
            assert_eq!(ctx.tensor_to_f32(&rows).unwrap(), expected);
            let wanted = gather_logit_rows(&ctx, &rows, &step).unwrap();
            let expected: Vec<f32> =
                [0, 3, 5].iter().flat_map(|&r| expected[r * hidden..][..hidden].to_vec()).collect();
            assert_eq!(ctx.tensor_to_f32(&wanted).unwrap(), expected);
        }
    }
}

/// The slices of all ranks, empty ones included, add up to the whole table's rows.
#[test]
fn slices_of_the_vocabulary_add_up() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::F32);
    let (vocab, hidden) = (50, 36);
    let table = Random(5).values(vocab * hidden);
    let ids = vec![0, 15, 16, 17, 31, 32, 49];
    let step = step(&ctx, ids.clone(), vec![]);
    let mut sum = vec![0.0; ids.len() * hidden];
    for (first, end) in [(0, 16), (16, 16), (16, 32), (32, 50)] {
        let part = &table[first * hidden..end * hidden];
        let host = HostTensor::from_f32(vec![end - first, hidden], part).unwrap();
        let matrix = Matrix::new(&ctx.driver, &[host], Element::F32).unwrap();
        let rows = ctx.tensor_to_f32(&embed_slice(&ctx, &matrix, first, vocab, &step).unwrap()).unwrap();
        for (row, id) in rows.chunks_exact(hidden).zip(&ids) {
            let ours = (first..end).contains(&(*id as usize));
            assert!(ours || row.iter().all(|value| value.to_bits() == 0), "id {id} in {first}..{end}");
        }
        sum.iter_mut().zip(rows).for_each(|(sum, value)| *sum += value);
        assert!(embed_slice(&ctx, &matrix, vocab + 1, vocab, &step).is_err());
    }
    let expected: Vec<f32> =
        ids.iter().flat_map(|&id| table[id as usize * hidden..][..hidden].to_vec()).collect();
    assert_eq!(sum, expected);
}

#[test]
fn an_id_outside_the_table_is_an_error() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::F32);
    let host = HostTensor::from_f32(vec![2, 4], &[0.0; 8]).unwrap();
    let matrix = Matrix::new(&ctx.driver, &[host], Element::F32).unwrap();
    let error = embed(&ctx, &matrix, &step(&ctx, vec![1, 2], vec![])).err().unwrap();
    assert!(matches!(error, CudaError::Shape { op: "embed", .. }), "{error}");
    let x = ctx.tensor_from_f32(&[0.0; 4], 1, 4, Element::F32).unwrap();
    assert!(gather_logit_rows(&ctx, &x, &step(&ctx, vec![0, 1], vec![1])).is_err());
}

#[test]
fn the_gated_activation_matches_float64() {
    for (options, element) in schedules().into_iter().zip([Element::Bf16, Element::F32].into_iter().cycle()) {
        let ctx = context(options, Variant::Auto, element);
        for (rows, n) in [(1, 1), (3, 33), (2, 256), (5, 257), (65, 24)] {
            let x: Vec<f32> =
                Random(n as u64).exact(rows * 2 * n, element).iter().map(|v| v * 16.0).collect();
            let tensor = ctx.tensor_from_f32(&x, rows, 2 * n, element).unwrap();
            let exact: Vec<f64> = x
                .chunks_exact(2 * n)
                .flat_map(|row| {
                    (0..n).map(|i| {
                        let (gate, up) = (f64::from(row[i]), f64::from(row[n + i]));
                        gate / (1.0 + (-gate).exp()) * up
                    })
                })
                .collect();
            let out = silu_and_mul(&ctx, &tensor).unwrap();
            let error = relative_error(&ctx.tensor_to_f32(&out).unwrap(), &exact);
            assert!(error <= tolerance(element), "[{rows}, {n}] {element:?}: {error}");
        }
        let odd = ctx.tensor_from_f32(&[0.0; 3], 1, 3, element).unwrap();
        assert!(matches!(silu_and_mul(&ctx, &odd), Err(CudaError::Shape { .. })));
    }
}

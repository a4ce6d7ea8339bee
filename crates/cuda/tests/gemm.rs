//! Dense products against float64.

mod common;

use common::{Random, context, relative_error, schedules, tolerance};
use longhaul_backend::HostTensor;
use longhaul_cuda::driver::{Element, EmulatedOptions};
use longhaul_cuda::ops::gemm::{linear, linear_silu_and_mul};
use longhaul_cuda::weights::{Matrix, Vector};
use longhaul_cuda::{Context, CudaError, Tensor, Variant};

struct Case {
    x: Tensor,
    weight: Matrix,
    bias: Vector,
    exact: Vec<f64>,
}

/// Random operands and their product with bias, in float64.
fn case(ctx: &Context, rows: usize, n: usize, k: usize) -> Case {
    let mut random = Random((rows * 1_000_003 + n * 1009 + k) as u64);
    let (x, w) = (random.exact(rows * k, ctx.element), random.exact(n * k, ctx.element));
    let bias = random.values(n);
    let mut exact = Vec::with_capacity(rows * n);
    for row in x.chunks_exact(k) {
        for (weights, b) in w.chunks_exact(k).zip(&bias) {
            exact.push(
                row.iter().zip(weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                    + f64::from(*b),
            );
        }
    }
    Case {
        x: ctx.tensor_from_f32(&x, rows, k, ctx.element).unwrap(),
        weight: matrix(ctx, n, k, &w),
        bias: Vector::new(&ctx.driver, &[HostTensor::from_f32(vec![n], &bias).unwrap()]).unwrap(),
        exact,
    }
}

fn matrix(ctx: &Context, rows: usize, cols: usize, values: &[f32]) -> Matrix {
    let host = HostTensor::from_f32(vec![rows, cols], values).unwrap();
    Matrix::new(&ctx.driver, &[host], ctx.element).unwrap()
}

#[track_caller]
fn check(ctx: &Context, rows: usize, n: usize, k: usize, out: Element) {
    let case = case(ctx, rows, n, k);
    let got = linear(ctx, &case.x, &case.weight, Some(&case.bias), out).unwrap();
    let error = relative_error(&ctx.tensor_to_f32(&got).unwrap(), &case.exact);
    assert!(error <= tolerance(out), "[{rows}, {k}] x [{n}, {k}] {:?} to {out:?}: {error}", ctx.element);
}

const ROWS: [usize; 15] = [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65];
/// (n, k): multiples of nothing, of the tile, below and above one tile.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (8, 8), (24, 96), (96, 24), (130, 128), (264, 224), (331, 130), (64, 904), (1021, 72)];

#[test]
fn every_row_count_and_shape_matches_float64() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    for rows in ROWS {
        for (n, k) in SHAPES {
            check(&ctx, rows, n, k, Element::Bf16);
        }
        check(&ctx, rows, 331, 130, Element::F32);
    }
}

/// Every count of rows up to beyond a wide tile, over shapes that are multiples of nothing, with the library's product and
/// with the wide kernel above 64 rows.
#[test]
fn every_row_count_to_130_matches_float64() {
    let schedules = schedules();
    for rows in 1..=130 {
        let options = schedules[rows % schedules.len()];
        let variant = if rows % 3 == 0 { Variant::Auto } else { Variant::Mma };
        let ctx = context(EmulatedOptions { multiprocessors: 3, ..options }, variant, Element::Bf16);
        let out = if rows % 2 == 0 { Element::Bf16 } else { Element::F32 };
        check(&ctx, rows, 67 + rows % 5, 75 + rows % 7, out);
    }
}

/// The wide kernel: tiles that are full, one row or column over, and one short; k below, at and beyond its ring.
#[test]
fn the_wide_kernel_matches_float64_under_every_schedule() {
    for options in schedules() {
        let ctx = context(options, Variant::Mma, Element::Bf16);
        for (rows, n, k) in [(65, 1, 1), (127, 129, 31), (128, 128, 128), (129, 127, 161), (300, 43, 33)] {
            check(&ctx, rows, n, k, Element::Bf16);
            check(&ctx, rows, n, k, Element::F32);
        }
    }
}

/// More tiles of rows than go through a tile of columns together.
#[test]
fn the_wide_kernel_orders_many_tiles() {
    let ctx = context(EmulatedOptions::default(), Variant::Mma, Element::Bf16);
    check(&ctx, 9 * 128 + 1, 130, 8, Element::F32);
}

/// A row's product has the same bits wherever it lies among many rows.
#[test]
fn a_row_of_the_wide_kernel_does_not_depend_on_the_others() {
    let (n, k) = (133, 100);
    let mut first: Option<Vec<f32>> = None;
    for options in schedules() {
        let ctx = context(options, Variant::Mma, Element::Bf16);
        let all = case(&ctx, 200, n, k);
        let values = ctx.tensor_to_f32(&all.x).unwrap();
        for (from, rows) in [(0, 200), (3, 70), (0, 65)] {
            let x = ctx.tensor_from_f32(&values[from * k..][..rows * k], rows, k, Element::Bf16).unwrap();
            let out = linear(&ctx, &x, &all.weight, None, Element::F32).unwrap();
            let row = ctx.tensor_to_f32(&out).unwrap()[(5 - from) * n..][..n].to_vec();
            assert!(
                *first.get_or_insert_with(|| row.clone()) == row,
                "row 5 of {rows} from {from}, {options:?}"
            );
        }
    }
}

/// The vocabularies' kind of n: large, prime, more tiles than blocks.
#[test]
fn a_vocabulary_that_nothing_divides() {
    for (options, rows) in schedules().into_iter().zip([1, 3, 8, 17, 33, 66]) {
        let ctx = context(options, Variant::Mma, Element::Bf16);
        check(&ctx, rows, 4099, 24, Element::F32);
    }
}

#[test]
fn the_plain_kernels_match_float64() {
    for element in [Element::Bf16, Element::F32] {
        let ctx = context(EmulatedOptions::default(), Variant::Plain, element);
        for rows in [1, 3, 65] {
            for (n, k) in SHAPES {
                check(&ctx, rows, n, k, element);
            }
        }
    }
}

/// Partitions of 1, 3 and 8 multiprocessors cut tiles at different places; every schedule must merge them alike.
#[test]
fn every_schedule_and_partition_matches_float64() {
    for options in schedules() {
        for multiprocessors in [1, 3, 8] {
            let ctx = context(EmulatedOptions { multiprocessors, ..options }, Variant::Auto, Element::Bf16);
            for (rows, n, k) in
                [(1, 64, 904), (5, 331, 130), (16, 130, 520), (33, 100, 264), (64, 72, 136), (2, 700, 72)]
            {
                check(&ctx, rows, n, k, Element::Bf16);
            }
        }
    }
}

/// A row's product has the same bits alone and among others, and in every schedule.
#[test]
fn a_row_does_not_depend_on_the_batch() {
    let (n, k) = (200, 520);
    let mut first: Option<Vec<f32>> = None;
    for options in schedules() {
        let ctx = context(options, Variant::Auto, Element::Bf16);
        let all = case(&ctx, 64, n, k);
        let values = ctx.tensor_to_f32(&all.x).unwrap();
        for rows in [1, 8, 9, 17, 64] {
            let x = ctx.tensor_from_f32(&values[..rows * k], rows, k, Element::Bf16).unwrap();
            let out = linear(&ctx, &x, &all.weight, None, Element::F32).unwrap();
            let row = ctx.tensor_to_f32(&out).unwrap()[..n].to_vec();
            assert!(*first.get_or_insert_with(|| row.clone()) == row, "{rows} rows, {options:?}");
        }
    }
}

#[test]
fn the_gated_product_matches_float64() {
    for (variant, element) in [
        (Variant::Auto, Element::Bf16),
        (Variant::Mma, Element::Bf16),
        (Variant::Plain, Element::Bf16),
        (Variant::Auto, Element::F32),
    ] {
        for options in schedules().into_iter().step_by(2) {
            let ctx = context(options, variant, element);
            for (rows, n, k) in
                [(1, 32, 64), (3, 33, 72), (9, 100, 130), (33, 65, 200), (64, 24, 24), (70, 40, 48)]
            {
                let mut random = Random((rows + n + k) as u64);
                let (x, w) = (random.exact(rows * k, element), random.exact(2 * n * k, element));
                let dot = |a: &[f32], b: &[f32]| -> f64 {
                    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                let mut exact = Vec::new();
                for row in x.chunks_exact(k) {
                    for column in 0..n {
                        let gate = dot(row, &w[column * k..][..k]);
                        exact.push(gate / (1.0 + (-gate).exp()) * dot(row, &w[(n + column) * k..][..k]));
                    }
                }
                let (x, w) = (ctx.tensor_from_f32(&x, rows, k, element).unwrap(), matrix(&ctx, 2 * n, k, &w));
                let out = linear_silu_and_mul(&ctx, &x, &w).unwrap();
                let error = relative_error(&ctx.tensor_to_f32(&out).unwrap(), &exact);
                // Two factors are rounded to bf16 before the product is.
                assert!(error <= 3.0 * tolerance(element), "[{rows}, {k}], n {n}, {element:?}: {error}");
            }
        }
    }
}

/// The counters are zero again after a launch: a recording replays to the same bits.
#[test]
fn a_replayed_product_gives_the_same_bits() {
    let ctx = context(
        EmulatedOptions { eager: false, resident_blocks: 4, ..EmulatedOptions::default() },
        Variant::Auto,
        Element::Bf16,
    );
    let case = case(&ctx, 4, 100, 520);
    ctx.driver.begin_recording().unwrap();
    let out = linear(&ctx, &case.x, &case.weight, None, Element::F32).unwrap();
    let graph = ctx.driver.end_recording().unwrap();
    let mut runs = Vec::new();
    for _ in 0..3 {
        ctx.driver.fill(out.address(), 0xff, 4 * out.stride * 4).unwrap();
        ctx.driver.replay(graph).unwrap();
        runs.push(ctx.tensor_to_f32(&out).unwrap());
    }
    assert!(runs[0].iter().all(|v| v.is_finite()));
    assert!(runs.iter().all(|run| *run == runs[0]));
}

#[test]
fn wrong_shapes_are_errors() {
    let ctx = context(EmulatedOptions::default(), Variant::Auto, Element::Bf16);
    let case = case(&ctx, 2, 16, 24);
    let other = ctx.tensor_from_f32(&[0.0; 50], 2, 25, Element::Bf16).unwrap();
    let error = linear(&ctx, &other, &case.weight, None, Element::Bf16).err().unwrap();
    assert!(matches!(error, CudaError::Shape { op: "linear", .. }), "{error}");
    let odd = matrix(&ctx, 3, 24, &[0.0; 72]);
    assert!(matches!(linear_silu_and_mul(&ctx, &case.x, &odd), Err(CudaError::Shape { .. })));
    let float = ctx.tensor_from_f32(&[0.0; 48], 2, 24, Element::F32).unwrap();
    assert!(linear(&ctx, &float, &case.weight, None, Element::F32).is_err());
}

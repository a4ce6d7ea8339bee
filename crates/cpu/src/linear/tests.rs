//! The linear op against f64 on every ISA, dtype and precision, over shapes that fit nothing; and its invariances.
use half::{bf16, f16};
use longhaul_backend::HostTensor;
use rayon::ThreadPoolBuilder;

use super::task::TASK_ROWS;
use super::*;

/// Values in about [-1, 1), from a hash of the index.
fn values(n: usize, salt: u64) -> Vec<f32> {
    (0..n as u64)
        .map(|i| {
            let mut h =
                (i ^ salt << 40).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            h = (h ^ h >> 31).wrapping_mul(0x94d0_49bb_1331_11eb);
            (h >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn tensor(dtype: DType, rows: usize, cols: usize, salt: u64) -> HostTensor<'static> {
    let values = values(rows * cols, salt);
    let bytes: Vec<u8> = match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F8E4M3 => panic!("no matrix is {dtype}"),
    };
    HostTensor::new(dtype, vec![rows, cols], bytes.into()).unwrap()
}

/// Every way to compute that this CPU has: ISA, dtype of the weights, precision.
fn ways() -> Vec<(Gemm, DType)> {
    let mut ways = Vec::new();
    for isa in Isa::available() {
        ways.extend(
            [DType::F32, DType::F16, DType::BF16].map(|d| (Gemm { isa, precision: Precision::F32 }, d)),
        );
        ways.extend([DType::F16, DType::BF16].map(|d| (Gemm { isa, precision: Precision::Bf16 }, d)));
    }
    ways
}

/// The exact product, and for each element the sum of the magnitudes of its terms, that rounding errors scale with.
fn reference(
    gemm: Gemm,
    x: &[f32],
    m: usize,
    weight: &HostTensor<'_>,
    bias: Option<&[f32]>,
) -> (Vec<f64>, Vec<f64>) {
    let (rows, cols) = weight.matrix_dims().unwrap();
    let rounds = gemm.precision == Precision::Bf16 && weight.dtype() == DType::BF16;
    let x: Vec<f64> =
        x.iter().map(|&v| if rounds { bf16::from_f32(v).to_f64() } else { f64::from(v) }).collect();
    let w: Vec<f64> = weight.to_f32().into_iter().map(f64::from).collect();
    let (mut sums, mut scales) = (vec![], vec![]);
    for r in 0..m {
        for o in 0..rows {
            let start = bias.map_or(0.0, |b| f64::from(b[o]));
            let terms = || x[r * cols..][..cols].iter().zip(&w[o * cols..]).map(|(a, b)| a * b);
            sums.push(start + terms().sum::<f64>());
            scales.push(start.abs() + terms().map(f64::abs).sum::<f64>());
        }
    }
    (sums, scales)
}

/// Error of a chain of `n` rounded additions relative to its terms: a random walk, with room for its tail.
fn tolerance(n: usize) -> f64 {
    f64::from(f32::EPSILON) * (2.0 + (n as f64).sqrt())
}

/// Runs `f` on NaN-poisoned memory between guards, and checks that exactly the middle was written.
fn guarded(len: usize, f: impl FnOnce(&mut [f32])) -> Vec<f32> {
    const GUARD: usize = 64;
    let mut memory = vec![f32::NAN; len + 2 * GUARD];
    memory[..GUARD].fill(123.0);
    memory[GUARD + len..].fill(123.0);
    f(&mut memory[GUARD..GUARD + len]);
    assert!(
        memory[..GUARD].iter().chain(&memory[GUARD + len..]).all(|&v| v == 123.0),
        "written out of bounds"
    );
    memory[GUARD..GUARD + len].to_vec()
}

fn check_linear(m: usize, rows: usize, cols: usize) {
    let x = values(m * cols, 1);
    let bias = values(rows, 2);
    for (gemm, dtype) in ways() {
        let weight = tensor(dtype, rows, cols, 3);
        let matrix = Matrix::pack(std::slice::from_ref(&weight)).unwrap();
        for bias in [None, Some(bias.as_slice())] {
            let out = guarded(m * rows, |out| gemm.linear(&x, m, &matrix, bias, out).unwrap());
            let (exact, scale) = reference(gemm, &x, m, &weight, bias);
            for (i, &y) in out.iter().enumerate() {
                let limit = tolerance(cols) * scale[i];
                assert!(
                    (f64::from(y) - exact[i]).abs() <= limit,
                    "{gemm:?} {dtype} [{m}, {cols}] x [{rows}]: ({}, {}) is {y}, not {} +- {limit:e}",
                    i / rows,
                    i % rows,
                    exact[i]
                );
            }
        }
    }
}

#[test]
fn small_shapes_match_f64() {
    for cols in [1, 2, 3, 7, 16, 31] {
        for rows in [1, 15, 16, 17, 31, 33, 63, 64, 65, 130] {
            for m in [1, 2, 5, 6, 7, 13] {
                check_linear(m, rows, cols);
            }
        }
    }
}

#[test]
fn long_sums_match_f64() {
    for (m, rows, cols) in [(1, 33, 4863), (3, 17, 4864), (7, 70, 4865), (64, 47, 896), (130, 66, 897)] {
        check_linear(m, rows, cols);
    }
}

#[test]
fn more_rows_than_a_task_takes() {
    check_linear(2 * TASK_ROWS + 9, 20, 40);
}

#[test]
fn an_empty_batch_is_no_work() {
    let matrix = Matrix::pack(&[tensor(DType::BF16, 8, 8, 0)]).unwrap();
    Gemm { isa: Isa::Scalar, precision: Precision::F32 }.linear(&[], 0, &matrix, None, &mut []).unwrap();
}

fn same_bits(found: &[f32], expected: &[f32], what: std::fmt::Arguments<'_>) {
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == b.to_bits(), "{what}: column {i} is {a:?}, alone {b:?}");
    }
}

/// The rows of a batch of 64 alone, then in batches of other sizes at other places, and in pools of other sizes.
fn check_invariance(
    rows: usize,
    cols: usize,
    out_cols: usize,
    op: impl Fn(Gemm, &[f32], usize, &Matrix, &mut [f32]) + Sync,
) {
    let m = 64;
    let x = values(m * cols, 4);
    let row = |r: usize| &x[r * cols..][..cols];
    for (gemm, dtype) in ways() {
        let matrix = Matrix::pack(&[tensor(dtype, rows, cols, 5)]).unwrap();
        let mut alone = vec![f32::NAN; m * out_cols];
        for r in 0..m {
            op(gemm, row(r), 1, &matrix, &mut alone[r * out_cols..][..out_cols]);
        }
        for threads in [1, 2, 5] {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for batch in [2, 5, 6, 7, 13, 64] {
                // Each batch size at another offset, in reverse order when odd.
                let order: Vec<usize> = (0..batch)
                    .map(|i| if batch % 2 == 1 { (m - 1 - i + batch) % m } else { (i + 3 * batch) % m })
                    .collect();
                let input: Vec<f32> = order.iter().flat_map(|&r| row(r).to_vec()).collect();
                let mut out = vec![f32::NAN; batch * out_cols];
                pool.install(|| op(gemm, &input, batch, &matrix, &mut out));
                for (i, &r) in order.iter().enumerate() {
                    same_bits(
                        &out[i * out_cols..][..out_cols],
                        &alone[r * out_cols..],
                        format_args!("{gemm:?} {dtype}, row {i} of {batch}, {threads} threads"),
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    let bias = values(100, 6);
    // Long enough for several blocks of weights, odd, and with a partial panel.
    check_invariance(83, 1537, 83, |gemm, x, m, w, out| {
        gemm.linear(x, m, w, Some(&bias[..83]), out).unwrap()
    });
}

#[test]
fn a_gated_row_has_the_same_bits_in_any_batch() {
    for n in [48, 40] {
        check_invariance(2 * n, 897, n, |gemm, x, m, w, out| gemm.linear_silu_mul(x, m, w, out).unwrap());
    }
}

#[test]
fn silu_mul_is_the_gated_product() {
    for (m, n, cols) in [(1, 16, 33), (7, 48, 64), (5, 32, 700), (9, 21, 40), (300, 16, 8), (1, 1, 1)] {
        let x = values(m * cols, 7);
        for (gemm, dtype) in ways() {
            let (gate, up) = (tensor(dtype, n, cols, 8), tensor(dtype, n, cols, 9));
            let matrix = Matrix::pack(&[gate.clone(), up.clone()]).unwrap();
            let out = guarded(m * n, |out| gemm.linear_silu_mul(&x, m, &matrix, out).unwrap());
            let (gate, gate_scale) = reference(gemm, &x, m, &gate, None);
            let (up, up_scale) = reference(gemm, &x, m, &up, None);
            for (i, &y) in out.iter().enumerate() {
                let silu = gate[i] / (1.0 + (-gate[i]).exp());
                // |silu'| <= 1.1, |silu(g)| <= |g|; the last term is the error of silu itself and of the product.
                let eps = tolerance(cols);
                let limit = eps * (1.1 * gate_scale[i] * up[i].abs() + gate[i].abs() * up_scale[i])
                    + 8.0 * f64::from(f32::EPSILON) * (silu * up[i]).abs()
                    + eps * eps * gate_scale[i] * up_scale[i];
                assert!(
                    (f64::from(y) - silu * up[i]).abs() <= limit,
                    "{gemm:?} {dtype} [{m}, {cols}] x [{n}] at {i}: {y}, not {}",
                    silu * up[i]
                );
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    let (m, rows, cols) = (9, 50, 33);
    let clean = values(m * cols, 10);
    for (gemm, dtype) in ways() {
        let matrix = Matrix::pack(&[tensor(dtype, rows, cols, 11)]).unwrap();
        let mut expected = vec![0.0; m * rows];
        gemm.linear(&clean, m, &matrix, None, &mut expected).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = clean.clone();
            x[4 * cols + cols - 1] = bad;
            let mut out = vec![0.0; m * rows];
            gemm.linear(&x, m, &matrix, None, &mut out).unwrap();
            for r in 0..m {
                let row = &out[r * rows..][..rows];
                if r == 4 {
                    assert!(row.iter().all(|v| !v.is_finite()), "{gemm:?} {dtype}: {row:?}");
                } else {
                    same_bits(row, &expected[r * rows..], format_args!("{gemm:?} {dtype} row {r}"));
                }
            }
        }
    }
}

#[test]
fn wrong_lengths_are_named() {
    let gemm = Gemm { isa: Isa::Scalar, precision: Precision::F32 };
    let matrix = Matrix::pack(&[tensor(DType::F32, 5, 3, 0)]).unwrap();
    let mut out = [0.0; 10];
    let message = |r: Result<()>| r.unwrap_err().to_string();
    assert_eq!(
        message(gemm.linear(&[0.0; 5], 2, &matrix, None, &mut out)),
        "linear: x holds 5 values, expected [2, 3]"
    );
    assert!(message(gemm.linear(&[0.0; 6], 2, &matrix, None, &mut out[1..])).contains("out holds 9"));
    assert!(message(gemm.linear(&[0.0; 6], 2, &matrix, Some(&[0.0; 4]), &mut out)).contains("bias holds 4"));
    assert!(message(gemm.linear(&[], usize::MAX, &matrix, None, &mut out)).contains("x holds 0"));
    assert!(message(gemm.linear_silu_mul(&[0.0; 6], 2, &matrix, &mut out)).contains("even number of rows"));
}

/// What a rank that holds nothing of a matrix computes.
#[test]
fn a_product_over_nothing_is_the_bias() {
    for (gemm, dtype) in ways() {
        let bias = values(5, 1);
        let nothing = Matrix::pack(&[tensor(dtype, 5, 0, 1)]).unwrap();
        let mut out = vec![f32::NAN; 15];
        gemm.linear(&[], 3, &nothing, Some(&bias), &mut out).unwrap();
        assert_eq!(out, [bias.clone(), bias.clone(), bias].concat());
        gemm.linear(&[], 3, &nothing, None, &mut out).unwrap();
        assert_eq!(out, [0.0; 15]);
        let no_outputs = Matrix::pack(&[tensor(dtype, 0, 7, 1), tensor(dtype, 0, 7, 2)]).unwrap();
        gemm.linear(&values(21, 2), 3, &no_outputs, None, &mut []).unwrap();
        gemm.linear_silu_mul(&values(21, 2), 3, &no_outputs, &mut []).unwrap();
    }
}

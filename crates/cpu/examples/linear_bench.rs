//! Rates of the linear op on the shapes of Qwen2-0.5B, beside what this machine can do.
//!
//! `cargo run --release -p longhaul-cpu --example linear_bench [-- ROWS...]`. Every figure is the best of many short
//! runs; the limits are measured first, by loops of independent multiply-adds and by reading a buffer larger than any cache.
use std::borrow::Cow;
use std::hint::black_box;
use std::time::{Duration, Instant};

use longhaul_backend::{DType, HostTensor};
use longhaul_cpu::linear::{Gemm, Precision};
use longhaul_cpu::matrix::Matrix;
use longhaul_cpu::simd::{Isa, Simd, SimdOp};
use rayon::prelude::*;

/// Best wall time of `f` within about `budget`, at least 3 runs.
fn best(budget: Duration, mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 3 || start.elapsed() < budget {
        let run = Instant::now();
        f();
        best = best.min(run.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

const CHAINS: usize = 12;
const REPEATS: usize = 200_000;

/// Independent chains of `mul_add`, or of bf16 dot products.
#[derive(Clone, Copy)]
struct Chains {
    dot: bool,
}

impl SimdOp for Chains {
    type Output = (f32, usize);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, usize) {
        let x = s.splat(black_box(0.999));
        let pair = s.splat_pair(black_box(0x3f7f_3f7f));
        let mut acc = [s.splat(black_box(1.0)); CHAINS];
        for _ in 0..REPEATS {
            for acc in &mut acc {
                *acc = if self.dot { s.dot_pairs(*acc, pair, pair) } else { s.mul_add(x, x, *acc) };
            }
        }
        let sum = acc.into_iter().map(|v| s.reduce_add(v)).sum();
        (sum, if self.dot { 4 } else { 2 } * S::LANES * CHAINS * REPEATS)
    }
}

struct ReadAll<'a>(&'a [f32]);

impl SimdOp for ReadAll<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut acc = [s.splat(0.0); 4];
        for chunk in self.0.chunks_exact(4 * S::LANES) {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = s.max(*acc, s.load(&chunk[i * S::LANES..]));
            }
        }
        acc.into_iter().map(|v| s.reduce_max(v)).sum()
    }
}

fn peak(isa: Isa, dot: bool) -> f64 {
    let threads = rayon::current_num_threads();
    let flops = isa.dispatch(Chains { dot }).1 * threads;
    let time = best(Duration::from_millis(300), || {
        (0..threads).into_par_iter().for_each(|_| {
            black_box(isa.dispatch(Chains { dot }));
        });
    });
    flops as f64 / time
}

/// Reading rate of memory larger than any cache, in huge pages where the system grants them, as weights are.
fn bandwidth(isa: Isa) -> f64 {
    let mut memory = memmap2::MmapMut::map_anon(512 << 20).expect("memory");
    #[cfg(target_os = "linux")]
    memory.advise(memmap2::Advice::HugePage).unwrap_or_default();
    memory.par_chunks_mut(1 << 21).for_each(|c| c.fill(1));
    let values: &[f32] = bytemuck::cast_slice(&memory);
    let time = best(Duration::from_millis(1000), || {
        values.par_chunks(1 << 18).for_each(|c| {
            black_box(isa.dispatch(ReadAll(c)));
        });
    });
    memory.len() as f64 / time
}

fn random_matrix(dtype: DType, rows: usize, cols: usize) -> Matrix {
    let mut state = 1_u32;
    let data: Vec<u8> = (0..rows * cols)
        .flat_map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = state as f32 / u32::MAX as f32 - 0.5;
            match dtype {
                DType::F32 => value.to_le_bytes().to_vec(),
                DType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
                DType::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
                DType::F8E4M3 => panic!("no matrix is {dtype}"),
            }
        })
        .collect();
    let tensor = HostTensor::new(dtype, vec![rows, cols], Cow::Owned(data)).expect("sizes agree");
    let start = Instant::now();
    let matrix = Matrix::pack(&[tensor]).expect("enough memory");
    let gb = matrix.bytes() as f64 / 1e9;
    if rows > 100_000 {
        println!("packed {matrix:?} at {:.1} GB/s", gb / start.elapsed().as_secs_f64());
    }
    matrix
}

fn main() {
    let mut rows: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    if rows.is_empty() {
        rows = vec![1, 2, 4, 16, 64, 128, 512];
    }
    let isa = Isa::active().expect("LONGHAUL_CPU_ISA names an ISA of this CPU");
    let pool = rayon::ThreadPoolBuilder::new().build().expect("threads");
    pool.install(|| run(isa, &rows));
}

fn run(isa: Isa, rows: &[usize]) {
    let peaks = [peak(isa, false), peak(isa, true)];
    let read = bandwidth(isa);
    println!(
        "{isa}, {} threads: mul_add {:.0} GFLOP/s, bf16 dot {:.0} GFLOP/s, read {:.1} GB/s",
        rayon::current_num_threads(),
        peaks[0] / 1e9,
        peaks[1] / 1e9,
        read / 1e9
    );
    let shapes = [
        ("qkv", 1152, 896),
        ("o", 896, 896),
        ("gate_up", 9728, 896),
        ("down", 896, 4864),
        ("lm_head", 151_936, 896),
    ];
    for (name, out, cols) in shapes {
        let matrix = random_matrix(DType::BF16, out, cols);
        // Copies enough to leave the caches between decode steps, as the layers of a model do.
        let copies = (64_000_000 / matrix.bytes()).clamp(1, 24);
        let copies: Vec<Matrix> = (0..copies)
            .map(|i| if i == 0 { matrix.clone() } else { random_matrix(DType::BF16, out, cols) })
            .collect();
        for &m in rows {
            if name == "lm_head" && m > 16 {
                continue;
            }
            let x: Vec<f32> = (0..m * cols).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
            let mut y = vec![0.0; m * out];
            for (precision, peak) in [(Precision::F32, peaks[0]), (Precision::Bf16, peaks[1])] {
                let gemm = Gemm { isa, precision };
                let mut report = |op: &str, gated: bool| {
                    let mut at = 0;
                    let time = best(Duration::from_millis(250), || {
                        at = (at + 1) % copies.len();
                        if gated {
                            gemm.linear_silu_mul(&x, m, &copies[at], &mut y[..m * out / 2])
                        } else {
                            gemm.linear(&x, m, &copies[at], None, &mut y)
                        }
                        .expect("shapes agree");
                    });
                    let (flops, bytes) = (2.0 * (m * out * cols) as f64 / time, matrix.bytes() as f64 / time);
                    println!(
                        "{name:>8} {op:<6} m={m:<4} {precision:?}\t{:9.1} us {:7.1} GFLOP/s ({:3.0} %) {:6.2} GB/s ({:3.0} %)",
                        time * 1e6,
                        flops / 1e9,
                        100.0 * flops / peak,
                        bytes / 1e9,
                        100.0 * bytes / read
                    );
                };
                report("", false);
                if name == "gate_up" {
                    report("fused", true);
                }
            }
        }
    }
}

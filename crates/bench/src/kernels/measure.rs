//! Device times.

use longhaul_cuda::driver::{DevicePtr, Element, Gemm, Memory};
use longhaul_cuda::{Context, CudaError, Result};

use super::cases::Case;
use super::operands::Operands;

/// Launches in one recording: what a replay costs beside them becomes small.
const LAUNCHES: usize = 32;
/// Timed replays.
const REPLAYS: usize = 15;
/// Replays before the first timed one.
const WARM_UP: usize = 3;

/// Seconds a launch of `case`, median.
pub(super) fn case(ctx: &Context, case: &Case) -> Result<f64> {
    let operands = Operands::new(ctx)?;
    let run = (case.prepare)(&operands)?;
    run(ctx, 0)?;
    ctx.driver.synchronise()?;
    let seconds = if case.recordable {
        timed(ctx, &mut |i| run(ctx, i))? / LAUNCHES as f64
    } else {
        let times =
            (0..REPLAYS * 2).map(|i| elapsed(ctx, &mut || run(ctx, i))).collect::<Result<Vec<_>>>()?;
        median(times)
    };
    Ok(seconds)
}

/// Copy bandwidth (bytes per second, read plus written) and rate of a large library product (operations per second).
pub(super) fn limits(ctx: &Context) -> Result<(f64, f64)> {
    const COPY_BYTES: usize = 1 << 30;
    let from = Memory::new(&ctx.driver, COPY_BYTES, "copy source")?;
    let to = Memory::new(&ctx.driver, COPY_BYTES, "copy destination")?;
    ctx.driver.fill(from.address(), 1, COPY_BYTES)?;
    let copy =
        timed(ctx, &mut |_| ctx.driver.copy(to.address(), from.address(), COPY_BYTES))? / LAUNCHES as f64;
    drop((from, to));

    const N: usize = 8192;
    let operands = Operands::new(ctx)?;
    let weights = operands.matrices(N, N, 2)?;
    let out = Memory::new(&ctx.driver, N * N * 2, "product")?;
    let (Some(x), Some(weight)) = (weights.first(), weights.get(1)) else {
        return Err(CudaError::Unsupported("no operands for the product".into()));
    };
    let gemm = Gemm {
        x: x.address(),
        x_stride: x.stride,
        weight: weight.address(),
        weight_stride: weight.stride,
        bias: DevicePtr::NULL,
        out: out.address(),
        out_stride: N,
        m: N,
        n: N,
        k: N,
        element: Element::Bf16,
        out_element: Element::Bf16,
    };
    ctx.driver.gemm(&gemm)?;
    let product = timed(ctx, &mut |_| ctx.driver.gemm(&gemm))? / LAUNCHES as f64;
    Ok((2.0 * COPY_BYTES as f64 / copy, 2.0 * (N * N * N) as f64 / product))
}

/// Median seconds of a replay of [`LAUNCHES`] runs.
fn timed(ctx: &Context, run: &mut dyn FnMut(usize) -> Result<()>) -> Result<f64> {
    ctx.driver.begin_recording()?;
    let recorded = (0..LAUNCHES).try_for_each(&mut *run);
    let graph = ctx.driver.end_recording();
    recorded?;
    let graph = graph?;
    for _ in 0..WARM_UP {
        ctx.driver.replay(graph)?;
    }
    let times =
        (0..REPLAYS).map(|_| elapsed(ctx, &mut || ctx.driver.replay(graph))).collect::<Result<Vec<_>>>()?;
    Ok(median(times))
}

fn elapsed(ctx: &Context, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let milliseconds = ctx.driver.time(work)?;
    milliseconds
        .map(|ms| f64::from(ms) / 1e3)
        .ok_or_else(|| CudaError::Unsupported("this device has no clock".into()))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

//! Device times.

use longhaul_cuda::driver::{DevicePtr, Element, Gemm, GraphId, Memory};
use longhaul_cuda::{Context, CudaError, Result};

use super::cases::Case;
use super::operands::Operands;

/// Launches in one recording, of a short op: what a replay costs beside them becomes small.
const LAUNCHES: usize = 32;
/// Seconds of launches that make up a replay, at least one round of the operands.
const REPLAY_SECONDS: f64 = 5e-3;
/// Seconds of replays of one case.
const CASE_SECONDS: f64 = 0.2;
/// Least and most timed replays: a median wants a few, and more than that tells nothing.
const REPLAYS: (usize, usize) = (3, 15);

/// Seconds a launch of `case`, median.
pub(super) fn case(ctx: &Context, case: &Case) -> Result<f64> {
    let operands = Operands::new(ctx)?;
    let run = (case.prepare)(&operands)?;
    run(ctx, 0)?;
    ctx.driver.synchronise()?;
    if case.recordable {
        return timed(ctx, operands.sets(), &mut |i| run(ctx, i));
    }
    let times = (0..2 * REPLAYS.1).map(|i| elapsed(ctx, &mut || run(ctx, i))).collect::<Result<Vec<_>>>()?;
    Ok(median(times))
}

/// Bytes per second of a large copy within the device, read plus written.
pub(crate) fn copy_bandwidth(ctx: &Context) -> Result<f64> {
    const COPY_BYTES: usize = 1 << 30;
    let from = Memory::new(&ctx.driver, COPY_BYTES, "copy source")?;
    let to = Memory::new(&ctx.driver, COPY_BYTES, "copy destination")?;
    ctx.driver.fill(from.address(), 1, COPY_BYTES)?;
    let copy = timed(ctx, 1, &mut |_| ctx.driver.copy(to.address(), from.address(), COPY_BYTES))?;
    Ok(2.0 * COPY_BYTES as f64 / copy)
}

/// Copy bandwidth (bytes per second, read plus written) and rate of a large library product (operations per second).
pub(super) fn limits(ctx: &Context) -> Result<(f64, f64)> {
    let copy = copy_bandwidth(ctx)?;
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
    let product = timed(ctx, 1, &mut |_| ctx.driver.gemm(&gemm))?;
    Ok((copy, 2.0 * (N * N * N) as f64 / product))
}

/// Median seconds of one of `run`'s launches, which take `sets` sets of operands in turn.
pub(crate) fn timed(ctx: &Context, sets: usize, run: &mut dyn FnMut(usize) -> Result<()>) -> Result<f64> {
    let once = elapsed(ctx, &mut || run(0))?;
    // Whole rounds: a replay begins with the set that was used longest ago.
    let wanted = ((REPLAY_SECONDS / once) as usize).clamp(1, LAUNCHES);
    let launches = wanted.next_multiple_of(sets.max(1));
    ctx.driver.begin_recording()?;
    let recorded = (0..launches).try_for_each(&mut *run);
    let graph = ctx.driver.end_recording();
    recorded?;
    let graph = graph?;
    let times = replays(ctx, graph, once * launches as f64);
    ctx.driver.drop_graph(graph);
    Ok(median(times?) / launches as f64)
}

fn replays(ctx: &Context, graph: GraphId, seconds: f64) -> Result<Vec<f64>> {
    let count = ((CASE_SECONDS / seconds) as usize).clamp(REPLAYS.0, REPLAYS.1);
    ctx.driver.replay(graph)?;
    (0..count).map(|_| elapsed(ctx, &mut || ctx.driver.replay(graph))).collect()
}

/// Seconds that the device spends on `work`.
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

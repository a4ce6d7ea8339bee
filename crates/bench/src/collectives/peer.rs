//! The peer-to-peer kernels (`cuda/comm/`), all ranks on one device.

use longhaul_cuda::driver::Element;
use longhaul_cuda::ops::comm::{Algorithm, MOST_RANKS, PeerOptions, Peers, Region, all_reduce};
use longhaul_cuda::{Context, CudaError};

use super::{Case, CollectiveFigure, CollectivesError, ElementType, Operation, Progress};
use crate::kernels::measure::{copy_bandwidth, timed};
use crate::latency::Spread;

/// Counts, and on a GPU (`launches`) times, the cases that the kernels have (all-reduce of float32 and bfloat16), among
/// `ranks` (2 to 16) ranks that share the device: what it takes to sum in one memory, not over links.
///
/// # Errors
/// A number of ranks that the kernels do not take, or the device's.
pub fn peers(
    ctx: &Context,
    launches: bool,
    ranks: usize,
    cases: &[Case],
    progress: Progress<'_>,
) -> Result<Vec<CollectiveFigure>, CollectivesError> {
    if !(2..=MOST_RANKS).contains(&ranks) {
        let message = format!("peer-to-peer kernels among {ranks} ranks; 2 to {MOST_RANKS} are possible");
        return Err(CudaError::Unsupported(message).into());
    }
    let cases: Vec<(&Case, Element)> = cases
        .iter()
        .filter(|case| case.operation == Operation::AllReduce)
        .filter_map(|case| match case.element {
            ElementType::Float32 => Some((case, Element::F32)),
            ElementType::Bfloat16 => Some((case, Element::Bf16)),
            ElementType::Float16 | ElementType::Int32 => None,
        })
        .collect();
    let copy = if launches { Some(copy_bandwidth(ctx)?) } else { None };
    let mut figures = Vec::with_capacity(cases.len());
    for (index, (case, element)) in cases.iter().enumerate() {
        let algorithm = Algorithm::pick(case.bytes, ranks);
        let mut figure = CollectiveFigure::new("peer", ranks, case);
        figure.algorithm = Some(match algorithm {
            Algorithm::OneShot => "one_shot",
            Algorithm::TwoShot => "two_shot",
        });
        figure.peer_bytes = Some(peer_bytes(algorithm, case.bytes, ranks));
        if let Some(copy) = copy {
            let seconds = time(ctx, ranks, case, *element, algorithm)?;
            // All ranks share one memory. `copy` counts bytes read plus bytes written.
            figure.set_time(Spread::of(vec![seconds * 1e6]), Some(copy / 2.0));
        }
        figures.push(figure);
        progress(index + 1, cases.len());
    }
    Ok(figures)
}

/// Seconds of an all-reduce, median, after a check of its first result.
fn time(
    ctx: &Context,
    ranks: usize,
    case: &Case,
    element: Element,
    algorithm: Algorithm,
) -> Result<f64, CollectivesError> {
    let options = PeerOptions::default();
    let regions = (0..ranks)
        .map(|_| Region::new(&ctx.driver, options.slice_bytes))
        .collect::<Result<Vec<_>, CudaError>>()?;
    let peers = Peers::new(regions.iter().map(Region::address).collect(), 0..ranks, options)?;
    let elements = case.bytes / element.size();
    let values = vec![1.0; ranks * elements];
    let x = ctx.tensor_from_f32(&values, ranks, elements, element)?;
    all_reduce(ctx, &peers, &x, algorithm)?;
    peers.check(ctx)?;
    let expected = ranks as f32;
    let wrong = ctx.tensor_to_f32(&x)?.into_iter().enumerate().find(|(_, found)| *found != expected);
    if let Some((at, found)) = wrong {
        return Err(CollectivesError::Wrong {
            operation: case.operation.name(),
            bytes: case.bytes,
            element: case.element.name(),
            index: at % elements,
            rank: at / elements,
            found,
            expected,
        });
    }
    let seconds = timed(ctx, 1, &mut |_| all_reduce(ctx, &peers, &x, algorithm))?;
    peers.check(ctx)?;
    Ok(seconds)
}

/// Bytes that a rank reads from the memory of the others.
fn peer_bytes(algorithm: Algorithm, bytes: usize, ranks: usize) -> u64 {
    let others = (ranks - 1) as u64;
    match algorithm {
        Algorithm::OneShot => others * bytes as u64,
        // Its own share of everybody's values, then everybody's share of the sums.
        Algorithm::TwoShot => 2 * (bytes as u64 * others).div_ceil(ranks as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_shot_reads_the_message_about_twice() {
        assert_eq!(peer_bytes(Algorithm::OneShot, 1024, 8), 7 * 1024);
        assert_eq!(peer_bytes(Algorithm::TwoShot, 1024, 8), 2 * 896);
        assert_eq!(peer_bytes(Algorithm::OneShot, 1024, 2), peer_bytes(Algorithm::TwoShot, 1024, 2));
    }
}

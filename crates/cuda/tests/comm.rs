//! Peer-to-peer all-reduce: several ranks in one launch, under adversarial schedules and over many rounds.

mod common;

use std::borrow::Cow;

use common::{Random, context, relative_error, tolerance};
use longhaul_backend::{CollectiveError, HostTensor};
use longhaul_cuda::driver::{DevicePtr, Element, EmulatedOptions};
use longhaul_cuda::ops::comm::{Algorithm, PeerOptions, Peers, Region, all_reduce, all_reduce_add_rms_norm};
use longhaul_cuda::ops::norm::add_rms_norm;
use longhaul_cuda::weights::Vector;
use longhaul_cuda::{Context, CudaError, Tensor, Variant};

const BOTH: [Algorithm; 2] = [Algorithm::OneShot, Algorithm::TwoShot];

fn device(seed: u64, element: Element) -> Context {
    let options = EmulatedOptions { seed, eager: seed.is_multiple_of(2), ..EmulatedOptions::default() };
    context(options, Variant::Plain, element)
}

fn options(slice_bytes: usize, blocks: usize) -> PeerOptions {
    PeerOptions { slice_bytes, blocks, most_polls: u32::MAX }
}

/// The regions of `ranks` ranks on one device.
fn regions(ctx: &Context, ranks: usize, slice_bytes: usize) -> Vec<Region> {
    (0..ranks).map(|_| Region::new(&ctx.driver, slice_bytes).unwrap()).collect()
}

fn addresses(regions: &[Region]) -> Vec<DevicePtr> {
    regions.iter().map(Region::address).collect()
}

fn all_of(regions: &[Region], options: PeerOptions) -> Peers {
    Peers::new(addresses(regions), 0..regions.len(), options).unwrap()
}

/// Float64 sums of what the ranks hold one after the other in `values`.
fn sums(values: &[f32], ranks: usize) -> Vec<f64> {
    let each = values.len() / ranks;
    (0..each).map(|i| (0..ranks).map(|r| f64::from(values[r * each + i])).sum()).collect()
}

/// The common result of all ranks.
#[track_caller]
fn same_on_all_ranks(values: &[f32], ranks: usize) -> &[f32] {
    let each = values.len() / ranks;
    for rank in values.chunks_exact(each) {
        assert!(
            rank.iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits()),
            "ranks hold different bits"
        );
    }
    &values[..each]
}

fn stacked(ctx: &Context, values: &[f32], rows: usize, element: Element) -> Tensor {
    ctx.tensor_from_f32(values, rows, values.len() / rows, element).unwrap()
}

#[test]
fn matches_float64_on_1_to_16_ranks() {
    for (seed, ranks) in [1usize, 2, 3, 4, 5, 7, 8, 16].into_iter().enumerate() {
        for element in [Element::Bf16, Element::F32] {
            let ctx = device(seed as u64, element);
            // One piece, many pieces, pieces that end within a slice; several blocks.
            for (rows, cols, slice_bytes, blocks) in
                [(1, 1, 16, 4), (1, 7, 1024, 1), (3, 40, 64, 2), (2, 896, 256, 3), (1, 1100, 4096, 36)]
            {
                let regions = regions(&ctx, ranks, slice_bytes);
                let peers = all_of(&regions, options(slice_bytes, blocks));
                let mut random = Random(ranks as u64 * 1000 + cols as u64);
                let values = random.exact(ranks * rows * cols, element);
                let mut results = Vec::new();
                for algorithm in BOTH {
                    let x = stacked(&ctx, &values, ranks * rows, element);
                    all_reduce(&ctx, &peers, &x, algorithm).unwrap();
                    results.push(ctx.tensor_to_f32(&x).unwrap());
                }
                peers.check(&ctx).unwrap();
                let result = same_on_all_ranks(&results[0], ranks);
                let error = relative_error(result, &sums(&values, ranks));
                assert!(error <= tolerance(element), "{ranks} ranks, [{rows}, {cols}] {element:?}: {error}");
                assert_eq!(results[0], results[1], "one-shot and two-shot differ");
            }
        }
    }
}

/// Rounds in which ranks may run ahead of each other as far as the protocol lets them: a message of a thousand pieces and
/// more, by one block of each rank, on the same slices.
#[test]
fn thousands_of_rounds_on_the_same_slices() {
    const SLICE: usize = 64;
    let mut rounds = 0;
    for (seed, ranks) in (2..=8).cycle().take(14).enumerate() {
        let ctx = device(100 + seed as u64, Element::F32);
        let regions = regions(&ctx, ranks, SLICE);
        let peers = all_of(&regions, options(SLICE, 1));
        for algorithm in BOTH {
            let pieces = 300;
            let cols = pieces * SLICE / 4;
            let values = Random(seed as u64).values(ranks * cols);
            let x = stacked(&ctx, &values, ranks, Element::F32);
            all_reduce(&ctx, &peers, &x, algorithm).unwrap();
            let result = ctx.tensor_to_f32(&x).unwrap();
            let error = relative_error(same_on_all_ranks(&result, ranks), &sums(&values, ranks));
            assert!(error <= tolerance(Element::F32), "{ranks} ranks, seed {seed}: {error}");
            rounds += pieces * if algorithm == Algorithm::OneShot { 1 } else { 2 };
        }
    }
    assert!(rounds >= 10_000, "{rounds}");
}

/// Launches of different sizes, and so of different grids, one after the other on the same regions.
#[test]
fn launches_of_different_grids_follow_each_other() {
    for (seed, ranks) in [(1, 2), (2, 3), (3, 8)] {
        let ctx = device(200 + seed, Element::Bf16);
        let slice_bytes = 128;
        let regions = regions(&ctx, ranks, slice_bytes);
        let peers = all_of(&regions, options(slice_bytes, 5));
        let mut random = Random(seed);
        for _ in 0..60 {
            let cols = 1 + random.below(400);
            let values = random.exact(ranks * cols, Element::Bf16);
            let x = stacked(&ctx, &values, ranks, Element::Bf16);
            all_reduce(&ctx, &peers, &x, BOTH[random.below(2)]).unwrap();
            let result = ctx.tensor_to_f32(&x).unwrap();
            let error = relative_error(same_on_all_ranks(&result, ranks), &sums(&values, ranks));
            assert!(error <= tolerance(Element::Bf16), "{ranks} ranks, {cols} columns: {error}");
        }
        peers.check(&ctx).unwrap();
    }
}

#[test]
fn a_recorded_launch_can_be_replayed() {
    let ctx = device(7, Element::F32);
    let regions = regions(&ctx, 3, 64);
    let peers = all_of(&regions, options(64, 2));
    let x = stacked(&ctx, &vec![1.0; 3 * 100], 3, Element::F32);
    ctx.driver.begin_recording().unwrap();
    all_reduce(&ctx, &peers, &x, Algorithm::OneShot).unwrap();
    all_reduce(&ctx, &peers, &x, Algorithm::TwoShot).unwrap();
    let graph = ctx.driver.end_recording().unwrap();
    for replay in 1..=4 {
        ctx.driver.replay(graph).unwrap();
        assert_eq!(ctx.tensor_to_f32(&x).unwrap(), vec![9f32.powi(replay); 300]);
    }
}

#[test]
fn fused_with_the_norm_it_equals_the_two_ops() {
    for element in [Element::Bf16, Element::F32] {
        for (seed, ranks) in [(1, 1), (2, 2), (3, 4), (4, 8)] {
            let ctx = device(300 + seed, element);
            let slice_bytes = 4096;
            let regions = regions(&ctx, ranks, slice_bytes);
            let peers = all_of(&regions, options(slice_bytes, 3));
            for (rows, cols) in [(1, 1), (1, 7), (2, 256), (5, 257), (4, 896)] {
                let mut random = Random(seed * 1000 + cols as u64);
                let values = random.exact(ranks * rows * cols, element);
                let weight = random.values(cols);
                let bytes: Vec<u8> = weight.iter().flat_map(|v| v.to_le_bytes()).collect();
                let host =
                    HostTensor::new(longhaul_backend::DType::F32, vec![cols], Cow::Owned(bytes)).unwrap();
                let weight = Vector::new(&ctx.driver, &[host]).unwrap();
                // The same residual on all ranks, as in a model.
                let residual = random.values(rows * cols).repeat(ranks);
                for with_residual in [false, true] {
                    let residual = || {
                        with_residual.then(|| {
                            ctx.tensor_from_f32(&residual, ranks * rows, cols, Element::F32).unwrap()
                        })
                    };
                    let tensor = || ctx.tensor_from_f32(&values, ranks * rows, cols, element).unwrap();
                    let (x, r) = (tensor(), residual());
                    let (normed, sum) =
                        all_reduce_add_rms_norm(&ctx, &peers, &x, r.as_ref(), &weight, 1e-6).unwrap();
                    let (y, r) = (tensor(), residual());
                    all_reduce(&ctx, &peers, &y, Algorithm::OneShot).unwrap();
                    let (normed_apart, sum_apart) =
                        add_rms_norm(&ctx, &y, r.as_ref(), &weight, 1e-6).unwrap();
                    let host = |tensor: &Tensor| ctx.tensor_to_f32(tensor).unwrap();
                    assert_eq!(host(&sum), host(&sum_apart), "{ranks} ranks [{rows}, {cols}]");
                    same_on_all_ranks(&host(&normed), ranks);
                    let apart: Vec<f64> = host(&normed_apart).into_iter().map(f64::from).collect();
                    let error = relative_error(&host(&normed), &apart);
                    assert!(error <= tolerance(element), "{ranks} ranks [{rows}, {cols}]: {error}");
                }
            }
        }
    }
}

#[test]
fn a_rank_that_does_not_arrive_is_named() {
    let ctx = device(9, Element::F32);
    let regions = regions(&ctx, 3, 64);
    // Ranks 0 and 1 of three; nobody launches rank 2.
    let options = PeerOptions { most_polls: 200, ..options(64, 1) };
    let peers = Peers::new(addresses(&regions), 0..2, options).unwrap();
    peers.check(&ctx).unwrap();
    for algorithm in BOTH {
        let x = stacked(&ctx, &[1.0; 2 * 100], 2, Element::F32);
        all_reduce(&ctx, &peers, &x, algorithm).unwrap();
        match peers.check(&ctx) {
            Err(CudaError::Collective(CollectiveError::RankFailed { rank: 2, message })) => {
                assert_eq!(message, "it did not arrive within 200 polls");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_no_kernel_takes_is_refused() {
    let ctx = device(10, Element::F32);
    let regions = regions(&ctx, 2, 64);
    let peers = all_of(&regions, options(64, 1));
    let three = ctx.tensor("x", 3, 8, Element::F32).unwrap();
    assert!(all_reduce(&ctx, &peers, &three, Algorithm::OneShot).unwrap_err().to_string().contains("3 rows"));
    let integers = ctx.tensor("x", 2, 8, Element::U32).unwrap();
    assert!(all_reduce(&ctx, &peers, &integers, Algorithm::OneShot).is_err());
    let wide = ctx.tensor("x", 2, 100, Element::F32).unwrap();
    let host = HostTensor::from_f32(vec![100], &[1.0; 100]).unwrap();
    let weight = Vector::new(&ctx.driver, &[host]).unwrap();
    let error = all_reduce_add_rms_norm(&ctx, &peers, &wide, None, &weight, 1e-6).err().unwrap();
    assert!(error.to_string().contains("slices of 64"), "{error}");
    assert!(Region::new(&ctx.driver, 24).is_err());
    let one = vec![regions[0].address()];
    assert!(Peers::new(one.repeat(17), 0..1, options(64, 1)).is_err());
    assert!(Peers::new(one.clone(), 0..2, options(64, 1)).is_err());
    assert!(Peers::new(one.clone(), 0..1, options(64, 65)).is_err());
    assert!(Peers::new(vec![], 0..0, options(64, 1)).is_err());
    all_reduce(&ctx, &peers, &ctx.tensor("x", 0, 8, Element::F32).unwrap(), Algorithm::OneShot).unwrap();
}

#[test]
fn the_algorithm_follows_size_and_ranks() {
    assert_eq!(Algorithm::pick(64 << 20, 2), Algorithm::OneShot);
    assert_eq!(Algorithm::pick(1 << 20, 4), Algorithm::OneShot);
    assert_eq!(Algorithm::pick((1 << 20) + 16, 4), Algorithm::TwoShot);
    assert_eq!(Algorithm::pick(7168, 8), Algorithm::OneShot);
    assert_eq!(Algorithm::pick(512 << 10, 8), Algorithm::TwoShot);
}

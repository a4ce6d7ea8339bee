//! Groups of devices, a thread a rank: sums with every way, the end of a group, and NCCL's code path over a library with its
//! interface.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Random, open_choice, relative_error, tolerance};
use longhaul_backend::{Collective, CollectiveError, HostTensor};
use longhaul_collective::{Options, Threads};
use longhaul_cuda::arena::Arena;
use longhaul_cuda::driver::{Driver, Element, Emulated, EmulatedOptions};
use longhaul_cuda::group::{AllReduce, Group, Nccl, NcclRank};
use longhaul_cuda::ops::comm::PeerOptions;
use longhaul_cuda::weights::Vector;
use longhaul_cuda::{Context, CudaError};

fn drivers(count: usize, seed: u64) -> Vec<Arc<dyn Driver>> {
    let options = EmulatedOptions { seed, eager: seed.is_multiple_of(2), ..EmulatedOptions::default() };
    (0..count).map(|_| Arc::new(Emulated::new(options).unwrap()) as Arc<dyn Driver>).collect()
}

fn collectives(count: usize) -> Vec<Arc<dyn Collective>> {
    let threads = Threads::group(count, Options::default()).unwrap();
    threads.into_iter().map(|rank| Arc::new(rank) as Arc<dyn Collective>).collect()
}

fn on(driver: &Arc<dyn Driver>, element: Element) -> Context {
    let arena = Arena::new(driver, 8 << 20).unwrap();
    Context::new(driver.clone(), arena, open_choice(), element).unwrap()
}

/// Runs `work` for every rank on a thread of its own.
fn each<R: Send>(
    ranks: usize,
    all_reduce: AllReduce,
    options: PeerOptions,
    seed: u64,
    work: impl Fn(Group, Arc<dyn Driver>) -> R + Sync,
) -> Vec<R> {
    let drivers = drivers(ranks, seed);
    let groups = Group::connect_with(&drivers, collectives(ranks), all_reduce, options).unwrap();
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = groups
            .into_iter()
            .zip(drivers)
            .map(|(group, driver)| scope.spawn(move || work(group, driver)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn options() -> PeerOptions {
    PeerOptions { slice_bytes: 4096, blocks: 3, ..PeerOptions::default() }
}

/// Sums, the fused norm and the gather give the same on all ranks, peer to peer the bits of the host, and what float64 says.
#[test]
fn every_way_gives_the_same_sums() {
    for (seed, (ranks, x_element, element)) in
        [(2, Element::F32, Element::F32), (3, Element::Bf16, Element::Bf16), (4, Element::F32, Element::Bf16)]
            .into_iter()
            .enumerate()
    {
        // Fused, and too many rows for it.
        for (rows, cols) in [(3, 40), (65, 24)] {
            let values: Vec<Vec<f32>> =
                (0..ranks).map(|rank| Random(rank as u64 + 1).exact(rows * cols, x_element)).collect();
            let residual = Random(77).values(rows * cols);
            let weight = Random(78).values(cols);
            let shares: Vec<usize> = (0..ranks).map(|rank| [5, 0, 9, 1][rank]).collect();
            let run = |all_reduce| {
                each(ranks, all_reduce, options(), seed as u64, |group, driver| {
                    let ctx = on(&driver, element);
                    let rank = group.rank();
                    let tensor =
                        |values: &[f32], element| ctx.tensor_from_f32(values, rows, cols, element).unwrap();
                    let sum = group.all_reduce(&ctx, tensor(&values[rank], x_element)).unwrap();
                    let sum = ctx.tensor_to_f32(&sum).unwrap();
                    let host = HostTensor::from_f32(vec![cols], &weight).unwrap();
                    let weight = Vector::new(&ctx.driver, &[host]).unwrap();
                    let (x, r) = (tensor(&values[rank], x_element), tensor(&residual, Element::F32));
                    let (normed, r) =
                        group.all_reduce_add_rms_norm(&ctx, x, Some(&r), &weight, 1e-6).unwrap();
                    let part: Vec<f32> = (0..2 * shares[rank]).map(|i| (100 * rank + i) as f32).collect();
                    let part = ctx.tensor_from_f32(&part, 2, shares[rank], Element::F32).unwrap();
                    let gathered = group.all_gather(&ctx, part, &shares).unwrap();
                    group.check(&ctx).unwrap();
                    let host = |tensor| ctx.tensor_to_f32(tensor).unwrap();
                    (sum, host(&r), host(&normed), host(&gathered))
                })
            };
            let (host, peer) = (run(AllReduce::Host), run(AllReduce::Peer));
            for rank in host.iter().chain(&peer) {
                assert!((&rank.0, &rank.1, &rank.3) == (&host[0].0, &host[0].1, &host[0].3));
            }
            assert!(peer.iter().all(|rank| rank.2 == peer[0].2), "ranks hold different bits");
            let exact: Vec<f64> =
                (0..rows * cols).map(|i| values.iter().map(|values| f64::from(values[i])).sum()).collect();
            assert!(relative_error(&host[0].0, &exact) <= tolerance(x_element));
            let normed: Vec<f64> = host[0].2.iter().map(|v| f64::from(*v)).collect();
            assert!(relative_error(&peer[0].2, &normed) <= tolerance(element));
            let line = |row: usize| {
                let rank = |rank: usize| {
                    (0..shares[rank]).map(move |i| (100 * rank + row * [5, 0, 9, 1][rank] + i) as f32)
                };
                (0..ranks).flat_map(rank).collect::<Vec<f32>>()
            };
            assert_eq!(host[0].3, [line(0), line(1)].concat());
        }
    }
}

/// A rank that aborts wakes those whose kernels wait for it, at once, and they learn why.
#[test]
fn an_abort_ends_exchanges_that_wait() {
    let began = Instant::now();
    let results = each(3, AllReduce::Peer, options(), 5, |group, driver| {
        if group.rank() == 1 {
            group.collective().abort("out of paper");
            return Ok(());
        }
        let ctx = on(&driver, Element::F32);
        let x = ctx.tensor_from_f32(&[1.0; 64], 1, 64, Element::F32).unwrap();
        for _ in 0..5 {
            // Once it has given up, nothing waits any more.
            group.all_reduce(&ctx, x.clone())?;
        }
        group.check(&ctx)
    });
    // Without the abort, polls alone would take minutes.
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    for rank in [0, 2] {
        let error = results[rank].as_ref().unwrap_err();
        assert!(
            matches!(error, CudaError::Collective(CollectiveError::Aborted { rank: 1, message }) if message == "out of paper"),
            "{error}"
        );
    }
}

/// A rank that panics is one that aborts.
#[test]
fn a_panic_ends_exchanges_that_wait() {
    let drivers = drivers(2, 6);
    let mut groups = Group::connect_with(&drivers, collectives(2), AllReduce::Peer, options()).unwrap();
    let (panicking, waiting) = (groups.pop().unwrap(), groups.pop().unwrap());
    let error = thread::scope(|scope| {
        let panic = scope.spawn(move || {
            let _group = panicking;
            panic!("a test's panic");
        });
        let ctx = on(&drivers[0], Element::F32);
        let x = ctx.tensor_from_f32(&[1.0; 8], 1, 8, Element::F32).unwrap();
        waiting.all_reduce(&ctx, x).unwrap();
        assert!(panic.join().is_err());
        waiting.check(&ctx).unwrap_err()
    });
    assert!(matches!(error, CudaError::Collective(_)), "{error}");
}

/// A rank that never comes is named after so many polls, and the group has ended.
#[test]
fn a_rank_that_does_not_come_is_named() {
    let few = PeerOptions { most_polls: 300, ..options() };
    let results = each(2, AllReduce::Peer, few, 7, |group, driver| {
        if group.rank() == 1 {
            return Ok(());
        }
        let ctx = on(&driver, Element::F32);
        let x = ctx.tensor_from_f32(&[1.0; 8], 1, 8, Element::F32).unwrap();
        group.all_reduce(&ctx, x)?;
        let checked = group.check(&ctx);
        assert!(group.collective().check().is_err());
        checked
    });
    let error = results[0].as_ref().unwrap_err();
    assert!(matches!(error, CudaError::Collective(CollectiveError::RankFailed { rank: 1, .. })), "{error}");
}

#[test]
fn a_way_that_is_not_there_is_explained() {
    let connect = |ranks: usize, way| Group::connect(&drivers(ranks, 1), collectives(ranks), way);
    let error = connect(17, AllReduce::Peer).err().unwrap().to_string();
    assert!(error.contains("--all-reduce peer") && error.contains("17 ranks"), "{error}");
    let error = connect(2, AllReduce::Nccl).err().unwrap().to_string();
    assert!(error.contains("--all-reduce nccl") && error.contains("host"), "{error}");
    let way = |ranks| connect(ranks, AllReduce::Auto).unwrap()[0].all_reduce_way();
    assert_eq!((way(2), way(17)), (AllReduce::Peer, AllReduce::Host));
    // One rank has nothing to sum.
    assert!(connect(1, AllReduce::Nccl).unwrap()[0].can_be_recorded());
    assert!(!connect(2, AllReduce::Host).unwrap()[0].can_be_recorded());
}

/// NCCL's path, as far as a library with its interface for groups of one goes: joined, queued with the tensor's address,
/// element count and type, checked.
#[test]
fn nccl_is_called_with_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nccl-rs/tests/fake_nccl.c");
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let status = Command::new(compiler)
        .args(["-std=c11", "-shared", "-fPIC", "-O1", "-o"])
        .args([&folder.path().join("libnccl.so.2"), &source])
        .status()
        .expect("a C compiler is needed for this test");
    assert!(status.success());
    let nccl = Nccl::load(&[folder.path().into()]).unwrap();
    let driver = drivers(1, 1).remove(0);
    let ctx = on(&driver, Element::F32);
    let x = ctx.tensor_from_f32(&[1.0, 2.0, 3.0], 1, 3, Element::F32).unwrap();
    let rank = NcclRank::new(nccl.clone());
    let error = rank.all_reduce(&*driver, &x).unwrap_err();
    assert!(error.to_string().contains("has not joined"), "{error}");
    rank.join(&*driver, &nccl.id(), 0, 1).unwrap();
    rank.all_reduce(&*driver, &x).unwrap();
    rank.check().unwrap();
    assert_eq!(ctx.tensor_to_f32(&x).unwrap(), [1.0, 2.0, 3.0]);
    let indices = ctx.tensor("x", 1, 4, Element::U32).unwrap();
    assert!(rank.all_reduce(&*driver, &indices).is_err());
    // The library is asked about every rank, and its refusal is an error of the group.
    let error = NcclRank::new(nccl.clone()).join(&*driver, &nccl.id(), 1, 1).unwrap_err();
    assert!(matches!(error, CudaError::Collective(CollectiveError::Transport { .. })), "{error}");
}

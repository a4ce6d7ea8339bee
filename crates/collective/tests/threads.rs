//! Groups of threads: results, reuse of slots, and every way a rank can fail.

mod common;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Element, LENGTHS, every_operation, everything, fingerprint, value};
use longhaul_backend::{Collective, CollectiveError};
use longhaul_collective::{Options, Threads};

/// Runs `rank` on a thread for each rank and returns what they return, in rank order.
fn run<T: Send>(world_size: usize, options: Options, rank: impl Fn(Threads) -> T + Sync) -> Vec<T> {
    let ranks = Threads::group(world_size, options).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|group| scope.spawn(|| rank(group))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[track_caller]
fn assert_all_equal<T: PartialEq + std::fmt::Debug>(values: &[T]) {
    for value in values {
        assert_eq!(value, &values[0]);
    }
}

#[test]
fn every_operation_type_and_length_on_1_to_8_ranks() {
    for world_size in 1..=8 {
        // A million elements on a few sizes only: on the others they prove nothing new.
        let lengths = if [2, 3, 8].contains(&world_size) { &LENGTHS[..] } else { &LENGTHS[..4] };
        let sums = run(world_size, Options::default(), |group| everything(&group, lengths));
        assert_all_equal(&sums);
    }
}

#[test]
fn slots_of_any_size_give_the_same_bits() {
    let sums: Vec<_> = [64, 1000, 4096, 1 << 20]
        .map(|slot_bytes| {
            let options = Options { slot_bytes, ..Options::default() };
            let ranks = run(3, options, |group| {
                let mut values: Vec<f32> = (0..9001).map(|i| value(group.rank(), i, 0)).collect();
                group.all_reduce((&mut values[..]).into()).unwrap();
                fingerprint(&values)
            });
            assert_all_equal(&ranks);
            ranks[0]
        })
        .into();
    assert_all_equal(&sums);
}

/// Rank `rank`'s pause before round `round`: mostly none, sometimes its time slice.
fn stagger(rank: usize, round: usize) {
    if f32::to_bits(value(rank, round, 77)).is_multiple_of(5) {
        std::thread::yield_now();
    }
}

#[test]
fn thousands_of_rounds_back_to_back() {
    for world_size in [2, 3, 8] {
        let rounds = 12_000 / world_size;
        run(world_size, Options { slot_bytes: 64, ..Options::default() }, |group| {
            for round in 0..rounds {
                stagger(group.rank(), round);
                let mut values: Vec<i32> = (0..5).map(|i| value(group.rank(), i, round)).collect();
                group.all_reduce((&mut values[..]).into()).unwrap();
                for (i, &sum) in values.iter().enumerate() {
                    let exact: i32 = (0..world_size).map(|rank| value::<i32>(rank, i, round)).sum();
                    assert_eq!(sum, exact, "round {round}");
                }
                if round % 500 == 0 {
                    every_operation::<f32>(&group, 40, round);
                }
            }
        });
    }
}

/// What the ranks other than `culprit` see when it does `crime` in the middle of rounds.
fn survivors(
    culprit: usize,
    timeout: Duration,
    crime: impl Fn(Threads) + Sync + std::panic::RefUnwindSafe,
) -> Vec<CollectiveError> {
    let ranks = Threads::group(4, Options { timeout, ..Options::default() }).unwrap();
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::channel();
        for group in ranks {
            let (send, crime) = (send.clone(), &crime);
            scope.spawn(move || {
                let mut values = vec![1.0f32; 1000];
                for _ in 0..50 {
                    group.all_reduce((&mut values[..]).into()).unwrap();
                }
                if group.rank() == culprit {
                    crime(group);
                    return;
                }
                let error = loop {
                    if let Err(error) = group.all_reduce((&mut values[..]).into()) {
                        break error;
                    }
                };
                assert_eq!(group.barrier().unwrap_err(), error, "a group that has ended stays so");
                assert_eq!(group.check().unwrap_err(), error);
                send.send(error).unwrap();
            });
        }
        drop(send);
        receive.iter().collect()
    })
}

#[test]
fn a_rank_that_panics_ends_the_group() {
    let errors = survivors(2, Duration::from_secs(60), |group| {
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _group = group;
            std::panic::resume_unwind(Box::new("planted"));
        }));
        assert!(died.is_err());
    });
    assert_eq!(errors.len(), 3);
    assert_all_equal(&errors);
    assert_eq!(errors[0], CollectiveError::RankFailed { rank: 2, message: "its thread panicked".into() });
}

#[test]
fn a_rank_that_leaves_ends_the_group() {
    let errors = survivors(0, Duration::from_secs(60), drop);
    assert_eq!(errors.len(), 3);
    assert_all_equal(&errors);
    assert_eq!(errors[0], CollectiveError::RankFailed { rank: 0, message: "it left the group".into() });
}

#[test]
fn a_rank_that_hangs_is_named_at_the_deadline() {
    let timeout = Duration::from_millis(300);
    let (release, hung) = mpsc::channel::<()>();
    let hung = std::sync::Mutex::new(hung);
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let errors = survivors(3, timeout, |group| {
                let _ = hung.lock().unwrap_or_else(|e| e.into_inner()).recv();
                drop(group);
            });
            assert_eq!(errors.len(), 3);
            assert_all_equal(&errors);
            let CollectiveError::Timeout { op, missing, after } = &errors[0] else {
                panic!("{}", errors[0]);
            };
            assert_eq!((*op, &missing[..], *after), ("all_reduce", &[3][..], timeout));
        });
        // Hangs for longer than the deadline, whatever the machine does meanwhile.
        while began.elapsed() < 4 * timeout {
            std::thread::sleep(timeout);
        }
        drop(release);
    });
}

#[test]
fn abort_wakes_those_who_wait() {
    let errors = survivors(1, Duration::from_secs(60), |group| {
        group.abort("step deadline");
        let error = group.barrier().unwrap_err();
        assert_eq!(error, CollectiveError::Aborted { rank: 1, message: "step deadline".into() });
    });
    assert_eq!(errors.len(), 3);
    assert_all_equal(&errors);
    assert_eq!(errors[0].to_string(), "rank 1 ended the group: step deadline");
}

#[test]
fn a_watchdog_can_abort_a_rank_in_a_call() {
    let mut ranks =
        Threads::group(2, Options { timeout: Duration::from_secs(60), ..Options::default() }).unwrap();
    let _absent = ranks.pop();
    let present = ranks.pop().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| present.barrier());
        present.abort("watchdog");
        assert!(matches!(waiting.join().unwrap(), Err(CollectiveError::Aborted { rank: 0, .. })));
    });
}

#[test]
fn ranks_that_disagree_are_told() {
    type Call = fn(&Threads) -> Result<(), CollectiveError>;
    let cases: [(&str, Call); 4] = [
        ("barrier", |g| g.barrier()),
        ("7 f32", |g| g.all_reduce((&mut [0f32; 7][..]).into())),
        ("8 i32", |g| g.all_reduce((&mut [0i32; 8][..]).into())),
        ("root 1", |g| g.broadcast(1, (&mut [0f32; 8][..]).into())),
    ];
    for (words, call) in cases {
        let errors = run(3, Options::default(), |group| {
            if group.rank() == 2 { call(&group) } else { group.all_reduce((&mut [0f32; 8][..]).into()) }
                .unwrap_err()
        });
        assert_all_equal(&errors);
        assert!(matches!(errors[0], CollectiveError::Mismatch { .. }), "{}", errors[0]);
        let message = errors[0].to_string();
        assert!(message.contains(words) && message.contains("all_reduce of 8 f32"), "{message}");
    }
}

#[test]
fn misuse_harms_nobody() {
    run(2, Options::default(), |group| {
        let mut values = [1f32; 4];
        assert!(matches!(
            group.broadcast(2, (&mut values[..]).into()),
            Err(CollectiveError::Misuse { op: "broadcast", .. })
        ));
        assert!(group.all_gather((&[0i32; 4][..]).into(), &[2, 2], (&mut values[..]).into()).is_err());
        group.all_reduce((&mut values[..]).into()).unwrap();
        assert_eq!(values, [2.0; 4]);
    });
    assert!(Threads::group(0, Options::default()).is_err());
    assert!(Threads::group(65, Options::default()).is_err());
}

#[test]
fn bits_do_not_depend_on_the_way_a_sum_travels() {
    // 0.1 + 0.2 + 0.3 in rank order, not in another.
    let sums = run(3, Options::default(), |group| {
        let term = [1e8f32, -1e8, 1.0][group.rank()];
        let (mut small, mut large) = (vec![term; 3], vec![term; 5000]);
        group.all_reduce((&mut small[..]).into()).unwrap();
        group.all_reduce((&mut large[..]).into()).unwrap();
        assert_eq!(small[0].bits(), large[4999].bits());
        small[0]
    });
    assert_eq!(sums, [1.0; 3]);
}

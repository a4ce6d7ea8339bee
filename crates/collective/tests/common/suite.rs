//! What every group of threads does, in one process or in several: results, reuse of slots, and every way a rank can fail.
//! Each function is a test for whatever `make` makes.

use std::any::Any;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use longhaul_backend::{Collective, CollectiveError};
use longhaul_collective::Options;

use super::{Element, LENGTHS, every_operation, everything, fingerprint, value};

/// The ranks of a group, and what must live as long as they do.
pub struct Ranks {
    pub ranks: Vec<Box<dyn Collective>>,
    pub keep: Box<dyn Any>,
    /// Whether the ranks see one memory, so that even a disagreement is noticed by one of them alone.
    pub one_memory: bool,
}

/// Makes a group of some size.
pub type Make = fn(usize, Options) -> Ranks;

/// Runs `rank` on a thread for each rank and returns what they return, in rank order.
pub fn run<T: Send>(
    make: Make,
    world_size: usize,
    options: Options,
    rank: impl Fn(Box<dyn Collective>) -> T + Sync,
) -> Vec<T> {
    let group = make(world_size, options);
    std::thread::scope(|scope| {
        let threads: Vec<_> = group.ranks.into_iter().map(|group| scope.spawn(|| rank(group))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[track_caller]
fn assert_all_equal<T: PartialEq + std::fmt::Debug>(values: &[T]) {
    for value in values {
        assert_eq!(value, &values[0]);
    }
}

pub fn every_operation_type_and_length_on_1_to_8_ranks(make: Make) {
    for world_size in 1..=8 {
        // A million elements on a few sizes only: on the others they prove nothing new.
        let lengths = if [2, 3, 8].contains(&world_size) { &LENGTHS[..] } else { &LENGTHS[..4] };
        let sums = run(make, world_size, Options::default(), |group| everything(&*group, lengths));
        assert_all_equal(&sums);
    }
}

pub fn slots_of_any_size_give_the_same_bits(make: Make) {
    let sums: Vec<_> = [64, 1000, 4096, 1 << 20]
        .map(|slot_bytes| {
            let options = Options { slot_bytes, ..Options::default() };
            let ranks = run(make, 3, options, |group| {
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

pub fn thousands_of_rounds_back_to_back(make: Make) {
    for world_size in [2, 3, 8] {
        let rounds = 12_000 / world_size;
        run(make, world_size, Options { slot_bytes: 64, ..Options::default() }, |group| {
            for round in 0..rounds {
                stagger(group.rank(), round);
                let mut values: Vec<i32> = (0..5).map(|i| value(group.rank(), i, round)).collect();
                group.all_reduce((&mut values[..]).into()).unwrap();
                for (i, &sum) in values.iter().enumerate() {
                    let exact: i32 = (0..world_size).map(|rank| value::<i32>(rank, i, round)).sum();
                    assert_eq!(sum, exact, "round {round}");
                }
                if round % 500 == 0 {
                    every_operation::<f32>(&*group, 40, round);
                }
            }
        });
    }
}

/// What the ranks other than `culprit` see when it does `crime` in the middle of rounds.
fn survivors(
    make: Make,
    culprit: usize,
    timeout: Duration,
    crime: impl Fn(Box<dyn Collective>) + Sync + std::panic::RefUnwindSafe,
) -> Vec<CollectiveError> {
    let group = make(4, Options { timeout, ..Options::default() });
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::channel();
        for group in group.ranks {
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

pub fn a_rank_that_panics_ends_the_group(make: Make) {
    let errors = survivors(make, 2, Duration::from_secs(60), |group| {
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

pub fn a_rank_that_leaves_ends_the_group(make: Make) {
    let errors = survivors(make, 0, Duration::from_secs(60), drop);
    assert_eq!(errors.len(), 3);
    assert_all_equal(&errors);
    assert_eq!(errors[0], CollectiveError::RankFailed { rank: 0, message: "it left the group".into() });
}

pub fn a_rank_that_hangs_is_named_at_the_deadline(make: Make) {
    let timeout = Duration::from_millis(500);
    let (release, hung) = mpsc::channel::<()>();
    let hung = std::sync::Mutex::new(hung);
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let errors = survivors(make, 3, timeout, |group| {
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

pub fn abort_wakes_those_who_wait(make: Make) {
    let errors = survivors(make, 1, Duration::from_secs(60), |group| {
        group.abort("step deadline");
        let error = group.barrier().unwrap_err();
        assert_eq!(error, CollectiveError::Aborted { rank: 1, message: "step deadline".into() });
    });
    assert_eq!(errors.len(), 3);
    assert_all_equal(&errors);
    assert_eq!(errors[0].to_string(), "rank 1 ended the group: step deadline");
}

pub fn a_watchdog_can_abort_a_rank_in_a_call(make: Make) {
    let mut group = make(2, Options { timeout: Duration::from_secs(60), ..Options::default() });
    let _absent = group.ranks.pop();
    let present = group.ranks.pop().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| present.barrier());
        present.abort("watchdog");
        assert!(matches!(waiting.join().unwrap(), Err(CollectiveError::Aborted { rank: 0, .. })));
    });
}

pub fn ranks_that_disagree_are_told(make: Make) {
    type Call = fn(&dyn Collective) -> Result<(), CollectiveError>;
    let cases: [(&str, Call); 4] = [
        ("barrier", |g| g.barrier()),
        ("7 f32", |g| g.all_reduce((&mut [0f32; 7][..]).into())),
        ("8 i32", |g| g.all_reduce((&mut [0i32; 8][..]).into())),
        ("root 1", |g| g.broadcast(1, (&mut [0f32; 8][..]).into())),
    ];
    let one_memory = make(1, Options::default()).one_memory;
    for (words, call) in cases {
        let errors = run(make, 3, Options::default(), |group| {
            if group.rank() == 2 { call(&*group) } else { group.all_reduce((&mut [0f32; 8][..]).into()) }
                .unwrap_err()
        });
        if one_memory {
            assert_all_equal(&errors);
        }
        for error in errors {
            assert!(matches!(error, CollectiveError::Mismatch { .. }), "{error}");
            let message = error.to_string();
            assert!(message.contains(words) && message.contains("all_reduce of 8 f32"), "{message}");
        }
    }
}

pub fn misuse_harms_nobody(make: Make) {
    run(make, 2, Options::default(), |group| {
        let mut values = [1f32; 4];
        assert!(matches!(
            group.broadcast(2, (&mut values[..]).into()),
            Err(CollectiveError::Misuse { op: "broadcast", .. })
        ));
        assert!(group.all_gather((&[0i32; 4][..]).into(), &[2, 2], (&mut values[..]).into()).is_err());
        group.all_reduce((&mut values[..]).into()).unwrap();
        assert_eq!(values, [2.0; 4]);
    });
}

pub fn bits_do_not_depend_on_the_way_a_sum_travels(make: Make) {
    // 0.1 + 0.2 + 0.3 in rank order, not in another.
    let sums = run(make, 3, Options::default(), |group| {
        let term = [1e8f32, -1e8, 1.0][group.rank()];
        let (mut small, mut large) = (vec![term; 3], vec![term; 5000]);
        group.all_reduce((&mut small[..]).into()).unwrap();
        group.all_reduce((&mut large[..]).into()).unwrap();
        assert_eq!(small[0].bits(), large[4999].bits());
        small[0]
    });
    assert_eq!(sums, [1.0; 3]);
}

/// The tests of a kind of group.
#[macro_export]
macro_rules! suite {
    ($make:expr) => {
        $crate::suite!($make, every_operation_type_and_length_on_1_to_8_ranks, slots_of_any_size_give_the_same_bits, thousands_of_rounds_back_to_back, a_rank_that_panics_ends_the_group, a_rank_that_leaves_ends_the_group, a_rank_that_hangs_is_named_at_the_deadline, abort_wakes_those_who_wait, a_watchdog_can_abort_a_rank_in_a_call, ranks_that_disagree_are_told, misuse_harms_nobody, bits_do_not_depend_on_the_way_a_sum_travels);
    };
    ($make:expr, $($test:ident),*) => {
        $(
            #[test]
            fn $test() {
                $crate::common::suite::$test($make);
            }
        )*
    };
}

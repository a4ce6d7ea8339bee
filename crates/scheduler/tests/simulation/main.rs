//! Deterministic simulation: the scheduler with a device that may fail and clients that may do anything, from one seed a run.
//!
//! Safety, in every turn: each token is the one that the sequence's own tokens ask for, whatever was shared, copied, preempted or
//! evicted; each request ends once, for a reason that it has; budgets are kept; the books agree. Liveness: faults stop, and
//! every request ends within a bound; nothing is left held.
//!
//! A failure names its seed; `SIMULATION_SEED=<seed>` runs that one alone.

mod checks;
mod ledger;
mod model;
mod rng;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use world::{Totals, World};

fn simulate(seeds: std::ops::Range<u64>, steps: usize) -> Totals {
    let seeds = match std::env::var("SIMULATION_SEED") {
        Ok(seed) => {
            let seed: u64 = seed.parse().expect("SIMULATION_SEED is a number");
            seed..seed + 1
        }
        Err(_) => seeds,
    };
    let next = AtomicU64::new(seeds.start);
    let totals = Mutex::new(Ok(Totals::default()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if !seeds.contains(&seed) {
                        return;
                    }
                    let run = World::new(seed).run(steps);
                    let mut totals = totals.lock().expect("no thread panicked");
                    match (run, totals.as_mut()) {
                        (Ok(run), Ok(totals)) => totals.add(&run),
                        (Err(error), Ok(_)) => *totals = Err(format!("seed {seed}: {error}")),
                        (_, Err(_)) => return,
                    }
                }
            });
        }
    });
    totals.into_inner().expect("no thread panicked").unwrap_or_else(|error| panic!("{error}"))
}

/// The runs must have met what they are there for.
fn check(totals: &Totals) {
    println!("{totals:#?}");
    let met = [
        ("cached tokens", totals.cached_tokens),
        ("scored tokens", totals.scored_tokens),
        ("drafted tokens that were drawn", totals.accepted_tokens),
        ("drafted tokens that were not", totals.draft_tokens - totals.accepted_tokens),
        ("hits behind a wrong draft", totals.in_vain),
        ("copies on write", totals.copies),
        ("zeroed blocks", totals.scrubs),
        ("preemptions", totals.preemptions),
        ("evictions", totals.evictions),
        ("rows planned ahead", totals.pending),
        ("engine losses", totals.engine_losses),
    ];
    if std::env::var_os("SIMULATION_SEED").is_none() {
        for (what, count) in met {
            assert!(count > 100, "{count} {what}");
        }
        for outcome in longhaul_scheduler::Outcome::ALL {
            assert!(totals.outcomes.contains_key(outcome.label()), "no request ended as {outcome}");
        }
    }
    assert_eq!(totals.requests, totals.outcomes.values().sum::<u64>(), "one outcome each");
}

#[test]
fn every_request_gets_its_own_tokens_and_one_end() {
    check(&simulate(0..2_000, 2_000));
}

#[test]
#[ignore = "nightly: 10,000 seeds, 5,000 steps"]
fn every_request_gets_its_own_tokens_and_one_end_for_long() {
    check(&simulate(1_000_000..1_010_000, 5_000));
}

/// The same seed is the same run, down to the last count.
#[test]
fn a_seed_says_everything() {
    let run = |seed| format!("{:?}", World::new(seed).run(1_000).expect("the run is in order"));
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed));
    }
}

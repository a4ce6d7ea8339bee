//! Who is served when not all can be.

use std::collections::BTreeMap;
use std::time::Duration;

use longhaul_scheduler::{Config, Outcome};

use crate::harness::{Harness, choice, config, prompt, rows};

/// Two keys that always have requests waiting, one of them more and larger ones: what they are served never differs by more than one
/// prompt and the tokens that started requests may still draw.
#[test]
fn a_flood_of_one_key_takes_nothing_from_another() {
    let config = Config { max_running: 3, ..config(60) };
    let (input, output) = (config.input_weight, config.output_weight);
    let mut h = Harness::new(config);
    let (mut seed, mut keys, mut served) = (0, BTreeMap::new(), BTreeMap::new());
    for turn in 0..3_000 {
        let waiting = h.scheduler.snapshot().waiting_requests;
        for key in [1u64; 50].into_iter().chain([2]) {
            if turn % 40 == 0 && (key == 2 || waiting < 500) {
                // Of different size: the same number of requests is not the same service.
                let (len, max_tokens) = if key == 1 { (20, 10) } else { (8, 6) };
                for _ in 0..if key == 2 { 16 } else { 1 } {
                    seed += 1;
                    let id = h.submit(key, prompt(seed, len), max_tokens);
                    keys.insert(id, key);
                }
            }
        }
        let Some(plan) = h.turn() else { continue };
        for s in &plan.sequences {
            let key = keys[&s.id.request];
            let len = if key == 1 { 20 } else { 8 };
            let computed = s.kv_len.min(len) - (s.kv_len - s.rows).min(len);
            *served.entry(key).or_insert(0u64) += computed as u64 * input;
        }
        for s in &plan.samples {
            *served.entry(keys[&s.sequence.request]).or_insert(0) += output;
        }
        let (one, two) = (served.get(&1).copied().unwrap_or(0), served.get(&2).copied().unwrap_or(0));
        // A prompt is paid for when it starts: what is computed may lag by one more.
        let bound = 2 * 20 * input + 3 * 10 * output;
        assert!(one.abs_diff(two) <= bound, "turn {turn}: {one} and {two}");
    }
    assert!(served[&2] > 3_000, "{served:?}");
}

/// A request of a key that was idle does not wait behind the queue of another.
#[test]
fn a_newcomer_is_next() {
    let mut h = Harness::new(Config { max_running: 2, ..config(60) });
    for seed in 0..40 {
        h.submit(1, prompt(seed, 8), 8);
    }
    (0..30).for_each(|_| drop(h.turn()));
    let newcomer = h.submit(2, prompt(99, 8), 8);
    let waited = (0..100).take_while(|_| h.turn().is_some_and(|plan| rows(&plan, newcomer) == 0)).count();
    assert!(waited <= 10, "{waited} turns: one request's length, no queue's");
}

#[test]
fn a_high_priority_starts_first() {
    let mut h = Harness::new(Config { max_running: 1, ..config(60) });
    let first = h.submit(0, prompt(0, 4), 4);
    h.turn();
    let low = h.submit(0, prompt(1, 4), 4);
    let mut high = h.request(0, prompt(2, 4), 4);
    high.priority = 5;
    let high = h.send(high);
    let order: Vec<_> = h.run().iter().map(|plan| plan.sequences[0].id.request).collect();
    let at = |id| order.iter().position(|&o| o == id).unwrap();
    assert!(at(high) < at(low));
    assert_eq!(h.usage(first).preemptions, 0, "a priority does not take away what was given");
}

/// An endless row of urgent requests: a request of the lowest priority starts when its age has made up for it.
#[test]
fn age_makes_up_for_priority() {
    let aging_interval = Duration::from_millis(20);
    let config = Config { max_running: 1, priority_levels: 4, aging_interval, ..config(60) };
    let mut h = Harness::new(config);
    let low = h.submit(0, prompt(0, 4), 2);
    let mut seed = 0;
    let mut urgent = |h: &mut Harness| {
        seed += 1;
        let mut request = h.request(0, prompt(seed, 4), 2);
        request.priority = 3;
        h.send(request);
    };
    urgent(&mut h);
    let mut turns = 0;
    while h.told(choice(low, 0)) == 0 {
        urgent(&mut h);
        h.turn();
        turns += 1;
        assert!(turns < 1000, "it starves");
    }
    // One millisecond a turn: three levels of 20 ms, and those of its own key that were urgent before it was.
    assert!((60..140).contains(&turns), "{turns} turns");
}

#[test]
fn a_key_starts_no_more_than_its_share() {
    let mut h = Harness::new(Config { key_max_started: 2, ..config(60) });
    let ids: Vec<_> = (0..5).map(|seed| h.submit(1, prompt(seed, 4), 6)).collect();
    let other = h.submit(2, prompt(9, 4), 6);
    let mut most = 0;
    let mut together = false;
    while let Some(plan) = h.turn() {
        let started = ids.iter().filter(|&&id| rows(&plan, id) > 0).count();
        together |= started == 2 && rows(&plan, other) > 0;
        most = most.max(started);
    }
    assert_eq!(most, 2);
    assert!(together, "the other key is not held up");
    assert!(ids.iter().all(|&id| h.outcome(id).map(Outcome::label) == Some("length")));
}

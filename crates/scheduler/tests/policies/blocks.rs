//! KV blocks: what is shared, copied, given up and kept.

use std::collections::BTreeSet;

use longhaul_scheduler::{CacheScope, Config, Event, FinishReason, SampleResult, StepPlan, StepResults};

use crate::harness::{Harness, TOKEN, choice, config, first, prompt, rows};

/// Rows that the prompt of a second request takes after the first has ended.
fn second(change: impl FnOnce(&mut longhaul_scheduler::Request), key: u64, len: usize) -> (usize, usize) {
    let mut h = Harness::new(config(40));
    let mut request = h.request(1, prompt(0, len), 2);
    request.cache = CacheScope::Key;
    h.send(request);
    h.run();
    let mut request = h.request(key, prompt(0, len), 2);
    change(&mut request);
    let id = h.send(request);
    let plans = h.run();
    (rows(&plans[0], id), h.usage(id).cached_tokens)
}

/// Another token at `position` of the prompt.
fn change(request: &mut longhaul_scheduler::Request, position: usize) {
    let mut prompt = request.prompt.to_vec();
    prompt[position] += 1;
    request.prompt = prompt.into();
}

#[test]
fn a_prefix_is_reused_in_whole_blocks_and_never_to_its_last_token() {
    assert_eq!(second(|_| {}, 1, 10), (2, 8));
    assert_eq!(second(|_| {}, 1, 9), (1, 8));
    assert_eq!(second(|_| {}, 1, 8), (4, 4), "the last token's logits are wanted");
    assert_eq!(second(|_| {}, 1, 4), (4, 0));
}

#[test]
fn keys_scopes_and_salts_do_not_mix() {
    assert_eq!(second(|_| {}, 2, 10).1, 0, "another key");
    assert_eq!(second(|r| r.cache = CacheScope::Shared, 1, 10).1, 0, "another scope");
    assert_eq!(second(|r| r.cache = CacheScope::Off, 1, 10).1, 0);
    assert_eq!(second(|r| r.cache_salt = b"a".to_vec(), 1, 10).1, 0, "another salt");
    assert_eq!(second(|r| change(r, 0), 1, 10).1, 0, "another first token");
    assert_eq!(second(|r| change(r, 5), 1, 10).1, 4, "another second block");
}

#[test]
fn who_agrees_to_share_shares() {
    let mut h = Harness::new(config(40));
    let mut cached = Vec::new();
    for key in 1..3 {
        let mut request = h.request(key, prompt(0, 10), 2);
        request.cache = CacheScope::Shared;
        let id = h.send(request);
        h.run();
        cached.push(h.usage(id).cached_tokens);
    }
    assert_eq!(cached, [0, 8]);
}

/// Output tokens, too, are a prefix of what may come next: the next turn of a chat.
#[test]
fn a_chat_finds_its_last_answer() {
    for max_in_flight in [1, 2] {
        let mut h = Harness::new(Config { max_in_flight, ..config(40) });
        h.submit(1, prompt(0, 5), 6);
        run_ahead(&mut h);
        let mut next = prompt(0, 5);
        next.extend([TOKEN; 6]);
        next.extend(prompt(3, 2));
        let id = h.submit(1, next, 1);
        run_ahead(&mut h);
        assert_eq!(h.usage(id).cached_tokens, 8, "of 10 tokens whose KV was computed");
    }
}

/// Turns in which the device answers as late as it may.
fn run_ahead(h: &mut Harness) {
    let mut on_device = std::collections::VecDeque::new();
    loop {
        match h.plan() {
            Some(plan) => on_device.push_back(plan),
            None => match on_device.pop_front() {
                Some(plan) => h.done(&plan),
                None => break,
            },
        }
    }
}

/// The choices share the prompt's whole blocks, and copy the one that they continue.
#[test]
fn choices_copy_on_write() {
    let mut h = Harness::new(config(40));
    let mut request = h.request(1, prompt(0, 10), 4);
    request.choices = 3;
    let id = h.send(request);
    h.turn();
    let plan = h.turn().unwrap();
    assert_eq!(
        plan.sequences.iter().map(|s| (s.rows, s.kv_len)).collect::<Vec<_>>(),
        [(1, 11), (1, 10), (1, 10)]
    );
    let tables: Vec<&[u32]> = plan.sequences.iter().map(|s| s.block_table.as_slice()).collect();
    assert!(tables.iter().all(|t| t[..2] == tables[0][..2]), "{tables:?}");
    assert_eq!(plan.copies.len(), 2, "the last holder writes in place");
    let written: BTreeSet<u32> = tables.iter().map(|t| t[2]).collect();
    assert_eq!(written.len(), 3);
    h.run();
    assert!((0..3).all(|c| h.told(choice(id, c)) == 4));
    assert_eq!(h.usage(id).output_tokens, 12);
}

/// A prompt that ends with a block is cached to its end: the choices compute its last token in a copy, not in the cache.
#[test]
fn a_cached_block_is_never_written() {
    let mut h = Harness::new(config(40));
    let mut request = h.request(1, prompt(0, 8), 4);
    request.choices = 2;
    h.send(request);
    h.turn();
    let plan = h.turn().unwrap();
    assert_eq!(plan.copies.len(), 1);
    assert_ne!(plan.sequences[0].block_table[1], plan.sequences[1].block_table[1]);
    h.run();
}

/// Three that grow until the pool is full: the last gives way, keeps its tokens, and nobody gives way twice as often as that.
#[test]
fn the_last_gives_way_and_keeps_its_tokens() {
    let mut h = Harness::new(config(12));
    let ids: Vec<_> = (0..3).map(|key| h.submit(key, prompt(key as u32, 8), 30)).collect();
    let plans = h.run();
    assert!(h.usage(ids[0]).preemptions == 0, "the first in rank is never preempted");
    assert!(h.usage(ids[2]).preemptions > 0, "the pool is too small for three");
    for &id in &ids {
        assert_eq!(h.told(choice(id, 0)), 30);
        assert!(h.usage(id).preemptions <= 3, "{:?}", h.usage(id));
    }
    // Each output token was drawn once, however often its sequence came back.
    let mut drawn = BTreeSet::new();
    let samples = plans.iter().flat_map(|plan| &plan.samples);
    samples.for_each(|s| assert!(drawn.insert((s.sequence, s.position)), "{s:?} twice"));
}

#[test]
fn a_low_priority_gives_way_first() {
    let mut h = Harness::new(config(12));
    let mut low = h.request(0, prompt(0, 8), 30);
    low.priority = 0;
    let low = h.send(low);
    h.turn();
    let mut high = h.request(1, prompt(1, 8), 30);
    high.priority = 3;
    let high = h.send(high);
    h.run();
    assert_eq!(h.usage(high).preemptions, 0);
    assert!(h.usage(low).preemptions > 0, "though it was there first");
}

/// What was computed before logits that are not finite is in no cache, and is zeroed before it is used again.
#[test]
fn what_is_not_finite_is_not_kept() {
    let mut h = Harness::new(config(8));
    let poisoned = h.submit(1, prompt(0, 30), 2);
    let beside = h.submit(2, prompt(1, 2), 1);
    let step = |h: &mut Harness, result| -> StepPlan {
        let plan = h.plan().unwrap();
        let samples = plan.samples.iter().map(|s| match s.sequence.request == poisoned {
            true => result,
            false => SampleResult::Token(TOKEN),
        });
        let samples = samples.collect();
        h.events.push(Event::Results(StepResults { step: plan.step, samples }));
        plan
    };
    step(&mut h, SampleResult::NotFinite);
    let last = step(&mut h, SampleResult::NotFinite);
    assert_eq!(last.samples[0].sequence.request, poisoned);
    let again = h.submit(1, prompt(0, 30), 2);
    let plans = h.run();
    assert_eq!(h.outcome(poisoned).map(|o| o.label()), Some("numeric_error_500"));
    assert_eq!(h.outcome(beside).map(|o| o.label()), Some("length"), "others go on");
    assert_eq!(h.usage(again).cached_tokens, 0);
    let zeroed: BTreeSet<&u32> = plans.iter().flat_map(|plan| &plan.scrub).collect();
    let used: BTreeSet<&u32> =
        last.sequences.iter().filter(|s| s.id.request == poisoned).flat_map(|s| &s.block_table).collect();
    let reused = plans[first(&plans, again)..].iter().flat_map(|p| &p.sequences).flat_map(|s| &s.block_table);
    assert!(reused.filter(|b| used.contains(b)).all(|b| zeroed.contains(b)));
    assert!(!zeroed.is_empty());
}

/// The cache keeps nothing from those who need blocks.
#[test]
fn cached_blocks_are_given_up_when_needed() {
    let mut h = Harness::new(config(6));
    for seed in 0..5 {
        h.submit(1, prompt(seed, 16), 2);
        h.run();
    }
    let s = h.scheduler.snapshot();
    assert!(s.evictions > 0 && s.blocks_cached > 0, "{s:?}");
    h.scheduler.clear_prefix_cache();
    assert_eq!(h.scheduler.snapshot().blocks_cached, 0);
    let id = h.submit(1, prompt(4, 16), 2);
    h.run();
    assert_eq!(h.usage(id).cached_tokens, 0);
}

/// Blocks that are zeroed when a request takes the whole pool.
fn zeroed_in_all(h: &mut Harness) -> BTreeSet<u32> {
    let blocks = h.scheduler.config().blocks;
    h.submit(9, prompt(9, blocks * 4 - 4), 4);
    h.run().iter().flat_map(|plan| plan.scrub.clone()).collect()
}

/// Two choices after a prompt of 6 tokens, two steps in flight: the first choice's second row is being written to the block that
/// both share when the copy is made, and what it gives is never seen, since a stop string ends that choice.
fn copy_in_flight(max_tokens: usize) -> (Harness, StepPlan) {
    let mut h = Harness::new(Config { max_in_flight: 2, ..config(12) });
    let mut request = h.request(1, prompt(0, 6), max_tokens);
    request.choices = 2;
    request.stop_tokens = vec![99];
    let id = h.send(request);
    let prefill = h.plan().unwrap();
    let unseen = h.plan().unwrap();
    h.done(&prefill);
    let copying = h.plan().unwrap();
    assert_eq!(copying.copies.len(), 1);
    assert_eq!(copying.copies[0].source, unseen.sequences[0].block_table[1]);
    h.events.push(Event::Finish { sequence: choice(id, 0), reason: FinishReason::Stop });
    h.done(&unseen);
    let samples = vec![SampleResult::Token(99); copying.samples.len()];
    h.events.push(Event::Results(StepResults { step: copying.step, samples }));
    h.run();
    assert_eq!(h.outcome(id).map(|o| o.label()), Some("stop"));
    (h, copying)
}

#[test]
fn a_block_that_was_copied_from_under_a_step_in_flight_is_zeroed() {
    let (mut h, plan) = copy_in_flight(10);
    assert!(zeroed_in_all(&mut h).contains(&plan.copies[0].source));
}

#[test]
fn a_copy_of_what_a_step_in_flight_writes_is_zeroed() {
    // The first choice has no more rows, so that it is the second that copies.
    let (mut h, plan) = copy_in_flight(2);
    assert!(zeroed_in_all(&mut h).contains(&plan.copies[0].destination));
}

/// A cached block that went bad fails one request, not all that follow.
#[test]
fn what_was_read_before_a_row_that_is_not_finite_leaves_the_cache() {
    let mut h = Harness::new(config(20));
    h.submit(1, prompt(0, 20), 2);
    h.run();
    let victim = h.submit(1, prompt(0, 20), 2);
    let plan = h.plan().unwrap();
    assert_eq!(rows(&plan, victim), 4);
    let results = StepResults { step: plan.step, samples: vec![SampleResult::NotFinite] };
    h.events.push(Event::Results(results));
    h.run();
    assert_eq!(h.usage(victim).cached_tokens, 16);
    let next = h.submit(1, prompt(0, 20), 2);
    h.run();
    assert_eq!(h.usage(next).cached_tokens, 0);
}

/// Many that grow in a pool for one: each preemption doubles the room that a sequence needs to come back.
#[test]
fn nobody_comes_and_goes() {
    let blocks = 100;
    let mut h = Harness::new(config(blocks));
    let ids: Vec<_> = (0..40).map(|seed| h.submit(u64::from(seed % 3), prompt(seed, 8), 300)).collect();
    h.run();
    for id in ids {
        assert!(h.usage(id).preemptions <= blocks.ilog2(), "{:?}", h.usage(id));
    }
    assert!(h.scheduler.snapshot().preemptions > 40);
}

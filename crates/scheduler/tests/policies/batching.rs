//! Rows of a step.

use longhaul_scheduler::{
    Config, PendingId, PlannedSequence, Request, RequestId, ResultsError, SampleResult, StepId, StepResults,
};

use crate::harness::{Harness, TOKEN, choice, config, first, prompt, rows};

#[test]
fn decoding_goes_on_beside_a_long_prompt_and_the_prompt_beside_decoding() {
    let mut h = Harness::new(config(200));
    let streams: Vec<_> = (0..4).map(|key| h.submit(key, prompt(key as u32, 3), 60)).collect();
    h.turn();
    let long = h.submit(9, prompt(9, 200), 1);
    let mut computed = 0;
    while computed < 200 {
        let plan = h.turn().unwrap();
        streams.iter().for_each(|&s| assert_eq!(rows(&plan, s), 1));
        let chunk = rows(&plan, long);
        assert!(chunk >= h.scheduler.config().min_prefill_rows().min(200 - computed), "{chunk} rows");
        assert!(chunk <= h.scheduler.config().max_mixed_prefill_rows);
        computed += chunk;
    }
    assert_eq!(computed, 200);
    h.run();
}

#[test]
fn a_prompt_alone_takes_the_whole_budget() {
    let mut h = Harness::new(config(200));
    let id = h.submit(0, prompt(0, 60), 1);
    let chunks: Vec<usize> = h.run().iter().map(|plan| rows(plan, id)).collect();
    assert_eq!(chunks, [24, 24, 12]);
}

/// Half of the rows are the long prompt's, the others pass it.
#[test]
fn a_short_prompt_passes_a_long_one_of_another_key() {
    let mut h = Harness::new(config(400));
    let long = h.submit(0, prompt(0, 400), 1);
    h.turn();
    let short = h.submit(1, prompt(1, 10), 1);
    let plan = h.turn().unwrap();
    assert_eq!((rows(&plan, long), rows(&plan, short)), (14, 10));
    h.plan();
    assert!(h.outcome(short).is_some());
}

/// A stream of short prompts takes at most half of the rows.
#[test]
fn short_prompts_do_not_stop_a_long_one() {
    let mut h = Harness::new(config(400));
    let long = h.submit(0, prompt(0, 240), 1);
    h.turn();
    let mut turns = 1;
    while h.outcome(long).is_none() {
        for key in 1..4 {
            h.submit(key, prompt(turns * 4 + key as u32, 11), 1);
        }
        let plan = h.turn();
        assert!(plan.is_some_and(|plan| rows(&plan, long) >= 8 || h.outcome(long).is_some()));
        turns += 1;
    }
    assert!(turns <= 2 + 240 / 8, "{turns} turns");
}

#[test]
fn a_step_can_be_planned_while_another_runs() {
    let mut h = Harness::new(Config { max_in_flight: 2, ..config(20) });
    let id = h.submit(0, prompt(0, 6), 3);
    let prefill = h.plan().unwrap();
    let ahead = h.plan().unwrap();
    assert_eq!(
        (ahead.ids.as_slice(), ahead.pending.as_slice()),
        (&[0][..], &[PendingId { row: 0, sample: 0 }][..])
    );
    assert_eq!(ahead.sequences[0].kv_len, 7);
    assert_eq!(ahead.samples[0].position, 1);
    assert_eq!(h.plan(), None, "two steps are in flight");
    h.done(&prefill);
    let last = h.plan().unwrap();
    assert_eq!((last.pending.len(), last.samples[0].position), (1, 2));
    h.done(&ahead);
    assert_eq!(h.plan(), None, "max_tokens are on their way");
    h.done(&last);
    h.run();
    assert_eq!(h.told(choice(id, 0)), 3);
}

#[test]
fn a_request_may_ask_that_its_tokens_are_seen_first() {
    let mut h = Harness::new(Config { max_in_flight: 2, ..config(20) });
    let mut request = h.request(0, prompt(0, 6), 3);
    request.run_ahead = false;
    let id = h.send(request);
    let prefill = h.plan().unwrap();
    assert_eq!(h.plan(), None);
    h.done(&prefill);
    let next = h.plan().unwrap();
    assert_eq!((next.ids.as_slice(), next.pending.len()), (&[TOKEN][..], 0));
    h.done(&next);
    h.run();
    assert_eq!(h.told(choice(id, 0)), 3);
}

/// What was planned before a stop token was seen is dropped.
#[test]
fn a_row_too_many_is_not_told() {
    let mut h = Harness::new(Config { max_in_flight: 2, ..config(20) });
    let mut request = h.request(0, prompt(0, 6), 30);
    request.stop_tokens = vec![TOKEN];
    let id = h.send(request);
    let prefill = h.plan().unwrap();
    let ahead = h.plan().unwrap();
    h.done(&prefill);
    assert_eq!(h.plan(), None);
    assert_eq!((h.told(choice(id, 0)), h.outcome(id).map(|o| o.label())), (0, Some("stop")));
    h.done(&ahead);
    h.run();
    assert_eq!(h.updates.len(), 3);
}

#[test]
fn results_of_another_step_are_a_bug_of_the_caller() {
    let mut h = Harness::new(config(20));
    h.submit(0, prompt(0, 6), 3);
    let plan = h.plan().unwrap();
    let mut apply = |step, samples| {
        let results = StepResults { step: StepId(step), samples };
        h.scheduler.step(h.now, [longhaul_scheduler::Event::Results(results)])
    };
    let token = SampleResult::Token(TOKEN);
    let wrong = ResultsError::WrongStep { got: 5, expected: Some(plan.step) };
    assert_eq!(apply(5, vec![token]), Err(wrong));
    assert_eq!(apply(0, vec![]), Err(ResultsError::WrongCount { step: 0, got: 0, expected: 1 }));
    assert!(apply(0, vec![token]).is_ok(), "nothing had changed");
}

/// Who came first starts first, and nobody passes it because it is smaller.
#[test]
fn a_request_that_does_not_fit_now_is_not_passed() {
    let mut h = Harness::new(config(20));
    let running = h.submit(0, prompt(0, 40), 8);
    h.turn();
    let large = h.submit(1, prompt(1, 60), 2);
    let small = h.submit(2, prompt(2, 4), 2);
    let plans = h.run();
    assert!(first(&plans, large) <= first(&plans, small));
    assert!(first(&plans, small) > 3, "there was room for it all the time");
    assert_eq!(h.usage(running).preemptions, 0);
}

/// Prompts whose every row is to be scored: rows that are scored are few, and other prompts pass.
#[test]
fn scored_rows_are_bounded_and_hold_up_nobody() {
    let mut h = Harness::new(Config { max_scored_rows: 6, ..config(400) });
    let scored = |h: &mut Harness, key, len| {
        let request = h.request(key, prompt(key as u32, len), 1);
        h.send(Request { scored: true, ..request })
    };
    let long = scored(&mut h, 0, 60);
    let short = scored(&mut h, 1, 9);
    let other = h.submit(2, prompt(2, 30), 1);
    let last = scored(&mut h, 3, 9);
    let plans = h.run();
    let chunks = |id| plans.iter().map(|plan| rows(plan, id)).collect::<Vec<_>>();
    assert_eq!(chunks(other)[..2], [18, 12], "all that is left");
    assert_eq!(chunks(short)[..3], [3, 3, 3], "a half of the six");
    assert_eq!(chunks(last)[..6], [0, 0, 0, 3, 3, 3], "it comes when there are rows for it");
    assert_eq!(chunks(long), [vec![3; 6], vec![6; 7]].concat());
    for s in plans.iter().flat_map(|plan| &plan.sequences) {
        assert_eq!(s.scored, s.id.request != other);
    }
}

/// `⌈2n / min_scored_rows⌉` steps, whatever else there is.
#[test]
fn a_scored_prompt_is_not_held_up() {
    let config = Config { max_running: 4, max_logit_rows: 7, max_scored_rows: 6, ..config(400) };
    assert_eq!(config.min_scored_rows(), 4);
    let mut h = Harness::new(config);
    let long = h.request(0, prompt(0, 60), 1);
    let long = h.send(Request { scored: true, ..long });
    let mut turns = 0;
    while h.outcome(long).is_none() {
        for key in 1..4 {
            let request = h.request(key, prompt(turns * 4 + key as u32, 11), 9);
            h.send(Request { scored: turns % 2 == 0, ..request });
        }
        if let Some(plan) = h.turn().filter(|plan| rows(plan, long) > 0) {
            let unread = |s: &&PlannedSequence| s.scored && plan.samples.iter().all(|d| d.sequence != s.id);
            let unread: usize = plan.sequences.iter().filter(unread).map(|s| s.rows).sum();
            assert!(plan.samples.len() + unread <= 7, "{plan:?}");
        }
        turns += 1;
    }
    assert!(turns <= 1 + 2 * 60 / 4, "{turns} turns");
}

/// What others have computed is of no use when the logits are wanted, but what it computes is of use to others.
#[test]
fn a_scored_prompt_reads_no_cache_and_feeds_it() {
    let mut h = Harness::new(config(40));
    let request = h.request(1, prompt(0, 10), 2);
    for scored in [true, true, false] {
        let id = RequestId(request.id.0 + 10 + h.scheduler.snapshot().received);
        h.send(Request { id, scored, ..request.clone() });
        let plans = h.run();
        let cached = if scored { 0 } else { 8 };
        assert_eq!((rows(&plans[0], id), h.usage(id).cached_tokens), (10 - cached, cached));
    }
    assert_eq!(h.scheduler.snapshot().cache_queries, 10, "of the one that looked");
}

/// The choices after the first have nothing to be scored, nor has the first after its first token.
#[test]
fn scoring_ends_with_the_prompt() {
    let mut h = Harness::new(Config { max_in_flight: 2, max_scored_rows: 4, ..config(40) });
    let request = h.request(1, prompt(0, 6), 3);
    h.send(Request { scored: true, choices: 2, ..request });
    let scored: Vec<_> = std::iter::from_fn(|| h.turn())
        .flat_map(|plan| plan.sequences)
        .map(|s| (s.id.choice, s.rows, s.scored))
        .collect();
    assert_eq!(scored[..3], [(0, 4, true), (0, 2, true), (0, 1, false)]);
    assert!(scored[2..].iter().all(|&(_, _, scored)| !scored) && scored.iter().any(|s| s.0 == 1));
}

//! How requests end, and which are not taken.

use std::time::Duration;

use longhaul_scheduler::{
    Config, Event, FinishReason, Outcome, QueueLimits, SampleResult, StepResults, Update,
};

use crate::harness::{Harness, choice, config, prompt};

#[test]
fn what_can_never_run_is_refused_at_once() {
    type Break = fn(&mut longhaul_scheduler::Request);
    let cases: [(Break, &str); 7] = [
        (|r| r.prompt = [].into(), "prompt has no tokens"),
        (|r| r.max_tokens = 0, "max_tokens must be at least 1"),
        (|r| r.choices = 17, "n is 17; must be 1 to 16"),
        (|r| r.choices = 0, "n is 0; must be 1 to 16"),
        (|r| r.priority = 8, "priority is 8; must be 0 to 7"),
        (|r| r.max_tokens = 995, "10 prompt tokens and max_tokens 995 exceed the context of 1000 tokens"),
        (|r| r.max_tokens = usize::MAX, "exceed the context of 1000"),
    ];
    for (break_it, expected) in cases {
        let mut h = Harness::new(config(300));
        let mut request = h.request(0, prompt(0, 10), 5);
        break_it(&mut request);
        let id = h.send(request);
        assert_eq!(h.plan(), None);
        assert_eq!(h.outcome(id), Some(Outcome::Invalid));
        assert!(h.refusal(id).contains(expected), "{} lacks {expected}", h.refusal(id));
    }
    let mut h = Harness::new(config(10));
    let id = h.submit(0, prompt(0, 30), 11);
    let fits = h.submit(0, prompt(0, 30), 10);
    h.run();
    assert_eq!(h.refusal(id), "needs 11 KV blocks of 4 tokens, the pool has 10");
    assert_eq!(h.outcome(fits), Some(Outcome::Complete(FinishReason::Length)));
}

#[test]
fn queues_are_bounded_for_all_and_for_each_key() {
    let limits = |requests, tokens, bytes| QueueLimits { requests, tokens, bytes };
    let cases = [
        (limits(2, 99, 999), QueueLimits::NONE, "the queue is full: at most 2 requests", "shed_503"),
        (limits(9, 25, 999), QueueLimits::NONE, "the queue is full: at most 25 prompt tokens", "shed_503"),
        (limits(9, 99, 100), QueueLimits::NONE, "the queue is full: at most 100 bytes", "shed_503"),
        (QueueLimits::NONE, limits(2, 99, 999), "the key has 2 requests in the queue, its most", "shed_429"),
    ];
    for (queue, key_queue, message, label) in cases {
        let mut h = Harness::new(Config { queue, key_queue, ..config(100) });
        let ids: Vec<_> = (0..3).map(|seed| h.submit(1, prompt(seed, 10), 1)).collect();
        let other = h.submit(2, prompt(9, 1), 1);
        h.run();
        assert_eq!(h.refusal(ids[2]), message);
        assert_eq!(h.outcome(ids[2]).map(Outcome::label), Some(label));
        assert_eq!(h.outcome(ids[1]).map(Outcome::label), Some("length"));
        if label == "shed_429" {
            assert_eq!(h.outcome(other).map(Outcome::label), Some("length"), "another key is not concerned");
        }
        let later = h.submit(1, prompt(5, 10), 1);
        h.run();
        assert_eq!(h.outcome(later).map(Outcome::label), Some("length"), "the queue has room again");
    }
}

#[test]
fn deadlines_hold_in_the_queue_and_while_running() {
    let mut h = Harness::new(Config { max_running: 1, ..config(100) });
    let running = h.submit(0, prompt(0, 4), 50);
    let mut waiting = h.request(0, prompt(1, 4), 50);
    waiting.deadline = Some(Duration::from_millis(10));
    let waiting = h.send(waiting);
    let mut late = h.request(0, prompt(1, 4), 50);
    late.deadline = Some(Duration::from_millis(1));
    let late = h.send(late);
    (0..9).for_each(|_| drop(h.turn()));
    assert_eq!((h.outcome(late), h.outcome(waiting)), (Some(Outcome::Deadline), None));
    h.turn();
    assert_eq!((h.outcome(waiting), h.outcome(running)), (Some(Outcome::Deadline), None));
    h.run();
    assert_eq!(h.outcome(running).map(Outcome::label), Some("length"));

    let mut h = Harness::new(Config { max_request_time: Some(Duration::from_millis(5)), ..config(100) });
    let id = h.submit(0, prompt(0, 4), 50);
    h.run();
    assert_eq!(h.outcome(id), Some(Outcome::Deadline));
    assert_eq!(h.usage(id).output_tokens, h.told(choice(id, 0)));
    assert!((3..6).contains(&h.usage(id).output_tokens), "what it had is counted");
}

#[test]
fn a_wait_too_long_is_shed() {
    let queue_timeout = Some(Duration::from_millis(5));
    let mut h = Harness::new(Config { max_running: 1, queue_timeout, ..config(100) });
    let running = h.submit(0, prompt(0, 4), 20);
    let waiting = h.submit(0, prompt(1, 4), 20);
    h.run();
    assert_eq!(h.outcome(waiting), Some(Outcome::ShedEngine));
    assert_eq!(h.outcome(running).map(Outcome::label), Some("length"), "the limit is for the queue alone");
}

#[test]
fn a_clock_that_goes_back_changes_nothing() {
    let mut h = Harness::new(config(100));
    h.now = Duration::from_secs(100);
    let mut request = h.request(0, prompt(0, 4), 10);
    request.deadline = Some(Duration::from_secs(200));
    let id = h.send(request);
    h.turn();
    h.now = Duration::ZERO;
    h.run();
    assert_eq!(h.outcome(id).map(Outcome::label), Some("length"));
}

#[test]
fn a_cancelled_request_frees_its_blocks_at_once() {
    let mut h = Harness::new(config(100));
    let id = h.submit(0, prompt(0, 40), 10);
    let plan = h.plan().unwrap();
    h.events.push(Event::Cancel(id));
    assert_eq!(h.plan(), None);
    assert_eq!(h.outcome(id), Some(Outcome::ClientGone));
    assert_eq!(h.scheduler.snapshot().blocks_available, 100);
    // The step it was in goes on to its end.
    assert_eq!(plan.samples.len(), 0);
    h.done(&plan);
    h.events.push(Event::Cancel(id));
    h.run();
    assert_eq!(h.updates.len(), 2);
}

#[test]
fn several_choices_end_as_the_first_that_was_cut() {
    let mut h = Harness::new(config(100));
    let mut request = h.request(0, prompt(0, 4), 6);
    request.choices = 3;
    let id = h.send(request);
    (0..3).for_each(|_| drop(h.turn()));
    h.events.push(Event::Finish { sequence: choice(id, 0), reason: FinishReason::Stop });
    h.events.push(Event::Finish { sequence: choice(id, 1), reason: FinishReason::ToolCalls });
    h.run();
    assert_eq!(h.outcome(id), Some(Outcome::Complete(FinishReason::ToolCalls)));
    assert_eq!(h.told(choice(id, 2)), 6);
    assert!(h.told(choice(id, 0)) < 6);
}

#[test]
fn a_failed_step_ends_those_in_it() {
    let mut h = Harness::new(Config { max_running: 1, max_step_rows: 9, ..config(100) });
    let inside = h.submit(0, prompt(0, 4), 6);
    let outside = h.submit(1, prompt(1, 4), 6);
    let plan = h.plan().unwrap();
    h.events.push(Event::StepFailed(plan.step));
    h.run();
    assert_eq!(h.outcome(inside), Some(Outcome::EngineError));
    assert_eq!(h.outcome(outside).map(Outcome::label), Some("length"));
}

#[test]
fn a_sample_that_fails_ends_its_request() {
    let mut h = Harness::new(config(100));
    let ids = [h.submit(0, prompt(0, 4), 6), h.submit(1, prompt(1, 4), 6)];
    let plan = h.plan().unwrap();
    let mut samples = vec![SampleResult::Token(1); 2];
    let failed = plan.samples[0].sequence.request;
    samples[0] = SampleResult::Failed;
    h.events.push(Event::Results(StepResults { step: plan.step, samples }));
    h.run();
    for id in ids {
        let expected = if id == failed { "engine_error_500" } else { "length" };
        assert_eq!(h.outcome(id).map(Outcome::label), Some(expected));
    }
}

#[test]
fn a_drain_lets_finish_and_a_stop_does_not() {
    let mut h = Harness::new(config(100));
    let running = h.submit(0, prompt(0, 4), 6);
    h.turn();
    h.events.push(Event::Drain);
    let refused = h.submit(0, prompt(0, 4), 6);
    h.run();
    assert_eq!(
        (h.outcome(running), h.outcome(refused)),
        (Some(Outcome::Complete(FinishReason::Length)), Some(Outcome::Drained))
    );

    let mut h = Harness::new(config(100));
    let running = h.submit(0, prompt(0, 4), 6);
    h.turn();
    h.events.push(Event::Stop);
    h.run();
    assert_eq!(h.outcome(running), Some(Outcome::Drained));
}

#[test]
fn a_lost_engine_ends_everything_and_takes_nothing() {
    let mut h = Harness::new(config(100));
    let ids: Vec<_> = (0..12).map(|seed| h.submit(0, prompt(seed, 30), 6)).collect();
    h.plan();
    h.events.push(Event::EngineLost);
    assert_eq!(h.plan(), None);
    assert!(ids.iter().all(|&id| h.outcome(id) == Some(Outcome::EngineError)));
    let id = h.submit(0, prompt(0, 4), 6);
    h.run();
    assert_eq!((h.outcome(id), h.refusal(id)), (Some(Outcome::ShedEngine), "the engine has failed".into()));
}

#[test]
fn an_id_in_use_is_refused_and_the_first_goes_on() {
    let mut h = Harness::new(config(100));
    let request = h.request(0, prompt(0, 4), 6);
    let id = h.send(request.clone());
    h.turn();
    h.send(request);
    h.plan();
    let refused = h
        .updates
        .iter()
        .any(|u| matches!(u, Update::Finished { outcome: Outcome::Invalid, refusal: Some(_), .. }));
    assert!(refused && h.scheduler.snapshot().running == 1);
    assert_eq!(h.told(choice(id, 0)), 1);
}

/// The counters know every request that was ever sent.
#[test]
fn received_is_the_sum_of_what_ended() {
    let mut h = Harness::new(Config { max_running: 2, ..config(20) });
    for seed in 0..20 {
        let id = h.submit(u64::from(seed % 3), prompt(seed, 4 + seed as usize), 1 + seed as usize * 2);
        if seed % 5 == 0 {
            h.events.push(Event::Cancel(id));
        }
        h.turn();
    }
    h.run();
    let s = h.scheduler.snapshot();
    assert_eq!((s.received, s.finished.iter().sum::<u64>()), (20, 20));
    let at = Outcome::ALL.iter().position(|&o| o == Outcome::ClientGone).unwrap();
    assert_eq!(s.finished[at], 4);
}

//! Drafted tokens: what is told is the same, and nobody else notices.

use std::collections::{BTreeMap, BTreeSet};

use longhaul_scheduler::{
    Config, Event, NgramConfig, Outcome, Request, RequestId, SampleResult, StepPlan, StepResults,
};

use crate::harness::{Harness, choice, config, prompt, rows};

const NGRAM: NgramConfig =
    NgramConfig { num_speculative_tokens: 4, prompt_lookup_max: 3, prompt_lookup_min: 1 };

/// A device that reads: it says what `say` makes of all tokens up to a row.
struct Speaker {
    h: Harness,
    prompts: BTreeMap<RequestId, Vec<u32>>,
    say: fn(&[u32]) -> u32,
}

/// Says what was said three tokens before.
fn repeat(tokens: &[u32]) -> u32 {
    tokens[tokens.len().saturating_sub(3)]
}

/// Repeats itself, with an exception now and then that depends on all that was said: as greedy or seeded sampling does.
fn mostly_repeat(tokens: &[u32]) -> u32 {
    let hash = tokens.iter().fold(7u64, |hash, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ hash >> 29
    });
    if hash >> 40 & 7 == 0 { (hash >> 50) as u32 & 15 } else { repeat(tokens) }
}

impl Speaker {
    fn new(config: Config, say: fn(&[u32]) -> u32) -> Self {
        Self { h: Harness::new(config), prompts: BTreeMap::new(), say }
    }

    fn send(
        &mut self,
        key: u64,
        prompt: &[u32],
        max_tokens: usize,
        change: impl FnOnce(&mut Request),
    ) -> RequestId {
        let mut request = Request { speculate: true, ..self.h.request(key, prompt.to_vec(), max_tokens) };
        change(&mut request);
        self.prompts.insert(request.id, request.prompt.to_vec());
        self.h.send(request)
    }

    fn submit(&mut self, key: u64, prompt: &[u32], max_tokens: usize) -> RequestId {
        self.send(key, prompt, max_tokens, |_| {})
    }

    /// What is drawn from the logit rows of a plan.
    fn samples(&self, plan: &StepPlan) -> Vec<SampleResult> {
        let mut samples = Vec::new();
        let mut end = 0;
        for s in &plan.sequences {
            end += s.rows;
            let first = s.kv_len - s.rows;
            let mut tokens = self.prompts[&s.id.request].clone();
            tokens.extend(self.h.tokens(s.id));
            tokens.truncate(first);
            for row in end - s.rows..end {
                tokens.push(plan.ids[row]);
                if plan.logit_rows.contains(&row) {
                    samples.push(SampleResult::Token((self.say)(&tokens)));
                }
            }
        }
        samples
    }

    fn answer(&mut self, plan: &StepPlan, samples: Vec<SampleResult>) {
        self.h.events.push(Event::Results(StepResults { step: plan.step, samples }));
    }

    fn turn(&mut self) -> Option<StepPlan> {
        let plan = self.h.plan();
        if let Some(plan) = &plan {
            let samples = self.samples(plan);
            self.answer(plan, samples);
        }
        plan
    }

    fn run(&mut self) -> Vec<StepPlan> {
        let plans: Vec<StepPlan> = std::iter::from_fn(|| self.turn()).take(10_000).collect();
        let s = self.h.scheduler.snapshot();
        assert_eq!((s.waiting_requests, s.running, s.suspended), (0, 0, 0), "{s:?}");
        assert_eq!(s.blocks_available, s.blocks);
        plans
    }
}

fn speculating(blocks: usize) -> Config {
    Config { speculation: Some(NGRAM), ..config(blocks) }
}

/// Rows, of them drafts, of a request in each plan that it is in.
fn drafts(plans: &[StepPlan], id: RequestId) -> Vec<(usize, usize)> {
    let all = plans.iter().flat_map(|plan| &plan.sequences);
    all.filter(|s| s.id.request == id).map(|s| (s.rows, s.drafts)).collect()
}

#[test]
fn what_repeats_comes_several_tokens_a_step() {
    let mut s = Speaker::new(speculating(40), repeat);
    let id = s.submit(0, &[1, 2, 3, 1], 13);
    let plans = s.run();
    assert_eq!(s.h.tokens(choice(id, 0)), [2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]);
    // One token, five, five, and of the last two no more than may come.
    assert_eq!(drafts(&plans, id), [(4, 0), (5, 4), (5, 4), (2, 1)]);
    let second = &plans[1];
    assert_eq!((second.ids.as_slice(), second.sequences[0].kv_len), (&[2, 3, 1, 2, 3][..], 9));
    assert_eq!(second.logit_rows, [0, 1, 2, 3, 4]);
    assert_eq!(second.samples.iter().map(|s| s.position).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    let snapshot = s.h.scheduler.snapshot();
    assert_eq!((snapshot.drafts, snapshot.draft_tokens, snapshot.accepted_tokens), (3, 9, 9));
    assert_eq!(snapshot.accepted_per_position[..5], [3, 2, 2, 2, 0]);
}

/// To the token, whatever is drawn, for one step in flight and for two, alone and in a crowd.
#[test]
fn what_is_told_is_what_is_told_without_drafts() {
    for (max_in_flight, blocks) in [(1, 400), (2, 400), (1, 30), (2, 30)] {
        let tell = |speculation| {
            let config = Config { max_in_flight, speculation, ..config(blocks) };
            let mut s = Speaker::new(config, mostly_repeat);
            let ids: Vec<_> = (0..12u32)
                .map(|seed| {
                    let prompt: Vec<u32> = (0..5 + seed).map(|i| (i * seed) % 7).collect();
                    s.send(u64::from(seed % 3), &prompt, 60, |request| {
                        request.choices = if seed % 4 == 0 { 2 } else { 1 };
                        request.stop_tokens = vec![13];
                    })
                })
                .collect();
            s.run();
            let told: Vec<_> = ids.iter().flat_map(|&id| [0, 1].map(|c| s.h.tokens(choice(id, c)))).collect();
            let ends: Vec<_> = ids.iter().map(|&id| s.h.outcome(id)).collect();
            (told, ends, s.h.scheduler.snapshot())
        };
        let (plain, speculated) = (tell(None), tell(Some(NGRAM)));
        assert_eq!((&plain.0, &plain.1), (&speculated.0, &speculated.1));
        let s = speculated.2;
        assert!(s.accepted_tokens > 50 && s.draft_tokens > s.accepted_tokens + 50, "{s:?}");
        assert_eq!(plain.2.drafts, 0);
        assert!(blocks == 400 || s.preemptions > 0, "{s:?}");
    }
}

#[test]
fn a_stop_token_ends_the_run_that_it_is_in() {
    fn stop_after_ten(tokens: &[u32]) -> u32 {
        if tokens.len() >= 10 { 99 } else { repeat(tokens) }
    }
    let mut s = Speaker::new(speculating(40), stop_after_ten);
    let id = s.send(0, &[1, 2, 3, 1], 50, |request| request.stop_tokens = vec![99]);
    let plans = s.run();
    assert_eq!(s.h.tokens(choice(id, 0)), [2, 3, 1, 2, 3, 1]);
    assert_eq!(drafts(&plans, id), [(4, 0), (5, 4), (5, 4)]);
    assert_eq!(s.h.outcome(id).map(Outcome::label), Some("stop"));
    assert_eq!(s.h.usage(id).output_tokens, 6);
    // Nothing is drafted from a stop token on.
    let mut s = Speaker::new(speculating(40), repeat);
    let id = s.send(0, &[1, 2, 99, 1], 50, |request| request.stop_tokens = vec![99]);
    assert_eq!(drafts(&s.run(), id), [(4, 0), (1, 0)]);
}

/// Two wrong drafts out of four: their rows are overwritten, and no cache has them.
#[test]
fn what_was_guessed_wrong_is_never_found() {
    fn breaks_off(tokens: &[u32]) -> u32 {
        if tokens.len() >= 7 { 50 + tokens.len() as u32 } else { repeat(tokens) }
    }
    let mut s = Speaker::new(speculating(40), breaks_off);
    let id = s.submit(0, &[1, 2, 3, 1], 8);
    let plans = s.run();
    assert_eq!(s.h.tokens(choice(id, 0)), [2, 3, 1, 57, 58, 59, 60, 61]);
    assert_eq!(drafts(&plans, id)[..3], [(4, 0), (5, 4), (1, 0)]);
    assert_eq!((plans[1].sequences[0].kv_len, plans[2].sequences[0].kv_len), (9, 8));
    let mut cached = |prompt: &[u32]| {
        let id = s.submit(0, prompt, 1);
        s.run();
        s.h.usage(id).cached_tokens
    };
    assert_eq!(cached(&[1, 2, 3, 1, 2, 3, 1, 2, 3, 1]), 4, "guessed");
    assert_eq!(cached(&[1, 2, 3, 1, 2, 3, 1, 57, 9]), 8, "said");
}

/// The answer to one plan of a sequence that drafts four tokens, of which the first is wrong, with `spoiled` results not finite.
fn spoil(spoiled: &[usize]) -> (Speaker, RequestId, StepPlan) {
    fn breaks_off(tokens: &[u32]) -> u32 {
        if tokens.len() == 9 { 50 } else { repeat(tokens) }
    }
    let mut s = Speaker::new(speculating(10), breaks_off);
    let id = s.submit(0, &[1, 2, 3, 1, 2, 3, 1, 2], 12);
    s.turn();
    let plan = s.h.plan().unwrap();
    assert_eq!((plan.sequences[0].drafts, plan.sequences[0].kv_len), (4, 13));
    let mut samples = s.samples(&plan);
    assert_eq!(samples[0], SampleResult::Token(50));
    spoiled.iter().for_each(|&at| samples[at] = SampleResult::NotFinite);
    s.answer(&plan, samples);
    (s, id, plan)
}

#[test]
fn what_is_not_finite_behind_a_wrong_guess_ends_nothing_and_is_zeroed() {
    // Rows 8 to 12: the first is right, and in the block of the next three.
    for (spoiled, zeroed, computed) in [(&[2, 3, 4][..], 2, 2), (&[4], 1, 1), (&[], 0, 1)] {
        let (mut s, id, plan) = spoil(spoiled);
        let next = s.turn().unwrap();
        assert_eq!(next.scrub.len(), if computed == 2 { 1 } else { 0 }, "{spoiled:?}: {next:?}");
        assert_eq!((rows(&next, id), next.sequences[0].kv_len), (computed, 10));
        let mut scrubbed: BTreeSet<u32> = next.scrub.iter().copied().collect();
        let plans = s.run();
        scrubbed.extend(plans.iter().flat_map(|plan| &plan.scrub));
        let table = &plan.sequences[0].block_table;
        assert!(
            table[4 - zeroed..].iter().all(|block| scrubbed.contains(block)),
            "{scrubbed:?} of {table:?}"
        );
        assert_eq!(scrubbed.len(), zeroed);
        assert_eq!(s.h.outcome(id).map(Outcome::label), Some("length"));
        let told = s.h.tokens(choice(id, 0));
        let (mut plain, ..) = spoil(&[]);
        plain.run();
        assert_eq!(told, plain.h.tokens(choice(id, 0)));
    }
}

/// The first row has read nothing but what is right.
#[test]
fn what_is_not_finite_in_a_row_that_counts_ends_the_request() {
    let (mut s, id, _) = spoil(&[0, 1, 2, 3, 4]);
    s.run();
    assert_eq!(s.h.outcome(id), Some(Outcome::NumericError));

    let mut s = Speaker::new(speculating(10), repeat);
    let id = s.submit(0, &[1, 2, 3, 1], 12);
    s.turn();
    let plan = s.h.plan().unwrap();
    let mut samples = s.samples(&plan);
    samples[2] = SampleResult::NotFinite;
    s.answer(&plan, samples);
    s.run();
    assert_eq!(s.h.outcome(id), Some(Outcome::NumericError));
    assert_eq!(s.h.tokens(choice(id, 0)), [2, 3, 1], "what was right before it is told");
}

/// Everybody else is in the same steps with the same rows, as long as the one that drafts runs.
#[test]
fn others_run_as_if_nobody_drafted() {
    for max_step_rows in [24, 11] {
        let others = |speculation| {
            let config = Config { max_step_rows, speculation, ..config(400) };
            let mut s = Speaker::new(config, mostly_repeat);
            let drafting = s.submit(0, &[1, 2, 3, 1, 2], 60);
            let mut turns = Vec::new();
            for seed in 0..60u32 {
                if seed % 3 == 0 {
                    s.send(u64::from(seed % 5), &prompt(seed, 3 + seed as usize / 2), 9, |r| {
                        r.speculate = false
                    });
                }
                let Some(plan) = s.turn().filter(|_| s.h.outcome(drafting).is_none()) else { break };
                let rows = plan.sequences.iter().filter(|s| s.id.request != drafting);
                turns.push(rows.map(|s| (s.id, s.rows, s.kv_len)).collect::<Vec<_>>());
            }
            (turns, s.h.scheduler.snapshot())
        };
        let (plain, speculated) = (others(None), others(Some(NGRAM)));
        let turns = speculated.0.len();
        assert!(turns > 15 && turns < plain.0.len(), "{turns} of {}", plain.0.len());
        assert_eq!(plain.0[..turns], speculated.0);
        assert!(speculated.1.accepted_tokens > 5, "{:?}", speculated.1);
    }
}

/// A draft takes no block that the next decode rows may need, and none while a request waits for blocks.
#[test]
fn drafts_leave_blocks_to_others() {
    let kept = |blocks, waits: bool| {
        let mut s = Speaker::new(speculating(blocks), repeat);
        let id = s.submit(0, &[1, 2, 3, 1, 2, 3, 1, 2], 8);
        s.turn();
        if waits {
            s.submit(1, &prompt(1, 30), 1);
        }
        let plan = s.turn().unwrap();
        s.run();
        assert_eq!(s.h.scheduler.snapshot().preemptions, 0);
        drafts(&[plan], id)[0].1
    };
    // The position of the decode row begins a block, which holds three drafts; the fourth needs another.
    assert_eq!(kept(8, false), 4);
    assert_eq!(kept(8, true), 3, "the other waits for the pool");
    assert_eq!(kept(5, false), 4);
    assert_eq!(kept(4, false), 3, "the last block is kept");
}

#[test]
fn rows_that_are_few_are_shared() {
    let told = |max_step_rows, max_logit_rows| {
        let config = Config { max_running: 3, max_step_rows, max_logit_rows, ..speculating(40) };
        let mut s = Speaker::new(config, repeat);
        let ids = [0, 1, 2].map(|key| s.submit(key, &[1, 2, 3, 1, 2], 30));
        s.turn();
        let plan =
            std::iter::from_fn(|| s.turn()).find(|plan| plan.sequences.iter().all(|s| s.rows > s.drafts));
        let plan = plan.filter(|plan| plan.samples.len() == plan.rows()).unwrap();
        ids.map(|id| rows(&plan, id))
    };
    assert_eq!(told(24, usize::MAX), [5, 5, 5]);
    assert_eq!(told(24, 3), [1, 1, 1], "no logits are left");
    assert_eq!(told(24, 8), [3, 3, 2]);
}

/// The choices share blocks until each has its own: the first does not draft into them.
#[test]
fn choices_draft_once_they_are_apart() {
    let mut s = Speaker::new(speculating(40), repeat);
    let id = s.send(0, &[1, 2, 3, 1, 2, 3], 20, |request| request.choices = 3);
    // All but the last token of this prompt are cached: its first draw is a decode row.
    s.submit(0, &[1, 2, 3, 1, 2, 3, 1, 2], 1);
    let mut plans = s.run();
    let again = s.send(0, &[1, 2, 3, 1, 2], 20, |request| request.choices = 2);
    plans.extend(s.run());
    for id in [id, again] {
        let rows = drafts(&plans, id);
        assert_eq!(rows[0].1, 0, "{rows:?}");
        assert!(rows[1..4].iter().any(|&(_, drafts)| drafts > 0), "{rows:?}");
    }
    for choice_of in (0..3).map(|c| choice(id, c)).chain((0..2).map(|c| choice(again, c))) {
        assert_eq!(s.h.told(choice_of), 20);
    }
}

/// A prompt that comes from the cache is read into its index a step's rows at a time.
#[test]
fn a_long_cached_prompt_holds_up_no_step() {
    let long: Vec<u32> = (0..200).map(|i| i % 3).collect();
    let mut s = Speaker::new(speculating(400), repeat);
    s.submit(0, &long, 1);
    s.run();
    let id = s.submit(0, &long, 40);
    let plans = s.run();
    assert_eq!(s.h.usage(id).cached_tokens, 196);
    let first = drafts(&plans, id).iter().position(|&(_, drafts)| drafts > 0);
    assert_eq!(first, Some(200usize.div_ceil(24) - 1));
}

/// Two steps may be in flight, but a sequence that drafts waits for its draws.
#[test]
fn a_sequence_that_drafts_waits_for_the_host() {
    let mut s = Speaker::new(Config { max_in_flight: 2, ..speculating(40) }, repeat);
    s.submit(0, &[1, 2, 3, 1], 13);
    s.turn();
    let plan = s.turn().unwrap();
    assert_eq!((plan.pending.len(), plan.sequences[0].drafts), (0, 4));
    let plan = s.h.plan().unwrap();
    assert_eq!(s.h.plan(), None, "its draws are not known");
    let samples = s.samples(&plan);
    s.answer(&plan, samples);
    s.run();
}

/// Tokens are paid for, guesses are not.
#[test]
fn a_key_pays_for_what_is_told() {
    fn surprise(tokens: &[u32]) -> u32 {
        if tokens.last() == Some(&1) { 100 + tokens.len() as u32 } else { 1 }
    }
    // Key 0 drafts and is done first; then two requests wait for its place, its own before the other's.
    let own_is_next = |say, max_tokens| {
        let mut s = Speaker::new(Config { max_running: 2, ..speculating(60) }, say);
        let drafting = s.submit(0, &[1, 2, 3, 1, 2], max_tokens);
        s.send(1, &[1, 2, 3, 1, 2], 31, |request| request.speculate = false);
        s.turn();
        let waiting = [0, 1].map(|key| s.submit(key, &[5, 6, 7], 1));
        let plans = s.run();
        assert!(s.h.scheduler.snapshot().draft_tokens > 20);
        assert_eq!(s.h.usage(drafting).output_tokens, max_tokens);
        let [own, other] = waiting.map(|id| plans.iter().position(|plan| rows(plan, id) > 0).unwrap());
        own < other
    };
    assert!(!own_is_next(repeat, 30), "it has drawn more in as many steps");
    assert!(own_is_next(surprise, 30), "it has drawn as much, and what came first is next");
}

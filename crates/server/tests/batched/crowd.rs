//! A thousand requests together give what each gives alone.

use std::sync::Arc;

use longhaul_engine::{Engine, Generate, KvPool, Loader, ModelRef, Request, SamplingParams};
use longhaul_server::{BatchOptions, Batched, Event, Failure, NgramConfig, Serving, Snapshot, Submission};

use crate::harness::{endless, next, start, submission};

const REQUESTS: usize = 1000;

/// Tokens of the context of both engines.
const CONTEXT: usize = 512;

/// Tokens of a KV block of both.
const BLOCK: usize = 64;

/// Xorshift: the same requests in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn ids(&mut self, count: u64, vocab: u64) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab) as u32).collect()
    }
}

/// A request, and after how many events its client leaves.
struct Case {
    submission: Submission,
    leaves: Option<usize>,
}

/// Lengths, sampling, shared prefixes, choices, keys, priorities and clients that leave.
fn cases(vocab: u64) -> Vec<Case> {
    let mut random = Random(0x5eed_1234_dead_beef);
    let prefixes: Vec<Vec<u32>> = (0..6).map(|i| random.ids(16 + 24 * i, vocab)).collect();
    let case = |index: usize| {
        let mut prompt = match random.one_in(2) {
            true => prefixes[random.below(6) as usize].clone(),
            false => Vec::new(),
        };
        let tail = match random.one_in(8) {
            true => 1 + random.below(160),
            false => 1 + random.below(24),
        };
        prompt.extend(random.ids(tail, vocab));
        if random.one_in(4) {
            // Something to look up when tokens are drafted.
            let repeated = prompt.clone();
            prompt.extend(repeated);
        }
        prompt.truncate(CONTEXT - 100);
        let mut params = SamplingParams::greedy();
        if random.one_in(2) {
            params.temperature = 0.5 + random.below(10) as f32 / 10.0;
            params.seed = random.below(1 << 40);
            params.top_k = [0, 0, 5, 40][random.below(4) as usize];
            params.top_p = [1.0, 1.0, 0.9, 0.5][random.below(4) as usize];
            params.min_p = [0.0, 0.0, 0.05][random.below(3) as usize];
        }
        if random.one_in(4) {
            params.repetition_penalty = 1.2;
            params.frequency_penalty = 0.3;
            params.presence_penalty = [0.0, -0.5][random.below(2) as usize];
        }
        let mut submission = match random.one_in(3) {
            true => submission(&prompt),
            false => endless(&prompt, |_| {}),
        };
        submission.id = format!("case-{index}");
        submission.sampling.params = params;
        // Long answers to short prompts: they are admitted and then want more blocks than there are.
        submission.max_tokens = 1 + random.below(if tail < 12 { 120 } else { 16 }) as usize;
        submission.n = [1, 1, 1, 3][random.below(4) as usize];
        submission.priority = random.below(5) as i32 - 2;
        submission.cache_salt = random.one_in(10).then(|| "salt".to_owned());
        submission.namespace.0 =
            [None, Some(Arc::from("a")), Some(Arc::from("b"))][random.below(3) as usize].clone();
        Case { submission, leaves: random.one_in(8).then(|| random.below(20) as usize) }
    };
    (0..REQUESTS).map(case).collect()
}

/// The tokens of each choice, from the engine that runs one request at a time.
fn alone(engine: &mut Engine, submission: &Submission) -> Vec<Vec<u32>> {
    let choice = |index| {
        let mut sampling = submission.sampling.params;
        sampling.seed = sampling.seed.wrapping_add(index);
        let request = Request {
            sampling,
            ignore_eos: submission.sampling.ignore_eos,
            ..Request::greedy(submission.prompt.to_vec(), submission.max_tokens)
        };
        engine.generate(&request, &mut ()).unwrap().ids
    };
    (0..submission.n.into()).map(choice).collect()
}

/// The tokens of each choice, and whether all came.
async fn told(batched: &Batched, case: &Case, end_tokens: &[u32]) -> (Vec<Vec<u32>>, bool) {
    let mut stream = batched.submit(case.submission.clone()).unwrap();
    let mut choices = vec![Vec::new(); case.submission.n as usize];
    let mut events = 0;
    while let Some(event) = next(&mut stream).await {
        match event {
            Event::Token { choice, token, .. } => {
                if case.submission.sampling.ignore_eos || !end_tokens.contains(&token.id) {
                    choices[choice as usize].push(token.id);
                }
            }
            Event::Started { .. } | Event::Prompt(_) | Event::Finished { .. } => {}
            Event::Failed(failure) => panic!("{}: {failure}", case.submission.id),
        }
        events += 1;
        if case.leaves.is_some_and(|most| events > most) {
            return (choices, false);
        }
    }
    (choices, true)
}

fn engine(pool: KvPool) -> Engine {
    let mut loader = Loader { max_model_len: Some(CONTEXT), ..Loader::new(ModelRef::Demo) };
    loader.device.kv_pool = pool;
    loader.load(&mut |_, _| {}).unwrap()
}

/// Runs all cases together on a pool of few blocks; each must give what it gives alone, or the beginning of it if its client left.
async fn together(cases: Arc<Vec<Case>>, expected: &[Vec<Vec<u32>>], options: BatchOptions) -> Snapshot {
    let engine = engine(KvPool::Blocks(CONTEXT / BLOCK + 2));
    assert_eq!(engine.block_size(), BLOCK);
    let end_tokens = Arc::new(engine.end_tokens());
    let batched = Arc::new(start(engine, options));
    let tasks: Vec<_> = (0..cases.len())
        .map(|index| {
            let (batched, cases, end_tokens) =
                (Arc::clone(&batched), Arc::clone(&cases), Arc::clone(&end_tokens));
            tokio::spawn(async move { told(&batched, &cases[index], &end_tokens).await })
        })
        .collect();
    let mut different = 0;
    for ((task, case), expected) in tasks.into_iter().zip(cases.iter()).zip(expected) {
        let (choices, is_whole) = task.await.unwrap();
        let same = match is_whole {
            true => choices == *expected,
            false => choices.iter().zip(expected).all(|(told, whole)| whole.starts_with(told)),
        };
        if !same {
            different += 1;
            eprintln!("{}: {choices:?} and not {expected:?}", case.submission.id);
        }
    }
    assert_eq!(different, 0);
    let snapshot = loop {
        let snapshot = batched.snapshot();
        if snapshot.running + snapshot.waiting == 0 {
            break snapshot;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    };
    assert_eq!(snapshot.kv_cache_usage, 0.0, "blocks were lost");
    assert!(snapshot.preemptions > 20, "{snapshot:?}");
    // Every one of them is on some request's account.
    assert_eq!(snapshot.request_preemptions_sum, snapshot.preemptions);
    assert!(
        snapshot.request_preemptions.iter().sum::<u64>() > snapshot.request_preemptions[0],
        "{snapshot:?}"
    );
    snapshot
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_give_together_what_they_give_alone() {
    let mut reference = engine(KvPool::OneContext);
    let cases = Arc::new(cases(reference.spec().vocab_size as u64));
    let expected: Vec<_> = cases.iter().map(|case| alone(&mut reference, &case.submission)).collect();
    drop(reference);

    let plain = together(Arc::clone(&cases), &expected, BatchOptions::default()).await;
    assert!(plain.prefix_hits > 1000 && plain.speculation.is_none(), "{plain:?}");

    let ahead =
        BatchOptions { async_scheduling: Some(true), no_prefix_cache: true, ..BatchOptions::default() };
    assert_eq!(together(Arc::clone(&cases), &expected, ahead).await.prefix_hits, 0);

    let ngram = NgramConfig { num_speculative_tokens: 4, prompt_lookup_max: 3, prompt_lookup_min: 1 };
    let drafted =
        BatchOptions { speculation: Some(ngram), async_scheduling: Some(true), ..BatchOptions::default() };
    let counts = together(cases, &expected, drafted).await.speculation.unwrap();
    assert!(counts.accepted_tokens > 100 && counts.accepted_tokens < counts.draft_tokens, "{counts:?}");
    assert_eq!(counts.accepted_per_position.iter().sum::<u64>(), counts.accepted_tokens);
}

#[tokio::test]
async fn an_abort_ends_what_runs_with_a_reason() {
    let batched = start(engine(KvPool::OneContext), BatchOptions::default());
    let mut stream = batched.submit(Submission { max_tokens: 400, ..endless(&[5, 9], |_| {}) }).unwrap();
    assert!(matches!(next(&mut stream).await, Some(Event::Started { .. })));
    batched.abort_all();
    let mut last = None;
    while let Some(event) = next(&mut stream).await {
        last = Some(event);
    }
    assert_eq!(last, Some(Event::Failed(Failure::Drained)));
    assert!(batched.submit(submission(&[5])).is_err());
}

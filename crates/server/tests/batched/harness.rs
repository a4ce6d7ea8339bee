use std::future::poll_fn;
use std::sync::Arc;

use longhaul_engine::{Engine, Loader, ModelRef, SamplingParams};
use longhaul_server::{
    BatchOptions, Batchable, Batched, Defaults, Event, EventStream, Finish, Namespace, Sampling, Serving,
    Submission, TokenScore,
};

pub fn demo() -> Engine {
    Loader::new(ModelRef::Demo).load(&mut |_, _| {}).unwrap()
}

/// `engine`, batched. Readers are never too slow.
pub fn start(engine: Engine, options: BatchOptions) -> Batched {
    let batchable = Batchable::engine(engine, "demo".into(), Defaults::Neutral);
    let options = BatchOptions { queued_events: 4096, ..options };
    Batched::start(batchable, &options, |loss| panic!("{loss:?}")).unwrap()
}

pub fn submission(prompt: &[u32]) -> Submission {
    let sampling = Sampling {
        params: SamplingParams::greedy(),
        logit_bias: Vec::new(),
        allowed_token_ids: Vec::new(),
        bad_words: Vec::new(),
        stop_token_ids: Vec::new(),
        min_tokens: 0,
        ignore_eos: false,
    };
    Submission {
        id: "test".into(),
        prompt: Arc::from(prompt),
        sampling,
        grammar: None,
        max_tokens: 12,
        n: 1,
        logprobs: Some(0),
        prompt_logprobs: None,
        deadline: None,
        priority: 0,
        cache_salt: None,
        namespace: Namespace::default(),
    }
}

/// A request that goes on after end-of-sequence tokens, with `rules`.
pub fn endless(prompt: &[u32], rules: impl FnOnce(&mut Sampling)) -> Submission {
    let mut submission = submission(prompt);
    submission.sampling.ignore_eos = true;
    rules(&mut submission.sampling);
    submission
}

/// What a request of one choice was told.
#[derive(Default)]
pub struct Record {
    pub prompt: Vec<Option<TokenScore>>,
    pub tokens: Vec<TokenScore>,
    pub finish: Option<Finish>,
}

impl Record {
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

pub async fn next(stream: &mut EventStream) -> Option<Event> {
    poll_fn(|cx| stream.poll_next(cx)).await
}

pub async fn run(batched: &Batched, submission: Submission) -> Record {
    let mut stream = batched.submit(submission).unwrap();
    let mut record = Record::default();
    while let Some(event) = next(&mut stream).await {
        match event {
            Event::Started { .. } => {}
            Event::Prompt(scores) => record.prompt.extend(scores),
            Event::Token { token, finish, .. } => {
                assert_eq!(record.finish, None, "a token behind the last one");
                record.tokens.push(token);
                record.finish = finish;
            }
            Event::Finished { finish, .. } => record.finish = Some(finish),
            Event::Failed(failure) => panic!("{failure}"),
        }
    }
    record
}

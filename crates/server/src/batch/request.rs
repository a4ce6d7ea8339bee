//! A request between its submission and its end: what the step loop has to know to draw its tokens and to tell of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use longhaul_engine::{BatchDraw, Seen};

use super::admission::Place;
use crate::serving::{
    Event, EventSink, Failure, Finish, Matcher, ModelInfo, PromptToken, Submission, TokenScore,
};

/// What all requests of a model have in common.
pub(super) struct Rules {
    /// Ids that end a choice.
    pub(super) end_tokens: Vec<u32>,
    /// Ids that nobody may draw.
    pub(super) padding: Arc<[u32]>,
    pub(super) vocab_size: usize,
}

/// A request that has not ended.
pub(super) struct Running {
    submission: Submission,
    sink: EventSink,
    /// Its place in the queue, until it starts.
    place: Option<Place>,
    choices: Vec<Choice>,
    /// Ids that end a choice.
    stop_ids: Vec<u32>,
    /// Those of the model among them.
    end_ids: Vec<u32>,
    /// What must not be drawn, and what must not before `min_tokens`.
    banned: Arc<[u32]>,
    banned_early: Arc<[u32]>,
    bias: Arc<[(u32, f32)]>,
    allowed: Option<Arc<[u32]>>,
    /// Prompt tokens whose scores were told.
    scored: usize,
    /// Why it fails, when the scheduler does not know.
    failure: Option<Failure>,
}

struct Choice {
    seen: Seen,
    matcher: Option<Box<dyn Matcher>>,
    /// The last tokens told, as many as matter for bad words.
    tail: Vec<u32>,
    /// Tokens told.
    tokens: usize,
    /// Scores of tokens that were drawn and not told yet, by position.
    drawn: BTreeMap<usize, TokenScore>,
    /// Nothing more is told of it.
    done: bool,
}

impl Running {
    pub(super) fn new(submission: Submission, sink: EventSink, place: Place, rules: &Rules) -> Self {
        let sampling = &submission.sampling;
        let seen = Seen::new(&sampling.params, &submission.prompt);
        let choice = |_| Choice {
            seen: seen.clone(),
            matcher: submission.grammar.as_ref().map(|grammar| grammar.matcher()),
            tail: Vec::new(),
            tokens: 0,
            drawn: BTreeMap::new(),
            done: false,
        };
        let choices = (0..submission.n).map(choice).collect();
        let mut stop_ids = sampling.stop_token_ids.clone();
        // A grammar allows an end where the text may end, and decides how to go on.
        let ends = !sampling.ignore_eos || submission.grammar.is_some();
        if ends {
            stop_ids.extend(&rules.end_tokens);
        }
        let banned_early = match sampling.min_tokens {
            0 => Arc::clone(&rules.padding),
            _ => rules.padding.iter().chain(&stop_ids).copied().collect(),
        };
        Self {
            stop_ids,
            end_ids: if ends { rules.end_tokens.clone() } else { Vec::new() },
            banned: Arc::clone(&rules.padding),
            banned_early,
            bias: sampling.logit_bias.clone().into(),
            allowed: mask(&sampling.allowed_token_ids, rules.vocab_size),
            place: Some(place),
            choices,
            sink,
            submission,
            scored: 0,
            failure: None,
        }
    }

    /// Ids that end a choice.
    pub(super) fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    pub(super) fn submission(&self) -> &Submission {
        &self.submission
    }

    /// Whether the next draw depends on the tokens before it.
    pub(super) fn looks_back(&self) -> bool {
        let sampling = &self.submission.sampling;
        let has_bad_words = sampling.bad_words.iter().any(|word| word.len() > 1);
        has_bad_words
            || self.submission.grammar.is_some()
            || self.choices.iter().any(|choice| choice.seen.is_used())
    }

    /// Whether its client wants nothing more of it.
    pub(super) fn is_cancelled(&self) -> bool {
        self.sink.is_cancelled()
    }

    /// Choices that need no further tokens, and are told so here for the first time.
    pub(super) fn newly_stopped(&mut self) -> Vec<u32> {
        let sink = &self.sink;
        let stopped = |(index, choice): (u32, &mut Choice)| {
            let stopped = !choice.done && sink.is_stopped(index);
            choice.done |= stopped;
            stopped.then_some(index)
        };
        (0..).zip(&mut self.choices).filter_map(stopped).collect()
    }

    /// How the token at `position` of a choice is drawn. A grammar that leads nowhere fails the request: false.
    pub(super) fn draw(&mut self, choice: u32, position: usize) -> (BatchDraw, bool) {
        let sampling = &self.submission.sampling;
        let mut params = sampling.params;
        params.seed = params.seed.wrapping_add(choice.into());
        let early = position < sampling.min_tokens;
        let mut draw = BatchDraw {
            params,
            position: position as u64,
            seen: Vec::new(),
            bias: Arc::clone(&self.bias),
            banned: Arc::clone(if early { &self.banned_early } else { &self.banned }),
            allowed: self.allowed.clone(),
        };
        let Some(state) = self.choices.get_mut(choice as usize).filter(|choice| !choice.done) else {
            return (draw, true);
        };
        draw.seen = state.seen.tokens().to_vec();
        let bad = sampling.bad_words.iter().filter_map(|word| last_of(word, &state.tail));
        let bad: Vec<u32> = bad.collect();
        if !bad.is_empty() {
            draw.banned = draw.banned.iter().copied().chain(bad).collect();
        }
        if let Some(matcher) = &mut state.matcher {
            match matcher.allowed() {
                Ok(words) => {
                    let goes_on = !early && !sampling.ignore_eos;
                    match constrain(words, self.allowed.as_deref(), &self.end_ids, goes_on) {
                        Some(mask) => draw.allowed = Some(mask),
                        // The text is complete: it ends, whatever the other rules say.
                        None => {
                            draw.allowed = Some(words.into());
                            draw.banned = Arc::clone(&self.banned);
                        }
                    }
                }
                Err(message) => {
                    self.explain(Failure::Grammar(message));
                    return (draw, false);
                }
            }
        }
        (draw, true)
    }

    /// Alternatives that are wanted beside each token.
    pub(super) fn top_logprobs(&self) -> usize {
        self.submission.logprobs.unwrap_or(0) as usize
    }

    /// The token of the prompt behind `position`, when its score is wanted and was not told yet, and how many alternatives.
    pub(super) fn to_score(&self, position: usize) -> Option<(u32, usize)> {
        let top = self.submission.prompt_logprobs?;
        let next = self.submission.prompt.get(position + 1)?;
        (position + 1 >= self.scored.max(1)).then_some((*next, top as usize))
    }

    /// A token was drawn, which the scheduler has still to accept.
    pub(super) fn drawn(&mut self, choice: u32, position: usize, token: TokenScore) {
        if let Some(choice) = self.choices.get_mut(choice as usize) {
            choice.drawn.insert(position, token);
        }
    }

    /// A draw failed, for a reason that only the rules of the request explain.
    pub(super) fn nothing_allowed(&mut self) {
        let failure = match self.submission.grammar {
            Some(_) => Failure::Grammar("no token that the grammar allows may be drawn".into()),
            None => Failure::NothingAllowed,
        };
        self.explain(failure);
    }

    /// Scores of the tokens behind `first_position`. Those that were told before, by a run that was preempted, are skipped.
    pub(super) fn scored(&mut self, first_position: usize, scores: Vec<TokenScore>) {
        let told = self.scored.max(1);
        let mut tokens: Vec<PromptToken> = if self.scored == 0 { vec![None] } else { Vec::new() };
        let mut next = told;
        for (at, score) in (first_position + 1..).zip(scores) {
            if at == next {
                tokens.push(Some(score));
                next += 1;
            }
        }
        if next > told || self.scored == 0 {
            self.scored = next;
            self.sink.send(Event::Prompt(tokens));
        }
    }

    pub(super) fn started(&mut self, cached_tokens: usize) {
        self.place = None;
        self.sink.send(Event::Started { cached_tokens });
    }

    /// Tells of a token; `end`: it is the choice's last, and whether it is a stop token. False when the grammar does not take
    /// it: the request fails.
    pub(super) fn token(&mut self, index: u32, id: u32, end: Option<End>) -> bool {
        let scores_only = self.submission.max_tokens == 0;
        let Some(choice) = self.choices.get_mut(index as usize) else { return true };
        let position = choice.tokens;
        let score = choice.drawn.remove(&position).filter(|score| score.id == id);
        choice.tokens += 1;
        if choice.done {
            return true;
        }
        let finish = end.map(|end| match end {
            End::Stop if self.end_ids.contains(&id) => Finish::EndOfSequence,
            End::Stop => Finish::StopToken(id),
            End::Length => Finish::Length,
        });
        choice.done = finish.is_some();
        if let (None, Some(matcher)) = (finish, &mut choice.matcher)
            && let Err(message) = matcher.accept(id)
        {
            self.explain(Failure::Grammar(message));
            return false;
        }
        if self.submission.prompt_logprobs.is_some() && self.scored == 0 {
            // A prompt of one token.
            self.scored = 1;
            self.sink.send(Event::Prompt(vec![None]));
        }
        if scores_only {
            (0..self.submission.n).for_each(|choice| {
                self.sink.send(Event::Finished { choice, finish: Finish::Length });
            });
            return true;
        }
        choice.seen.add(id, true);
        let longest = self.submission.sampling.bad_words.iter().map(Vec::len).max().unwrap_or(0);
        if longest > 1 {
            choice.tail.push(id);
            let surplus = choice.tail.len().saturating_sub(longest - 1);
            choice.tail.drain(..surplus);
        }
        let token = score.unwrap_or(TokenScore { id, logprob: f32::NEG_INFINITY, top: Vec::new() });
        self.sink.send(Event::Token { choice: index, token, finish });
        true
    }

    /// The end, when it is not that of all choices.
    pub(super) fn fail(mut self, failure: Failure) {
        self.explain(failure);
        self.fail_if_explained();
    }

    /// The end, which is a failure if something is known to have gone wrong.
    pub(super) fn fail_if_explained(self) {
        if let Some(failure) = self.failure {
            self.sink.send(Event::Failed(failure));
        }
    }

    /// Why it will end, unless something is known already.
    pub(super) fn explain(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
    }
}

/// How a choice ends with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// It is a stop token.
    Stop,
    /// No more are wanted.
    Length,
}

/// The token that would complete a word behind the tokens of `tail`.
fn last_of(word: &[u32], tail: &[u32]) -> Option<u32> {
    let (last, rest) = word.split_last()?;
    tail.ends_with(rest).then_some(*last)
}

/// The ids of a grammar's mask that the request's own rules allow, without the model's `ends` unless the text `may_end`.
/// None: the text can only end.
fn constrain(words: &[u32], own: Option<&[u32]>, ends: &[u32], may_end: bool) -> Option<Arc<[u32]>> {
    let mut mask = words.to_vec();
    for id in ends {
        if let Some(word) = mask.get_mut(*id as usize / 32) {
            *word &= !(1 << (id % 32));
        }
    }
    if mask.iter().all(|word| *word == 0) {
        return None;
    }
    if may_end {
        mask.copy_from_slice(words);
    }
    if let Some(own) = own {
        mask.iter_mut().zip(own).for_each(|(word, own)| *word &= own);
    }
    Some(mask.into())
}

/// One bit for each id that may be drawn; none when all may.
fn mask(allowed: &[u32], vocab: usize) -> Option<Arc<[u32]>> {
    if allowed.is_empty() {
        return None;
    }
    let mut words = vec![0; vocab.div_ceil(32)];
    for id in allowed {
        if let Some(word) = words.get_mut(*id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }
    Some(words.into())
}

impl Rules {
    pub(super) fn new(model: &ModelInfo, padding: Vec<u32>) -> Self {
        Self { end_tokens: model.end_tokens.clone(), padding: padding.into(), vocab_size: model.vocab_size }
    }
}

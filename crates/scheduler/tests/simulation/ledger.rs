//! The clients' own books: what each request was, what came back, and whether its end is one that it may have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use longhaul_scheduler::{
    CacheScope, Config, FinishReason, NgramConfig, Outcome, Refusal, Request, RequestId, SequenceId, Update,
};

use crate::model::{Oracle, VOCAB};

/// One choice as its client sees it.
pub struct Choice {
    oracle: Oracle,
    pub tokens: Vec<u32>,
    pub finished: Option<FinishReason>,
    /// Ended by the client's own text rules.
    pub by_text: bool,
}

/// What may have happened to a request, beside running to its end.
#[derive(Default)]
pub struct Blame {
    pub cancelled: bool,
    pub poisoned: bool,
    pub failed: bool,
}

pub struct Row {
    pub request: Request,
    pub choices: Vec<Choice>,
    pub blame: Blame,
    arrived: Duration,
    /// Cached tokens that its start was told with.
    started: Option<usize>,
    /// Prompt rows whose logits were computed, in order, since it last began.
    pub scored: usize,
    /// Tokens that the client has not read.
    pub unread: usize,
    pub outcome: Option<Outcome>,
}

pub struct Ledger {
    pub rows: BTreeMap<RequestId, Row>,
    pub live: BTreeSet<RequestId>,
    pub tokens: u64,
    pub max_preemptions: u32,
    pub cached_tokens: u64,
    /// Prompt tokens of requests that were scored to their end.
    pub scored_tokens: u64,
    pub outcomes: BTreeMap<Outcome, u64>,
}

/// Who may share KV: requests of one realm compute the same values for the same tokens.
pub fn realm(request: &Request) -> u64 {
    let salt = request.cache_salt.iter().fold(1, |all, &b| all * 257 + u64::from(b));
    match request.cache {
        CacheScope::Key => 1000 + request.key.0 + salt * 7919,
        CacheScope::Shared => salt * 7919,
        CacheScope::Off => 1_000_000 + request.id.0,
    }
}

impl Ledger {
    pub fn new() -> Self {
        Self {
            rows: BTreeMap::new(),
            live: BTreeSet::new(),
            tokens: 0,
            max_preemptions: 0,
            cached_tokens: 0,
            scored_tokens: 0,
            outcomes: BTreeMap::new(),
        }
    }

    pub fn submit(&mut self, request: Request, now: Duration) {
        let oracle = Oracle::new(realm(&request), &request.prompt);
        let choice = || Choice { oracle: oracle.clone(), tokens: Vec::new(), finished: None, by_text: false };
        let row = Row {
            choices: (0..request.choices).map(|_| choice()).collect(),
            arrived: now,
            started: None,
            scored: 0,
            blame: Blame::default(),
            unread: 0,
            outcome: None,
            request,
        };
        self.live.insert(row.request.id);
        self.rows.insert(row.request.id, row);
    }

    /// How many of the tokens drafted behind all that was told of a sequence it will say.
    pub fn right_drafts(&self, id: SequenceId, drafts: &[u32]) -> usize {
        let choice = self.rows.get(&id.request).and_then(|row| row.choices.get(id.choice as usize));
        let Some(mut oracle) = choice.map(|choice| choice.oracle.clone()) else { return 0 };
        let right = drafts.iter().take_while(|&&token| {
            let right = oracle.next() == token;
            oracle.push(token);
            right
        });
        right.count()
    }

    /// A sequence's whole draft, by a scan of all that was told of it.
    pub fn draft(&self, id: SequenceId, config: NgramConfig) -> Vec<u32> {
        let Some(row) = self.rows.get(&id.request) else { return Vec::new() };
        let Some(choice) = row.choices.get(id.choice as usize) else { return Vec::new() };
        let tokens = [&row.request.prompt[..], choice.tokens.as_slice()].concat();
        let lookup = |size: usize| {
            let first = tokens.len().checked_sub(size).filter(|&first| first > 0)?;
            let at = (0..first).rev().find(|&at| tokens[at..at + size] == tokens[first..])?;
            Some(tokens[at + size..].iter().copied().cycle().take(config.num_speculative_tokens).collect())
        };
        let mut sizes = config.prompt_lookup_min..=config.prompt_lookup_max;
        std::iter::from_fn(|| sizes.next_back()).find_map(lookup).unwrap_or_default()
    }

    /// The token at `position` of a sequence, if it was told.
    pub fn token(&self, id: SequenceId, position: usize) -> Option<u32> {
        let row = self.rows.get(&id.request)?;
        match position.checked_sub(row.request.prompt.len()) {
            None => row.request.prompt.get(position).copied(),
            Some(at) => row.choices.get(id.choice as usize)?.tokens.get(at).copied(),
        }
    }

    pub fn take(
        &mut self,
        update: &Update,
        config: &Config,
        now: Duration,
        stopped: bool,
    ) -> Result<(), String> {
        match *update {
            Update::Started { id, cached_tokens } => {
                let row = self.rows.get_mut(&id).filter(|row| row.outcome.is_none());
                let row = row.ok_or_else(|| format!("{id:?} starts after its end"))?;
                match row.started.replace(cached_tokens) {
                    Some(_) => Err(format!("{id:?} starts twice")),
                    None => Ok(()),
                }
            }
            Update::Token { sequence, token } => {
                if self.rows.get(&sequence.request).is_some_and(|row| row.started.is_none()) {
                    return Err(format!("{sequence:?} draws before its start"));
                }
                let row = self.rows.get(&sequence.request).filter(|row| row.request.scored);
                if let Some(row) = row.filter(|r| sequence.choice == 0 && r.choices[0].tokens.is_empty()) {
                    if row.scored != row.request.prompt.len() {
                        return Err(format!("{sequence:?} draws after {} scored rows", row.scored));
                    }
                    self.scored_tokens += row.scored as u64;
                }
                let (row, choice) = self.open(sequence)?;
                let expected = choice.oracle.next();
                if token != expected {
                    return Err(format!(
                        "{sequence:?} says {token}, not {expected}, at {}",
                        choice.tokens.len()
                    ));
                }
                choice.oracle.push(token);
                choice.tokens.push(token);
                if choice.tokens.len() > row.max_tokens {
                    return Err(format!("{sequence:?} goes on after max_tokens"));
                }
                self.tokens += 1;
                if let Some(row) = self.rows.get_mut(&sequence.request) {
                    row.unread += 1;
                }
                Ok(())
            }
            Update::ChoiceFinished { sequence, reason, stop_token } => {
                let (request, choice) = self.open(sequence)?;
                let justified = match (reason, stop_token) {
                    (_, Some(token)) => token == choice.oracle.next() && request.stop_tokens.contains(&token),
                    (FinishReason::Length, None) => choice.tokens.len() == request.max_tokens,
                    (_, None) => choice.by_text,
                };
                choice.finished = Some(reason);
                justified.then_some(()).ok_or_else(|| format!("{sequence:?}: {reason:?} is not due"))
            }
            Update::Finished { id, outcome, ref refusal, usage } => {
                let row = self.rows.get_mut(&id).ok_or_else(|| format!("{id:?} was never sent"))?;
                if let Some(first) = row.outcome.replace(outcome) {
                    return Err(format!("{id:?} ends as {outcome} after {first}"));
                }
                self.live.remove(&id);
                *self.outcomes.entry(outcome).or_default() += 1;
                let told: usize = row.choices.iter().map(|c| c.tokens.len()).sum();
                if (usage.output_tokens, usage.prompt_tokens) != (told, row.request.prompt.len()) {
                    return Err(format!("{id:?} was told {told} tokens, its usage is {usage:?}"));
                }
                if usage.cached_tokens != row.started.unwrap_or(0) {
                    return Err(format!(
                        "{id:?} was told {:?} cached tokens, its usage is {usage:?}",
                        row.started
                    ));
                }
                if usage.preemptions as usize > 8 * row.request.choices {
                    return Err(format!("{id:?} was preempted {} times", usage.preemptions));
                }
                self.max_preemptions = self.max_preemptions.max(usage.preemptions);
                if row.request.scored && usage.cached_tokens > 0 {
                    return Err(format!("{id:?} is to be scored and skips {} rows", usage.cached_tokens));
                }
                self.cached_tokens += usage.cached_tokens as u64;
                match justified(row, outcome, refusal.as_ref(), config, now, stopped) {
                    true => Ok(()),
                    false => Err(format!("{id:?} ends as {outcome} ({refusal:?}), which is not due")),
                }
            }
        }
    }

    fn open(&mut self, id: SequenceId) -> Result<(&Request, &mut Choice), String> {
        let row = self.rows.get_mut(&id.request).filter(|r| r.outcome.is_none());
        let row = row.ok_or_else(|| format!("news of {id:?}, which has ended"))?;
        let choice = row.choices.get_mut(id.choice as usize).filter(|c| c.finished.is_none());
        Ok((&row.request, choice.ok_or_else(|| format!("news of {id:?}, which is complete"))?))
    }
}

fn justified(
    row: &Row,
    outcome: Outcome,
    refusal: Option<&Refusal>,
    config: &Config,
    now: Duration,
    stopped: bool,
) -> bool {
    let r = &row.request;
    let tokens = r.prompt.len() + r.max_tokens;
    let can_run = !r.prompt.is_empty()
        && r.max_tokens > 0
        && tokens <= config.max_model_len
        && tokens <= config.blocks * config.block_size;
    if let Some(refusal) = refusal {
        let untouched = row.choices.iter().all(|c| c.tokens.is_empty() && c.finished.is_none());
        let due = match refusal {
            Refusal::Draining => stopped,
            Refusal::Late => r.deadline.is_some_and(|at| at <= now),
            Refusal::KeyQueueFull { .. } | Refusal::QueueFull { .. } => can_run,
            Refusal::EngineLost | Refusal::DuplicateId(_) => false,
            Refusal::Parameter { .. } | Refusal::TooLong { .. } | Refusal::NeverFits { .. } => !can_run,
        };
        return due && untouched && refusal.outcome() == outcome;
    }
    let after = |limit: Option<Duration>| limit.is_some_and(|limit| row.arrived.saturating_add(limit) <= now);
    can_run
        && match outcome {
            Outcome::Complete(reason) => {
                let cut = row.choices.iter().filter_map(|c| c.finished).find(|&f| f != FinishReason::Stop);
                row.choices.iter().all(|c| c.finished.is_some())
                    && reason == cut.unwrap_or(FinishReason::Stop)
            }
            Outcome::ClientGone => row.blame.cancelled,
            Outcome::Deadline => r.deadline.is_some_and(|at| at <= now) || after(config.max_request_time),
            Outcome::ShedEngine => after(config.queue_timeout),
            Outcome::NumericError => row.blame.poisoned,
            Outcome::EngineError => row.blame.failed,
            Outcome::Drained => stopped,
            Outcome::ShedKey | Outcome::Invalid => false,
        }
}

/// Two ids that end a choice, so that most choices end by themselves.
pub fn stop_tokens(key: u64) -> Vec<u32> {
    vec![(key % u64::from(VOCAB)) as u32, 60]
}

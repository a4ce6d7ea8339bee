//! A request as token ids alone: what a server needs, which does the text itself.

use longhaul_backend::SamplingRow;

use crate::Result;
use crate::api::SamplingParams;
use crate::engine::{Engine, Seen, Sequence, row};

/// Rows whose logits are held at once when prompt tokens are scored.
const SCORED_ROWS: usize = 32;

/// A prompt to continue.
#[derive(Debug, Clone)]
pub struct TokenRequest<'a> {
    /// Token ids, at least one.
    pub prompt: &'a [u32],
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Most tokens to generate; 0 = nothing but the prompt's scores.
    pub max_tokens: usize,
    /// No end before this many tokens.
    pub min_tokens: usize,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Further ids that end the output.
    pub stop_token_ids: &'a [u32],
    /// Added to the logits of distinct ids; finite.
    pub bias: &'a [(u32, f32)],
    /// The only ids that may be drawn; empty = all.
    pub allowed: &'a [u32],
    /// Alternatives to report with each token. Above 0, a token costs two steps.
    pub top_logprobs: usize,
    /// Alternatives to report with each prompt token; none = no scores of the prompt.
    pub prompt_logprobs: Option<usize>,
}

/// The log probability of a token under the raw logits, and of the most likely ones at its place.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScore {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely ids with theirs, best first; the lower id first among equals.
    pub top: Vec<(u32, f32)>,
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenEnd {
    /// An end-of-sequence token, which is the last token.
    EndOfSequence,
    /// One of [`TokenRequest::stop_token_ids`], which is the last token.
    StopToken(u32),
    /// `max_tokens`.
    Length,
    /// The observer did not want to go on.
    Cancelled,
}

/// Follows a request while it runs.
pub trait TokenObserver {
    /// Asked before every step: whether to go on.
    fn go_on(&mut self) -> bool;

    /// Scores of the next prompt tokens; the very first token has none.
    fn prompt(&mut self, scores: Vec<Option<TokenScore>>);

    /// A token; `end` is set on the last one. The end-of-sequence token counts as a token here.
    fn token(&mut self, token: TokenScore, end: Option<TokenEnd>);
}

impl Engine {
    /// Runs a request; the end that was reported with the last token, or [`TokenEnd::Cancelled`].
    ///
    /// # Errors
    /// As [`crate::Generate::generate`].
    pub fn tokens(
        &mut self,
        request: &TokenRequest<'_>,
        observer: &mut dyn TokenObserver,
    ) -> Result<TokenEnd> {
        request.sampling.check()?;
        self.check_prompt(request.prompt, request.max_tokens)?;
        let tokens = request.prompt.len() + request.max_tokens;
        self.with_sequence(tokens, |engine, sequence| engine.run_tokens(request, sequence, observer))
    }

    fn run_tokens(
        &mut self,
        request: &TokenRequest<'_>,
        sequence: &mut Sequence,
        observer: &mut dyn TokenObserver,
    ) -> Result<TokenEnd> {
        if !self.prefill_tokens(request, sequence, observer)? {
            return Ok(TokenEnd::Cancelled);
        }
        if request.max_tokens == 0 {
            return Ok(TokenEnd::Length);
        }
        let end_tokens = if request.ignore_eos { Vec::new() } else { self.end_tokens() };
        let padding = self.padding_ids();
        // Before min_tokens, what would end the output must not be drawn.
        let early: Vec<u32> = [padding.as_slice(), &end_tokens, request.stop_token_ids]
            .iter()
            .copied()
            .flatten()
            .copied()
            .collect();
        let mask = mask(request.allowed, self.spec.vocab_size);
        let sampling = request.sampling;
        let mut seen = Seen::new(&sampling, request.prompt);
        let mut last = request.prompt.last().copied().unwrap_or_default();
        for position in 0..request.max_tokens {
            if !observer.go_on() {
                return Ok(TokenEnd::Cancelled);
            }
            let banned = if position < request.min_tokens { &early } else { &padding };
            let row = SamplingRow {
                bias: request.bias,
                allowed: mask.as_deref(),
                ..row(&sampling, position as u64, &seen.tokens, banned)
            };
            let top = self.alternatives(sequence, last, request.top_logprobs)?;
            let step = self.step(sequence, &[last], vec![0]);
            let Some(sampled) = self.runner.sample(step, std::slice::from_ref(&row))?.pop() else {
                return Ok(TokenEnd::Length);
            };
            last = sampled.id;
            let end = if end_tokens.contains(&last) {
                Some(TokenEnd::EndOfSequence)
            } else if request.stop_token_ids.contains(&last) {
                Some(TokenEnd::StopToken(last))
            } else {
                (position + 1 == request.max_tokens).then_some(TokenEnd::Length)
            };
            observer.token(TokenScore { id: last, logprob: sampled.logprob, top }, end);
            if let Some(end) = end {
                return Ok(end);
            }
            seen.add(last, true);
        }
        Ok(TokenEnd::Length)
    }

    /// Caches the prompt but for its last token, whose step draws the first one; scores it all if that was asked for. False
    /// when the observer did not want to go on.
    fn prefill_tokens(
        &mut self,
        request: &TokenRequest<'_>,
        sequence: &mut Sequence,
        observer: &mut dyn TokenObserver,
    ) -> Result<bool> {
        let Some((_, head)) = request.prompt.split_last() else { return Ok(true) };
        let scored = request.prompt_logprobs;
        if scored.is_some() {
            observer.prompt(vec![None]);
        }
        let rows = self.runner.default_chunk().min(self.runner.max_rows());
        let rows =
            if scored.is_some() { rows.min(SCORED_ROWS).min(self.runner.max_logit_rows()) } else { rows };
        for ids in head.chunks(rows) {
            if !observer.go_on() {
                return Ok(false);
            }
            let next = request.prompt.get(sequence.length + 1..).unwrap_or_default();
            match scored {
                None => {
                    let step = self.step(sequence, ids, Vec::new());
                    self.runner.sample(step, &[])?;
                }
                Some(top) => {
                    let step = self.step(sequence, ids, (0..ids.len()).collect());
                    let logits = self.runner.logits(step)?;
                    let rows = logits.chunks_exact(self.spec.vocab_size);
                    observer.prompt(rows.zip(next).map(|(row, id)| Some(score(row, *id, top))).collect());
                }
            }
        }
        Ok(true)
    }

    /// The most likely tokens behind `last`, which is not in the cache afterwards: the step that draws computes it again, to
    /// the same bits.
    fn alternatives(&mut self, sequence: &mut Sequence, last: u32, top: usize) -> Result<Vec<(u32, f32)>> {
        if top == 0 {
            return Ok(Vec::new());
        }
        let step = self.step(sequence, &[last], vec![0]);
        let logits = self.runner.logits(step)?;
        sequence.length -= 1;
        Ok(score(&logits, last, top).top)
    }
}

/// One bit for each id that may be drawn; none when all may.
fn mask(allowed: &[u32], vocab: usize) -> Option<Vec<u32>> {
    if allowed.is_empty() {
        return None;
    }
    let mut words = vec![0; vocab.div_ceil(32)];
    for id in allowed {
        if let Some(word) = words.get_mut(*id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }
    Some(words)
}

/// The log probability of `id` and of the `top` most likely ids under `logits`.
fn score(logits: &[f32], id: u32, top: usize) -> TokenScore {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let logprob = |logit: f32| (f64::from(logit - max) - sum.ln()) as f32;
    let at = |id: u32| logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let order = |a: &u32, b: &u32| at(*b).total_cmp(&at(*a)).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if top < ids.len() {
        ids.select_nth_unstable_by(top, order);
        ids.truncate(top);
    }
    ids.sort_unstable_by(order);
    TokenScore {
        id,
        logprob: logprob(at(id)),
        top: ids.into_iter().map(|id| (id, logprob(at(id)))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Generate, Loader, ModelRef, Request};

    #[derive(Default)]
    struct Record {
        tokens: Vec<TokenScore>,
        prompt: Vec<Option<TokenScore>>,
        end: Option<TokenEnd>,
        most: Option<usize>,
    }

    impl TokenObserver for Record {
        fn go_on(&mut self) -> bool {
            self.most.is_none_or(|most| self.tokens.len() < most)
        }

        fn prompt(&mut self, scores: Vec<Option<TokenScore>>) {
            self.prompt.extend(scores);
        }

        fn token(&mut self, token: TokenScore, end: Option<TokenEnd>) {
            self.tokens.push(token);
            self.end = end;
        }
    }

    fn request(prompt: &[u32]) -> TokenRequest<'_> {
        TokenRequest {
            prompt,
            sampling: SamplingParams::greedy(),
            max_tokens: 12,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: &[],
            bias: &[],
            allowed: &[],
            top_logprobs: 0,
            prompt_logprobs: None,
        }
    }

    fn demo() -> Engine {
        Loader::new(ModelRef::Demo).load(&mut |_, _| {}).unwrap()
    }

    fn ids(record: &Record) -> Vec<u32> {
        record.tokens.iter().map(|t| t.id).collect()
    }

    #[test]
    fn tokens_are_those_of_generate() {
        let mut engine = demo();
        let prompt = engine
            .tokenizer()
            .unwrap()
            .encode("The river runs past", longhaul_text::SpecialTokens::AsText)
            .unwrap();
        for (temperature, penalty) in [(0.0, 1.0), (0.9, 1.3)] {
            let sampling = SamplingParams {
                temperature,
                repetition_penalty: penalty,
                seed: 5,
                ..SamplingParams::greedy()
            };
            let whole = engine
                .generate(&Request { sampling, ..Request::greedy(prompt.clone(), 12) }, &mut ())
                .unwrap();
            for top_logprobs in [0, 3] {
                let mut record = Record::default();
                let end = engine
                    .tokens(&TokenRequest { sampling, top_logprobs, ..request(&prompt) }, &mut record)
                    .unwrap();
                assert_eq!(record.end, Some(end));
                let mut drawn = ids(&record);
                if end == TokenEnd::EndOfSequence {
                    drawn.pop();
                }
                assert_eq!(drawn, whole.ids);
                for token in &record.tokens {
                    assert_eq!(token.top.len(), top_logprobs);
                    if let Some((_, score)) = token.top.iter().find(|(id, _)| *id == token.id) {
                        assert!((score - token.logprob).abs() < 1e-4, "{token:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn rules_are_obeyed() {
        let mut engine = demo();
        let prompt = [5, 9, 40, 7];
        let run = |engine: &mut Engine, request: TokenRequest<'_>| {
            let mut record = Record::default();
            let end = engine.tokens(&request, &mut record).unwrap();
            (ids(&record), end)
        };
        let (free, _) = run(&mut engine, TokenRequest { ignore_eos: true, ..request(&prompt) });
        assert_eq!(free.len(), 12);
        let (stopped, end) = run(
            &mut engine,
            TokenRequest { ignore_eos: true, stop_token_ids: &free[3..4], ..request(&prompt) },
        );
        let first = free.iter().position(|id| *id == free[3]).unwrap();
        assert_eq!((stopped.as_slice(), end), (&free[..=first], TokenEnd::StopToken(free[3])));
        let (later, _) = run(
            &mut engine,
            TokenRequest { ignore_eos: true, stop_token_ids: &free[3..4], min_tokens: 8, ..request(&prompt) },
        );
        assert!(later.len() >= 9 || later.len() == 12, "{later:?}");
        assert!(!later[..8].contains(&free[3]));
        let (only, _) =
            run(&mut engine, TokenRequest { ignore_eos: true, allowed: &[17, 33], ..request(&prompt) });
        assert!(only.iter().all(|id| [17, 33].contains(id)), "{only:?}");
        let (biased, _) =
            run(&mut engine, TokenRequest { ignore_eos: true, bias: &[(21, 1000.0)], ..request(&prompt) });
        assert_eq!(biased, [21; 12]);
        let mut record = Record { most: Some(2), ..Record::default() };
        let end = engine.tokens(&TokenRequest { ignore_eos: true, ..request(&prompt) }, &mut record).unwrap();
        assert_eq!((end, record.tokens.len()), (TokenEnd::Cancelled, 2));
        // Blocks came back in every case.
        assert_eq!(run(&mut engine, TokenRequest { ignore_eos: true, ..request(&prompt) }).0, free);
    }

    #[test]
    fn prompt_scores_are_the_logits_whatever_the_chunks() {
        let mut engine = demo();
        let prompt: Vec<u32> = (0..75).map(|i| (i * 37) % 500).collect();
        let vocab = engine.spec().vocab_size;
        let mut rows: Vec<Vec<f32>> = Vec::new();
        engine
            .logits(&prompt, None, &mut |logits| {
                rows.extend(logits.chunks_exact(vocab).map(<[f32]>::to_vec));
                Ok(())
            })
            .unwrap();
        let mut record = Record::default();
        let scored = TokenRequest { max_tokens: 0, prompt_logprobs: Some(2), ..request(&prompt) };
        assert_eq!(engine.tokens(&scored, &mut record).unwrap(), TokenEnd::Length);
        assert_eq!(record.prompt.len(), prompt.len());
        assert_eq!(record.prompt[0], None);
        for (at, token) in record.prompt.iter().enumerate().skip(1) {
            let token = token.as_ref().unwrap();
            let row: Vec<f64> = rows[at - 1].iter().map(|l| f64::from(*l)).collect();
            let z = row.iter().map(|l| l.exp()).sum::<f64>().ln();
            assert_eq!(token.id, prompt[at]);
            assert!((f64::from(token.logprob) - (row[prompt[at] as usize] - z)).abs() < 1e-4);
            let best = row.iter().copied().fold(f64::MIN, f64::max);
            assert!((f64::from(token.top[0].1) - (best - z)).abs() < 1e-4);
            assert!(token.top[0].1 >= token.top[1].1);
        }
    }
}

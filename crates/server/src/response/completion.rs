use serde_json::{Map, Value, json};

use crate::choice::{Ended, Piece};
use crate::logprobs::{CompletionLogprobs, TokenWriter};
use crate::pipeline::{Generation, Usage};
use crate::prompt::Encoded;
use crate::response::{Head, Writer};
use crate::serving::{PromptToken, TokenScore};

/// Answers of `/v1/completions`.
pub(crate) struct CompletionWriter {
    head: Head,
    tokens: TokenWriter,
    prompts: Vec<Encoded>,
    n: usize,
    options: CompletionOptions,
    /// Scores of the prompts, as they came.
    prompt_scores: Vec<Vec<PromptToken>>,
    kept: Vec<Kept>,
}

/// What a completion shows besides its text.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct CompletionOptions {
    pub(crate) echo: bool,
    pub(crate) logprobs: bool,
    pub(crate) prompt_logprobs: bool,
    pub(crate) token_ids: bool,
}

#[derive(Default)]
struct Kept {
    text: String,
    logprobs: CompletionLogprobs,
    ids: Vec<u32>,
    ended: Option<Ended>,
    begun: bool,
}

impl CompletionWriter {
    pub(crate) fn new(
        head: Head,
        tokens: TokenWriter,
        prompts: Vec<Encoded>,
        n: usize,
        options: CompletionOptions,
    ) -> Self {
        let choices = prompts.len() * n;
        let prompt_scores = prompts.iter().map(|_| Vec::new()).collect();
        let kept = (0..choices).map(|_| Kept::default()).collect();
        Self { head, tokens, prompts, n, options, prompt_scores, kept }
    }

    /// The prompt before the first piece of a choice, if it is to be shown; nothing before the others.
    fn begin(&mut self, index: usize) -> String {
        let part = index / self.n.max(1);
        let (Some(kept), Some(prompt)) = (self.kept.get_mut(index), self.prompts.get(part)) else {
            return String::new();
        };
        if std::mem::replace(&mut kept.begun, true) || !self.options.echo {
            return String::new();
        }
        if self.options.logprobs {
            let scores = self.prompt_scores.get(part).map(Vec::as_slice).unwrap_or_default();
            for (at, id) in prompt.ids.iter().enumerate() {
                kept.logprobs.push(&self.tokens, *id, scores.get(at).and_then(Option::as_ref));
            }
        }
        prompt.text.clone()
    }

    fn score(&mut self, index: usize, token: Option<&TokenScore>) {
        if let (true, Some(token), Some(kept)) = (self.options.logprobs, token, self.kept.get_mut(index)) {
            kept.logprobs.push(&self.tokens, token.id, Some(token));
        }
    }

    fn scores(&mut self, index: usize) -> Value {
        match self.kept.get_mut(index) {
            Some(kept) if self.options.logprobs => kept.logprobs.take(),
            _ => Value::Null,
        }
    }
}

impl Writer for CompletionWriter {
    fn prompt(&mut self, part: usize, tokens: Vec<PromptToken>) {
        if let Some(scores) = self.prompt_scores.get_mut(part) {
            scores.extend(tokens);
        }
    }

    fn opening(&mut self, _choices: usize) -> Vec<Value> {
        Vec::new()
    }

    fn chunk(
        &mut self,
        index: usize,
        piece: Piece,
        token: Option<TokenScore>,
        usage: Option<Usage>,
    ) -> Value {
        let first = self.kept.get(index).is_some_and(|kept| !kept.begun);
        let echo = self.begin(index);
        self.score(index, token.as_ref());
        let mut choice = Map::from_iter([
            ("index".into(), json!(index)),
            ("text".into(), json!(format!("{echo}{}", piece.text))),
            ("logprobs".into(), self.scores(index)),
            ("finish_reason".into(), json!(piece.ended.as_ref().map(|ended| ended.finish_reason))),
            ("stop_reason".into(), piece.ended.map_or(Value::Null, |ended| ended.stop_reason)),
        ]);
        if self.options.token_ids {
            if first && let Some(prompt) = self.prompts.get(index / self.n.max(1)) {
                choice.insert("prompt_token_ids".into(), json!(prompt.ids.as_ref()));
            }
            let ids: Vec<u32> = token.iter().map(|score| score.id).collect();
            choice.insert("token_ids".into(), json!(ids));
        }
        self.head.chunk("text_completion", vec![Value::Object(choice)], usage)
    }

    fn usage(&self, usage: Usage) -> Value {
        self.head.chunk("text_completion", Vec::new(), Some(usage))
    }

    fn keep(&mut self, index: usize, piece: Piece, token: Option<TokenScore>) {
        let echo = self.begin(index);
        self.score(index, token.as_ref());
        if let Some(kept) = self.kept.get_mut(index) {
            kept.text.push_str(&echo);
            kept.text.push_str(&piece.text);
            kept.ids.extend(token.map(|token| token.id));
            kept.ended = piece.ended.or(kept.ended.take());
        }
    }

    fn body(&mut self, generation: &Generation) -> Value {
        let mut choices = Vec::with_capacity(self.kept.len());
        for index in 0..generation.choices() {
            let logprobs = self.scores(index);
            let Some(kept) = self.kept.get_mut(index) else { continue };
            let kept = std::mem::take(kept);
            let part = index / self.n.max(1);
            let ended = kept.ended.unwrap_or(Ended { finish_reason: "stop", stop_reason: Value::Null });
            let prompt_logprobs = self.options.prompt_logprobs.then(|| {
                let scores = self.prompt_scores.get(part).map(Vec::as_slice).unwrap_or_default();
                scores.iter().map(|token| self.tokens.prompt(token)).collect::<Vec<_>>()
            });
            let prompt_ids =
                self.prompts.get(part).filter(|_| self.options.token_ids).map(|p| p.ids.as_ref());
            choices.push(json!({
                "index": index,
                "text": kept.text,
                "logprobs": logprobs,
                "finish_reason": ended.finish_reason,
                "stop_reason": ended.stop_reason,
                "token_ids": self.options.token_ids.then_some(kept.ids),
                "prompt_logprobs": prompt_logprobs,
                "prompt_token_ids": prompt_ids,
            }));
        }
        let mut body = self.head.body("text_completion", choices);
        body.extend([
            ("service_tier".into(), Value::Null),
            ("system_fingerprint".into(), Value::Null),
            ("usage".into(), self.head.usage(generation.usage())),
            ("kv_transfer_params".into(), Value::Null),
        ]);
        Value::Object(body)
    }
}

//! A model for tests: it answers by searching its prompt, all of it or only the last tokens.

use longhaul_engine::{
    Completion, EngineError, FinishReason, Generate, LongContext, Observer, Request, SamplingParams, Timings,
};
use longhaul_text::{Message, SpecialTokens, Tokenizer};
use std::cell::RefCell;
use std::rc::Rc;

type Result<T> = std::result::Result<T, EngineError>;

pub(crate) fn tokenizer() -> Tokenizer {
    thread_local! {
        static SHARED: Tokenizer =
            Tokenizer::from_bytes(include_bytes!("../../../assets/demo/tokenizer.json"), "demo").unwrap();
    }
    SHARED.with(Clone::clone)
}

pub(crate) fn encode(text: &str) -> Vec<u32> {
    tokenizer().encode(text, SpecialTokens::AsText).unwrap()
}

/// Finds "The secret code of CITY is DDDDD" for the city of the last question.
pub(crate) struct SearchModel {
    pub(crate) mode: LongContext,
    /// Tokens at the end of the prompt that it sees; `None` = all.
    pub(crate) sees: Option<usize>,
    pub(crate) max_model_len: usize,
    /// Prompts it was given, as text.
    pub(crate) prompts: Rc<RefCell<Vec<String>>>,
    /// Requests after which it fails.
    pub(crate) fails_after: Option<usize>,
    tokenizer: Tokenizer,
}

impl SearchModel {
    pub(crate) fn new(mode: LongContext) -> Self {
        Self {
            mode,
            sees: None,
            max_model_len: 100_000,
            prompts: Rc::default(),
            fails_after: None,
            tokenizer: tokenizer(),
        }
    }
}

impl Generate for SearchModel {
    fn name(&self) -> &str {
        "search"
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        Ok(&self.tokenizer)
    }

    fn chat_ids(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let mut text = String::new();
        for message in messages {
            text += &format!("[{}]\n{}\n", message.role, message.content);
        }
        Ok(self.tokenizer.encode(&(text + "[assistant]\n"), SpecialTokens::AsText)?)
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    fn trained_window(&self) -> usize {
        768
    }

    fn long_context(&self) -> LongContext {
        self.mode
    }

    fn sampling_defaults(&self) -> SamplingParams {
        SamplingParams::greedy()
    }

    fn generate(&mut self, request: &Request, observer: &mut dyn Observer) -> Result<Completion> {
        let asked = self.prompts.borrow().len();
        if self.fails_after.is_some_and(|n| asked >= n) {
            return Err(EngineError::UnknownModel("interrupted".into()));
        }
        let all = self.tokenizer.decode(&request.prompt, false);
        let from = self.sees.map_or(0, |n| request.prompt.len().saturating_sub(n));
        let seen = self.tokenizer.decode(&request.prompt[from..], false);
        self.prompts.borrow_mut().push(all.clone());
        let code = || {
            let city = all.rsplit_once("What is the secret code of ")?.1.split_once('?')?.0;
            let fact = format!("The secret code of {city} is ");
            let after = seen.split_once(&fact)?.1;
            Some(format!("{fact}{}.", after.get(..5)?))
        };
        let text = code().unwrap_or_else(|| "I do not know.".into());
        observer.prefill(request.prompt.len(), request.prompt.len());
        observer.text(&text);
        Ok(Completion {
            ids: self.tokenizer.encode(&text, SpecialTokens::AsText)?,
            text,
            finish_reason: FinishReason::Stop,
            timings: Timings {
                prompt_tokens: request.prompt.len(),
                prefill_seconds: request.prompt.len() as f64 / 1000.0,
                completion_tokens: 8,
                decode_seconds: 0.1,
            },
        })
    }
}

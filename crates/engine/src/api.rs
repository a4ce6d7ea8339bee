use longhaul_model::LongContext;
use longhaul_text::{Message, Tokenizer};
use serde::Serialize;

use crate::{EngineError, Result};

/// How tokens are drawn; see [`longhaul_backend::SamplingRow`] for the order of the steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SamplingParams {
    /// 0 = greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 = all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 = all.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely one; 0 = none.
    pub min_p: f32,
    /// Penalty on every token of prompt and output; 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every generated token; 0 = off.
    pub presence_penalty: f32,
    /// Subtracted per time a token was generated; 0 = off.
    pub frequency_penalty: f32,
    /// Seed: the same seed, prompt and parameters give the same tokens.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self::greedy()
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// [`EngineError::Parameter`] naming the parameter.
    pub fn check(&self) -> Result<()> {
        let checks: [(&'static str, f32, bool, &'static str); 6] = [
            ("temperature", self.temperature, self.temperature >= 0.0, "at least 0"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "above 0"),
            (
                "presence_penalty",
                self.presence_penalty,
                (-2.0..=2.0).contains(&self.presence_penalty),
                "between -2 and 2",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                (-2.0..=2.0).contains(&self.frequency_penalty),
                "between -2 and 2",
            ),
        ];
        for (name, value, fits, expected) in checks {
            if !fits || !value.is_finite() {
                return Err(EngineError::Parameter { name, message: format!("{value} must be {expected}") });
            }
        }
        Ok(())
    }
}

/// One prompt to complete.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the output; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Tokens of a prefill chunk; `None` = the engine's default.
    pub chunk: Option<usize>,
}

impl Request {
    /// A greedy request without stop strings.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            sampling: SamplingParams::greedy(),
            max_tokens,
            stop: Vec::new(),
            ignore_eos: false,
            chunk: None,
        }
    }
}

/// Follows a request while it runs.
pub trait Observer {
    /// `done` of `total` prompt tokens are in the cache.
    fn prefill(&mut self, done: usize, total: usize) {
        let _ = (done, total);
    }

    /// Output that has become certain (stop strings and half characters are held back).
    fn text(&mut self, piece: &str) {
        let _ = piece;
    }
}

impl Observer for () {}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// Wall-clock times of a request.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// From the start to the first generated token.
    pub prefill_seconds: f64,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// From the first generated token to the last.
    pub decode_seconds: f64,
}

impl Timings {
    /// Prompt tokens per second.
    pub fn prefill_tokens_per_second(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill_seconds.max(1e-9)
    }

    /// Generated tokens per second after the first one; 0 when there was only one.
    pub fn decode_tokens_per_second(&self) -> f64 {
        self.completion_tokens.saturating_sub(1) as f64 / self.decode_seconds.max(1e-9)
    }
}

/// What a request gave.
#[derive(Debug, Clone, Serialize)]
pub struct Completion {
    /// Generated token ids, without the end-of-sequence token that ended them.
    pub ids: Vec<u32>,
    /// Their text, special tokens left out, cut at a stop string.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timings: Timings,
}

/// A loaded model that answers one request at a time.
pub trait Generate {
    /// Name for titles and reports.
    fn name(&self) -> &str;

    /// The checkpoint's tokenizer.
    ///
    /// # Errors
    /// [`EngineError::NoTokenizer`] when the model came without one (dummy weights).
    fn tokenizer(&self) -> Result<&Tokenizer>;

    /// Renders the checkpoint's chat template over `messages`, ending with the assistant's turn, and encodes it. Special
    /// tokens in the messages stay text.
    ///
    /// # Errors
    /// No tokenizer or template, or a template that fails.
    fn chat_ids(&self, messages: &[Message]) -> Result<Vec<u32>>;

    /// Tokens of prompt and output that fit.
    fn max_model_len(&self) -> usize;

    /// Tokens of context the weights were trained on.
    fn trained_window(&self) -> usize;

    /// The long-context mode in force.
    fn long_context(&self) -> LongContext;

    /// Sampling parameters from the checkpoint's `generation_config.json`.
    fn sampling_defaults(&self) -> SamplingParams;

    /// Runs `request` to its end.
    ///
    /// # Errors
    /// [`EngineError::Parameter`] and [`EngineError::TooLong`] before anything ran; the device's errors after.
    fn generate(&mut self, request: &Request, observer: &mut dyn Observer) -> Result<Completion>;
}

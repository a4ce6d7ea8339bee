use std::collections::HashMap;
use std::time::Instant;

use longhaul_backend::{SamplingRow, SeenToken, SequenceInputs, StepInputs};
use longhaul_model::{LongContext, ModelSpec, PositionProfile};
use longhaul_text::{ChatTemplate, Detokenizer, GenerationConfig, Message, StopMatcher, Tokenizer};

use crate::api::{Completion, FinishReason, Generate, Observer, Request, SamplingParams, Timings};
use crate::blocks::BlockPool;
use crate::runner::Runner;
use crate::{EngineError, Result};

/// Control tokens of the family that end a turn, whatever the config files say (derived checkpoints get them wrong).
const END_TOKENS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

/// A loaded model that answers one request at a time.
pub struct Engine {
    pub(crate) name: String,
    pub(crate) spec: ModelSpec,
    pub(crate) positions: PositionProfile,
    pub(crate) runner: Box<dyn Runner>,
    pub(crate) blocks: BlockPool,
    pub(crate) block_size: usize,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) generation: GenerationConfig,
    pub(crate) device: String,
    pub(crate) notes: Vec<String>,
}

/// Blocks of one sequence; a step of it is one call.
pub(crate) struct Sequence {
    blocks: Vec<u32>,
    pub(crate) length: usize,
}

/// Tokens of a sequence that its penalties look at; none where it has no penalties.
#[derive(Debug, Clone)]
pub struct Seen {
    tokens: Vec<SeenToken>,
    index: HashMap<u32, usize>,
    penalised: bool,
}

impl Seen {
    /// Those of the prompt.
    pub fn new(sampling: &SamplingParams, prompt: &[u32]) -> Self {
        let penalised = sampling.repetition_penalty != 1.0
            || sampling.presence_penalty != 0.0
            || sampling.frequency_penalty != 0.0;
        let mut seen = Self { tokens: Vec::new(), index: HashMap::new(), penalised };
        prompt.iter().for_each(|&id| seen.add(id, false));
        seen
    }

    /// Distinct tokens and how often each was generated.
    pub fn tokens(&self) -> &[SeenToken] {
        &self.tokens
    }

    /// Whether there is a penalty: the next draw depends on the tokens before it.
    pub fn is_used(&self) -> bool {
        self.penalised
    }

    /// Takes a token of the prompt, or a generated one.
    pub fn add(&mut self, id: u32, generated: bool) {
        if !self.penalised {
            return;
        }
        let at = *self.index.entry(id).or_insert_with(|| {
            self.tokens.push(SeenToken { id, generated: 0 });
            self.tokens.len() - 1
        });
        if let Some(token) = self.tokens.get_mut(at) {
            token.generated += u32::from(generated);
        }
    }
}

impl Engine {
    /// What the config decides.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Positions and context in force.
    pub fn positions(&self) -> &PositionProfile {
        &self.positions
    }

    /// The device in words.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Whether the model reads the host's memory: it runs on the CPU.
    pub fn is_on_host(&self) -> bool {
        self.runner.is_on_host()
    }

    /// What the user should know about how the model was loaded: a smaller context than the checkpoint's, an idle GPU.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Defaults from `generation_config.json`.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation
    }

    /// The checkpoint's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// KV blocks of the pool.
    pub fn kv_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Tokens of a KV block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Token ids that end a completion.
    pub fn end_tokens(&self) -> Vec<u32> {
        let mut ids = self.spec.eos_token_ids.clone();
        ids.extend(&self.generation.eos_token_ids);
        if let Some(tokenizer) = &self.tokenizer {
            ids.extend(END_TOKENS.iter().filter_map(|t| tokenizer.special_id(t)));
        }
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Ids that the tokenizer cannot produce: rows that pad the embedding.
    pub fn padding_ids(&self) -> Vec<u32> {
        match &self.tokenizer {
            Some(tokenizer) => (tokenizer.vocab_size() as u32..self.spec.vocab_size as u32).collect(),
            None => Vec::new(),
        }
    }

    pub(crate) fn check_prompt(&self, prompt: &[u32], max_tokens: usize) -> Result<()> {
        if prompt.is_empty() {
            return Err(EngineError::Parameter { name: "prompt", message: "has no tokens".into() });
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= self.spec.vocab_size) {
            return Err(EngineError::Parameter {
                name: "prompt",
                message: format!("token id {id} is outside the vocabulary of {} ids", self.spec.vocab_size),
            });
        }
        let max_model_len = self.positions.max_model_len;
        if prompt.len().checked_add(max_tokens).is_none_or(|tokens| tokens > max_model_len) {
            return Err(EngineError::TooLong { prompt: prompt.len(), max_tokens, max_model_len });
        }
        Ok(())
    }

    /// The inputs of a step that appends `ids` to `sequence`.
    pub(crate) fn step(&self, sequence: &mut Sequence, ids: &[u32], logit_rows: Vec<usize>) -> StepInputs {
        let first = sequence.length;
        sequence.length += ids.len();
        StepInputs {
            ids: ids.to_vec(),
            logit_scales: (first..sequence.length).map(|p| self.positions.logit_scale(p)).collect(),
            sequences: vec![SequenceInputs {
                rows: ids.len(),
                kv_len: sequence.length,
                block_table: sequence.blocks.clone(),
            }],
            logit_rows,
        }
    }

    /// Runs `f` on a sequence with room for `tokens` tokens; its blocks return to the pool whatever happens.
    pub(crate) fn with_sequence<R>(
        &mut self,
        tokens: usize,
        f: impl FnOnce(&mut Self, &mut Sequence) -> Result<R>,
    ) -> Result<R> {
        let blocks = self.blocks.allocate(tokens.div_ceil(self.block_size))?;
        let mut sequence = Sequence { blocks, length: 0 };
        let result = f(self, &mut sequence);
        self.blocks.release(sequence.blocks);
        result
    }

    /// Logits of every position of `prompt`, handed to `sink` as rows `[n, vocab]` in order, chunk by chunk.
    ///
    /// # Errors
    /// As [`Generate::generate`], and those of `sink`.
    pub fn logits(
        &mut self,
        prompt: &[u32],
        chunk: Option<usize>,
        sink: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        self.check_prompt(prompt, 0)?;
        let chunk = check_chunk(chunk, self.runner.default_chunk())?
            .min(self.runner.max_rows())
            .min(self.runner.max_logit_rows());
        self.with_sequence(prompt.len(), |engine, sequence| {
            for ids in prompt.chunks(chunk) {
                let step = engine.step(sequence, ids, (0..ids.len()).collect());
                let logits = engine.runner.logits(step)?;
                sink(&logits)?;
            }
            Ok(())
        })
    }

    fn run(
        &mut self,
        request: &Request,
        sequence: &mut Sequence,
        observer: &mut dyn Observer,
    ) -> Result<Completion> {
        let end_tokens = if request.ignore_eos { Vec::new() } else { self.end_tokens() };
        let banned = self.padding_ids();
        let sampling = request.sampling;
        let mut seen = Seen::new(&sampling, &request.prompt);
        let mut output = Output::new(self.tokenizer.clone(), &request.stop)?;

        let start = Instant::now();
        let total = request.prompt.len();
        let chunk = check_chunk(request.chunk, self.runner.default_chunk())?.min(self.runner.max_rows());
        let mut next = None;
        for ids in request.prompt.chunks(chunk) {
            let last = sequence.length + ids.len() == total;
            let step = self.step(sequence, ids, if last { vec![ids.len() - 1] } else { Vec::new() });
            let row = row(&sampling, 0, &seen.tokens, &banned);
            next = self.runner.sample(step, if last { std::slice::from_ref(&row) } else { &[] })?.pop();
            observer.prefill(sequence.length, total);
        }
        let prefill_seconds = start.elapsed().as_secs_f64();
        let decode_start = Instant::now();
        let mut finish_reason = FinishReason::Length;
        while let Some(sampled) = next.take() {
            if end_tokens.contains(&sampled.id) {
                finish_reason = FinishReason::Stop;
                break;
            }
            if output.push(sampled.id, observer) {
                finish_reason = FinishReason::Stop;
                break;
            }
            if output.ids.len() == request.max_tokens {
                break;
            }
            seen.add(sampled.id, true);
            let step = self.step(sequence, &[sampled.id], vec![0]);
            let row = row(&sampling, output.ids.len() as u64, &seen.tokens, &banned);
            next = self.runner.sample(step, std::slice::from_ref(&row))?.pop();
        }
        let (ids, text) = output.finish(observer);
        let timings = Timings {
            prompt_tokens: total,
            prefill_seconds,
            completion_tokens: ids.len(),
            decode_seconds: decode_start.elapsed().as_secs_f64(),
        };
        Ok(Completion { ids, text, finish_reason, timings })
    }
}

pub(crate) fn row<'a>(
    sampling: &SamplingParams,
    position: u64,
    seen: &'a [SeenToken],
    banned: &'a [u32],
) -> SamplingRow<'a> {
    SamplingRow {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        seed: sampling.seed,
        position,
        seen,
        bias: &[],
        banned,
        allowed: None,
    }
}

fn check_chunk(chunk: Option<usize>, default: usize) -> Result<usize> {
    match chunk {
        Some(0) => Err(EngineError::Parameter { name: "chunk", message: "must be at least 1".into() }),
        Some(chunk) => Ok(chunk),
        None => Ok(default),
    }
}

/// Generated ids on their way to text: detokenizer, then stop strings.
struct Output {
    ids: Vec<u32>,
    text: String,
    detokenizer: Option<Detokenizer>,
    stops: StopMatcher,
    stopped: bool,
}

impl Output {
    fn new(tokenizer: Option<Tokenizer>, stops: &[String]) -> Result<Self> {
        Ok(Self {
            ids: Vec::new(),
            text: String::new(),
            detokenizer: tokenizer.map(|t| Detokenizer::new(t, true)),
            stops: StopMatcher::new(stops.to_vec())?,
            stopped: false,
        })
    }

    /// Adds a token; true when a stop string ends the output.
    fn push(&mut self, id: u32, observer: &mut dyn Observer) -> bool {
        self.ids.push(id);
        if let Some(detokenizer) = &mut self.detokenizer {
            let piece = detokenizer.push(id);
            let outcome = self.stops.push(&piece);
            self.emit(&outcome.text, observer);
            self.stopped = outcome.stopped.is_some();
        }
        self.stopped
    }

    fn emit(&mut self, piece: &str, observer: &mut dyn Observer) {
        if !piece.is_empty() {
            self.text.push_str(piece);
            observer.text(piece);
        }
    }

    /// What was held back, unless a stop string ended the output.
    fn finish(mut self, observer: &mut dyn Observer) -> (Vec<u32>, String) {
        if !self.stopped {
            let rest = self.detokenizer.as_mut().map(Detokenizer::finish).unwrap_or_default();
            let outcome = self.stops.push(&rest);
            self.emit(&outcome.text, observer);
            if outcome.stopped.is_none() {
                let held = self.stops.finish();
                self.emit(&held, observer);
            }
        }
        (self.ids, self.text)
    }
}

impl Generate for Engine {
    fn name(&self) -> &str {
        &self.name
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| EngineError::NoTokenizer { model: self.name.clone() })
    }

    fn chat_ids(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        let template =
            self.template.as_ref().ok_or_else(|| EngineError::NoChatTemplate { model: self.name.clone() })?;
        Ok(template.encode(tokenizer, messages, true)?)
    }

    fn max_model_len(&self) -> usize {
        self.positions.max_model_len
    }

    fn trained_window(&self) -> usize {
        self.spec.trained_window()
    }

    fn long_context(&self) -> LongContext {
        self.positions.mode
    }

    fn sampling_defaults(&self) -> SamplingParams {
        let config = &self.generation;
        let sampled = config.do_sample.unwrap_or(config.temperature.is_some());
        let greedy = SamplingParams::greedy();
        SamplingParams {
            temperature: if sampled { config.temperature.unwrap_or(1.0) } else { 0.0 },
            top_k: config.top_k.unwrap_or(greedy.top_k),
            top_p: config.top_p.unwrap_or(greedy.top_p),
            min_p: config.min_p.unwrap_or(greedy.min_p),
            repetition_penalty: config.repetition_penalty.unwrap_or(greedy.repetition_penalty),
            ..greedy
        }
    }

    fn generate(&mut self, request: &Request, observer: &mut dyn Observer) -> Result<Completion> {
        request.sampling.check()?;
        check_chunk(request.chunk, self.runner.default_chunk())?;
        if request.max_tokens == 0 {
            return Err(EngineError::Parameter { name: "max_tokens", message: "must be at least 1".into() });
        }
        self.check_prompt(&request.prompt, request.max_tokens)?;
        if !request.stop.is_empty() {
            self.tokenizer()?;
        }
        let tokens = request.prompt.len() + request.max_tokens;
        self.with_sequence(tokens, |engine, sequence| engine.run(request, sequence, observer))
    }
}

//! The fields that chats and completions share.

use longhaul_text::SpecialTokens;
use serde_json::{Value, json};

use crate::config::Limits;
use crate::error::{ApiError, ApiResult};
use crate::request::Fields;
use crate::request::bounds::{self, LABEL_BYTES, STOP_BYTES};
use crate::request::fields::token_ids;
use crate::request::structured::{Constraint, constraint};
use crate::serving::{ModelInfo, Sampling};

/// What chats and completions share.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Common {
    pub(crate) sampling: Sampling,
    /// What the text has to look like.
    pub(crate) constraint: Option<Constraint>,
    pub(crate) n: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop_str_in_output: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) stream: bool,
    pub(crate) stream_options: StreamOptions,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) return_tokens_as_token_ids: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) truncate_prompt_tokens: Option<usize>,
    pub(crate) priority: i32,
    pub(crate) cache_salt: Option<String>,
    pub(crate) request_id: Option<String>,
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage_stats: bool,
}

impl Common {
    /// Takes the shared fields out of `f`.
    ///
    /// # Errors
    /// The first field that is wrong or not supported.
    pub(crate) fn read(f: &mut Fields, model: &ModelInfo, limits: &Limits) -> ApiResult<Self> {
        let stream = f.boolean("stream")?.unwrap_or(false);
        refuse_unsupported(f)?;
        labels(f)?;
        Ok(Self {
            n: f.integer("n", 1, limits.n.into())?.and_then(|n| u32::try_from(n).ok()).unwrap_or(1),
            constraint: constraint(f)?,
            sampling: sampling(f, model, limits)?,
            stop: stops(f, limits)?,
            include_stop_str_in_output: f.boolean("include_stop_str_in_output")?.unwrap_or(false),
            skip_special_tokens: f.boolean("skip_special_tokens")?.unwrap_or(true),
            stream_options: stream_options(f, stream)?,
            prompt_logprobs: prompt_logprobs(f, model, stream)?,
            return_tokens_as_token_ids: f.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
            return_token_ids: f.boolean("return_token_ids")?.unwrap_or(false),
            truncate_prompt_tokens: truncation(f, model)?,
            priority: f
                .integer("priority", i32::MIN.into(), i32::MAX.into())?
                .and_then(|p| i32::try_from(p).ok())
                .unwrap_or(0),
            cache_salt: cache_salt(f)?,
            request_id: request_id(f)?,
            stream,
        })
    }
}

fn sampling(f: &mut Fields, model: &ModelInfo, limits: &Limits) -> ApiResult<Sampling> {
    let mut params = model.sampling;
    let mut set = |value: Option<f32>, slot: fn(&mut longhaul_engine::SamplingParams) -> &mut f32| {
        if let Some(value) = value {
            *slot(&mut params) = value;
        }
    };
    set(f.number("temperature", "a number from 0 to 2", |x| (0.0..=2.0).contains(&x))?, |p| {
        &mut p.temperature
    });
    set(f.number("top_p", "a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?, |p| &mut p.top_p);
    set(f.number("min_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?, |p| &mut p.min_p);
    let penalty = |x: f32| (-2.0..=2.0).contains(&x);
    set(f.number("presence_penalty", "a number from -2 to 2", penalty)?, |p| &mut p.presence_penalty);
    set(f.number("frequency_penalty", "a number from -2 to 2", penalty)?, |p| &mut p.frequency_penalty);
    set(f.number("repetition_penalty", "a number above 0", |x| x > 0.0)?, |p| &mut p.repetition_penalty);
    if let Some(k) = f.integer("top_k", -1, u32::MAX.into())? {
        // -1, as the rivals write it, and 0 both keep all.
        params.top_k = u32::try_from(k).unwrap_or(0);
    }
    params.seed = match f.integer("seed", i64::MIN, i64::MAX)? {
        Some(seed) => seed as u64,
        None => random_seed(),
    };
    let vocab = model.vocab_size;
    let bad_words = bad_words(f, model, limits)?;
    let stop_token_ids = f.ids("stop_token_ids", vocab, bounds::STOP_TOKEN_IDS)?;
    let mut allowed_token_ids = match f.has("allowed_token_ids") {
        false => Vec::new(),
        true => {
            // Rows that pad the embedding decode to nothing.
            let known = model.tokenizer.as_ref().map_or(vocab, |t| t.vocab_size().min(vocab));
            let ids = f.ids("allowed_token_ids", known, vocab)?;
            if ids.is_empty() {
                return Err(f.error("allowed_token_ids", "is empty; leave it out to allow every token"));
            }
            ids
        }
    };
    allowed_token_ids.sort_unstable();
    allowed_token_ids.dedup();
    Ok(Sampling {
        params,
        logit_bias: logit_bias(f, vocab, limits)?,
        allowed_token_ids,
        bad_words,
        stop_token_ids,
        min_tokens: f.count("min_tokens", 0, i64::MAX)?.unwrap_or(0),
        ignore_eos: f.boolean("ignore_eos")?.unwrap_or(false),
    })
}

/// A seed for a request that does not care. The clock's low bits will do where the system has no randomness.
fn random_seed() -> u64 {
    getrandom::u64().unwrap_or_else(|_| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |now| now.as_nanos() as u64)
    })
}

fn logit_bias(f: &mut Fields, vocab: usize, limits: &Limits) -> ApiResult<Vec<(u32, f32)>> {
    let Some(value) = f.take("logit_bias") else { return Ok(Vec::new()) };
    let Value::Object(map) = value else {
        return Err(f.error("logit_bias", "must be an object from token ids to numbers from -100 to 100"));
    };
    if map.len() > limits.logit_bias {
        let message = format!("has {} entries, at most {} are taken", map.len(), limits.logit_bias);
        return Err(f.error("logit_bias", message));
    }
    let mut bias: Vec<(u32, f32)> = Vec::with_capacity(map.len());
    for (key, value) in &map {
        let id = key.parse::<u32>().ok().filter(|id| (*id as usize) < vocab);
        let Some(id) = id else {
            let message = format!(
                "{} is not a token id from 0 to {}",
                crate::error::quote(key),
                vocab.saturating_sub(1)
            );
            return Err(f.error("logit_bias", message));
        };
        match value.as_f64().map(|x| x as f32) {
            Some(x) if (-100.0..=100.0).contains(&x) => bias.push((id, x)),
            _ => {
                return Err(f.error(
                    "logit_bias",
                    format_args!("the bias of token {id} must be a number from -100 to 100"),
                ));
            }
        }
    }
    bias.sort_unstable_by_key(|(id, _)| *id);
    // `"7"` and `"07"` are different keys and the same token.
    if let Some([(id, _), _]) = bias.windows(2).find(|w| matches!(w, [(a, _), (b, _)] if a == b)) {
        return Err(f.error("logit_bias", format_args!("names token {id} twice")));
    }
    Ok(bias)
}

/// Each word as it is cut at the beginning of a text and behind a blank.
fn bad_words(f: &mut Fields, model: &ModelInfo, limits: &Limits) -> ApiResult<Vec<Vec<u32>>> {
    const FIELD: &str = "bad_words";
    let words = f.list(FIELD, limits.bad_words)?.unwrap_or_default();
    let mut bad: Vec<Vec<u32>> = Vec::with_capacity(2 * words.len());
    for (index, word) in words.iter().enumerate() {
        let Some(word) = word.as_str().filter(|word| (1..=STOP_BYTES).contains(&word.trim_start().len()))
        else {
            let message =
                format!("must be a word of 1 to {STOP_BYTES} bytes, not {}", crate::error::describe(word));
            return Err(f.error(&format!("{FIELD}[{index}]"), message));
        };
        let Some(tokenizer) = &model.tokenizer else {
            return Err(f.error(FIELD, "needs a tokenizer, which this model has not"));
        };
        let encode =
            |text: &str| tokenizer.encode(text, SpecialTokens::AsText).map_err(crate::prompt::text_error);
        let plain = encode(word.trim_start())?;
        let behind_blank = encode(&format!(" {}", word.trim_start()))?;
        // Where the blank is a token of its own, the word is cut as at the beginning.
        let differs = behind_blank.first() != plain.first() && behind_blank.len() == plain.len();
        bad.extend([Some(plain), Some(behind_blank).filter(|_| differs)].into_iter().flatten());
    }
    bad.retain(|ids| !ids.is_empty());
    Ok(bad)
}

fn stops(f: &mut Fields, limits: &Limits) -> ApiResult<Vec<String>> {
    let items = match f.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(other) => vec![other],
    };
    if items.len() > limits.stops {
        let message = format!("has {} stop strings, at most {} are taken", items.len(), limits.stops);
        return Err(f.error("stop", message));
    }
    items
        .into_iter()
        .enumerate()
        .map(|(index, item)| match item {
            Value::String(text) if (1..=STOP_BYTES).contains(&text.len()) => Ok(text),
            other => Err(f.error(
                &format!("stop[{index}]"),
                format_args!(
                    "must be a string of 1 to {STOP_BYTES} bytes, not {}",
                    crate::error::describe(&other)
                ),
            )),
        })
        .collect()
}

fn stream_options(f: &mut Fields, stream: bool) -> ApiResult<StreamOptions> {
    let Some(value) = f.take("stream_options") else { return Ok(StreamOptions::default()) };
    if !stream {
        return Err(f.error("stream_options", "is only allowed with stream: true"));
    }
    let mut o = Fields::object(value, "stream_options")?;
    let options = StreamOptions {
        include_usage: o.boolean("include_usage")?.unwrap_or(false),
        continuous_usage_stats: o.boolean("continuous_usage_stats")?.unwrap_or(false),
    };
    // Padding against traffic analysis, which some clients switch off.
    o.only("include_obfuscation", &[json!(false)])?;
    o.end()?;
    Ok(options)
}

fn prompt_logprobs(f: &mut Fields, model: &ModelInfo, stream: bool) -> ApiResult<Option<u32>> {
    let most = model.max_logprobs.into();
    let wanted = f.integer("prompt_logprobs", 0, most)?.and_then(|n| u32::try_from(n).ok());
    if wanted.is_some() && stream {
        return Err(f.error("prompt_logprobs", "is not available with stream: true"));
    }
    Ok(wanted)
}

/// -1 stands for as much as fits.
fn truncation(f: &mut Fields, model: &ModelInfo) -> ApiResult<Option<usize>> {
    f.only("truncation_side", &[json!("left")])?;
    match f.integer("truncate_prompt_tokens", -1, i64::MAX)? {
        None => Ok(None),
        Some(0) => Err(f.error("truncate_prompt_tokens", "must be at least 1, or -1 for what fits")),
        Some(n) => {
            let most = usize::try_from(n).unwrap_or(model.max_model_len);
            if most > model.max_model_len {
                let message = format!("is larger than the context of {} tokens", model.max_model_len);
                return Err(f.error("truncate_prompt_tokens", message));
            }
            Ok(Some(most))
        }
    }
}

fn cache_salt(f: &mut Fields) -> ApiResult<Option<String>> {
    match f.string("cache_salt")? {
        Some(salt) if salt.is_empty() || salt.len() > LABEL_BYTES => {
            Err(f.error("cache_salt", format_args!("must have 1 to {LABEL_BYTES} bytes")))
        }
        salt => Ok(salt),
    }
}

fn request_id(f: &mut Fields) -> ApiResult<Option<String>> {
    match f.string("request_id")? {
        Some(id) if !is_request_id(&id) => {
            Err(f.error("request_id", "must have 1 to 128 characters of A-Z a-z 0-9 . _ : -"))
        }
        id => Ok(id),
    }
}

/// Whether a client's id is one that may stand in logs and headers.
pub(crate) fn is_request_id(id: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-');
    (1..=128).contains(&id.len()) && id.bytes().all(fits)
}

/// Known fields with one value that means nothing, and fields that are not supported at all.
fn refuse_unsupported(f: &mut Fields) -> ApiResult<()> {
    for (key, values) in bounds::neutral() {
        f.only(key, &values)?;
    }
    Ok(())
}

fn labels(f: &mut Fields) -> ApiResult<()> {
    for key in ["user", "safety_identifier", "prompt_cache_key"] {
        f.label(key, LABEL_BYTES)?;
    }
    if let Some(value) = f.take("metadata") {
        match value {
            Value::Object(map) if map.len() <= bounds::METADATA && map.values().all(Value::is_string) => {}
            _ => {
                return Err(f.error(
                    "metadata",
                    format_args!("must be an object of at most {} strings", bounds::METADATA),
                ));
            }
        }
    }
    Ok(())
}

/// Ids of one prompt, for error messages `prompt[i]`.
pub(crate) fn prompt_ids(items: &[Value], vocab: usize, name: &str) -> ApiResult<Vec<u32>> {
    token_ids(items, vocab).map_err(|(index, message)| ApiError::field(format!("{name}[{index}]"), message))
}

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use longhaul_server::Batchable;
use longhaul_text::{GenerationConfig, RESERVED_VARIABLES};
use serde_json::{Map, Value};

use crate::exit::UsageError;

/// Defaults of requests.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationArgs {
    /// Where sampling parameters come from that a request leaves out: auto, the checkpoint's generation_config.json; vllm, none;
    /// or another directory with such a file
    #[arg(long, value_parser = generation_config, default_value = "auto", value_name = "auto|vllm|DIR")]
    pub generation_config: GenerationConfigArg,
    /// Parameters that go before those, JSON such as {"temperature": 0.7, "max_new_tokens": 1024}
    #[arg(long, value_parser = object, value_name = "JSON")]
    pub override_generation_config: Option<JsonObject>,
    /// The chat template instead of the checkpoint's: a file, or the template itself if there is a {{ or {% in it
    #[arg(long, value_name = "FILE|TEMPLATE")]
    pub chat_template: Option<String>,
    /// Variables of the chat template, JSON; requests may override them
    #[arg(long, value_parser = variables, value_name = "JSON")]
    pub default_chat_template_kwargs: Option<JsonObject>,
    /// Most alternatives that may be asked for with a token; -1 = the whole vocabulary
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(-1..=1_000_000), allow_negative_numbers = true, value_name = "N")]
    pub max_logprobs: i64,
    /// Show tokens as token_id:N in log probabilities, asked for or not
    #[arg(long)]
    pub return_tokens_as_token_ids: bool,
}

/// A JSON object.
#[derive(Debug, Clone)]
pub struct JsonObject(pub Map<String, Value>);

/// Where defaults come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GenerationConfigArg {
    Auto,
    Neutral,
    File(PathBuf),
}

fn generation_config(text: &str) -> Result<GenerationConfigArg, String> {
    Ok(match text {
        "auto" => GenerationConfigArg::Auto,
        "vllm" | "none" => GenerationConfigArg::Neutral,
        "" => return Err("expected auto, vllm or a directory".into()),
        directory => GenerationConfigArg::File(PathBuf::from(directory).join("generation_config.json")),
    })
}

fn object(text: &str) -> Result<JsonObject, String> {
    serde_json::from_str(text).map(JsonObject).map_err(|e| format!("expected a JSON object: {e}"))
}

fn variables(text: &str) -> Result<JsonObject, String> {
    let object = object(text)?;
    match object.0.keys().find(|name| RESERVED_VARIABLES.contains(&name.as_str())) {
        Some(name) => Err(format!("{name} is set by the server")),
        None => Ok(object),
    }
}

impl GenerationArgs {
    /// Changes a model's defaults as the arguments say.
    ///
    /// # Errors
    /// Files and values that cannot be used.
    pub fn apply(&self, batchable: &mut Batchable) -> Result<()> {
        if let GenerationConfigArg::File(path) = &self.generation_config {
            let bytes = std::fs::read(path)
                .with_context(|| format!("--generation-config: {}: cannot be read", path.display()))?;
            let config = GenerationConfig::from_bytes(&bytes, &path.display().to_string())?;
            batchable.model.end_tokens.extend(&config.eos_token_ids);
            over(&config, batchable);
        }
        if let Some(JsonObject(map)) = &self.override_generation_config {
            const FLAG: &str = "--override-generation-config";
            let known = [
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "repetition_penalty",
                "max_new_tokens",
                "do_sample",
            ];
            if let Some(name) = map.keys().find(|name| !known.contains(&name.as_str())) {
                let message = format!("{FLAG}: {name:?} cannot be set; {} can", known.join(", "));
                return Err(UsageError(message).into());
            }
            let bytes = Value::Object(map.clone()).to_string();
            over(&GenerationConfig::from_bytes(bytes.as_bytes(), FLAG)?, batchable);
        }
        if let Some(template) = &self.chat_template {
            let inline = template.contains("{{") || template.contains("{%");
            let (source, origin) = match inline {
                true => (template.clone(), "--chat-template".to_owned()),
                false => {
                    let source = std::fs::read_to_string(template)
                        .with_context(|| format!("--chat-template: {template}: cannot be read"))?;
                    (source, template.clone())
                }
            };
            batchable.model.template = Some(match &batchable.model.template {
                Some(own) => own.with_source(&source, &origin)?,
                None => longhaul_text::ChatTemplate::new(&source, None, None, &origin)?,
            });
        }
        let vocabulary = u32::try_from(batchable.model.vocab_size).unwrap_or(u32::MAX);
        // Below the range of the argument is only -1.
        batchable.model.max_logprobs = u32::try_from(self.max_logprobs).unwrap_or(vocabulary).min(vocabulary);
        Ok(())
    }
}

/// What `config` says, over what the model has.
fn over(config: &GenerationConfig, batchable: &mut Batchable) {
    let sampling = &mut batchable.model.sampling;
    sampling.temperature = config.temperature.unwrap_or(sampling.temperature);
    sampling.top_p = config.top_p.unwrap_or(sampling.top_p);
    sampling.top_k = config.top_k.unwrap_or(sampling.top_k);
    sampling.min_p = config.min_p.unwrap_or(sampling.min_p);
    sampling.repetition_penalty = config.repetition_penalty.unwrap_or(sampling.repetition_penalty);
    if config.do_sample == Some(false) && config.temperature.is_none() {
        sampling.temperature = 0.0;
    }
    if let Some(most) = config.max_new_tokens {
        batchable.model.max_new_tokens = usize::try_from(most).ok();
    }
}

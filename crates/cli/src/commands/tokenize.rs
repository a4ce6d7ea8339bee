use std::io::Read;
use std::process::ExitCode;

use anyhow::{Context, Result};
use longhaul_engine::{EngineError, Loader, ModelRef};
use longhaul_text::{SpecialTokens, Tokenizer};
use serde_json::json;

use crate::args::{DetokenizeArgs, TokenizeArgs};
use crate::output;

fn tokenizer(model: &str, offline: bool) -> Result<Tokenizer> {
    let files = Loader { offline, ..Loader::new(ModelRef::parse(model)?) }.files()?;
    Ok(files.tokenizer.ok_or(EngineError::NoTokenizer { model: files.name })?)
}

fn stdin() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read stdin")?;
    Ok(bytes)
}

/// `longhaul tokenize`
pub fn tokenize(args: &TokenizeArgs) -> Result<ExitCode> {
    let (bytes, origin) = match (&args.text, &args.file) {
        (Some(text), _) => (text.clone().into_bytes(), "the argument".to_owned()),
        (None, Some(path)) => (
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?,
            path.display().to_string(),
        ),
        (None, None) => (stdin()?, "stdin".to_owned()),
    };
    let text = super::utf8(bytes, &origin)?;
    let tokenizer = tokenizer(&args.model, args.offline)?;
    let special = if args.parse_special { SpecialTokens::Parse } else { SpecialTokens::AsText };
    let ids = tokenizer.encode(&text, special)?;
    if args.json {
        let tokens: Vec<String> =
            ids.iter().map(|&id| String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned()).collect();
        output::json(&json!({ "count": ids.len(), "ids": ids, "tokens": tokens }))?;
    } else {
        output::json(&ids)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `longhaul detokenize`
pub fn detokenize(args: &DetokenizeArgs) -> Result<ExitCode> {
    let ids = match &args.ids_file {
        Some(path) => super::read_ids(path)?,
        None if args.ids.is_empty() => super::parse_ids(&stdin()?, "stdin")?,
        None => args.ids.clone(),
    };
    let tokenizer = tokenizer(&args.model, args.offline)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= tokenizer.vocab_size()) {
        return Err(crate::exit::UsageError(format!(
            "token id {id} is outside the vocabulary of {} ids",
            tokenizer.vocab_size()
        ))
        .into());
    }
    let text = tokenizer.decode(&ids, args.skip_special);
    if args.json {
        output::json(&json!({ "text": text }))?;
    } else {
        output::line(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

use std::process::ExitCode;

use anyhow::{Result, bail};
use longhaul_engine::{EngineError, Generate, Loader, Precision, Request};
use longhaul_text::SpecialTokens;

use crate::args::GenerateArgs;
use crate::output;
use crate::progress::{self, Terminal};

/// Tokens to generate when neither the user nor the checkpoint says.
const DEFAULT_MAX_TOKENS: usize = 256;

/// The model to load.
pub fn loader(args: &GenerateArgs) -> Result<Loader, EngineError> {
    args.model.loader(Precision::Auto)
}

/// `longhaul generate`
pub fn run(args: &GenerateArgs) -> Result<ExitCode> {
    let ids = args.ids_file.as_deref().map(super::read_ids).transpose()?;
    let mut engine = progress::load(&loader(args)?)?;
    let prompt = match (ids, &args.prompt) {
        (Some(ids), _) => ids,
        (None, Some(text)) => {
            let special = if args.parse_special { SpecialTokens::Parse } else { SpecialTokens::AsText };
            engine.tokenizer()?.encode(text, special)?
        }
        (None, None) => bail!("--prompt or --ids-file is needed"),
    };
    let max_tokens = match args.max_tokens {
        Some(n) => n,
        None => {
            let wanted = engine.generation_config().max_new_tokens.map_or(DEFAULT_MAX_TOKENS, |n| n as usize);
            wanted.min(engine.max_model_len().saturating_sub(prompt.len()).max(1))
        }
    };
    let request = Request {
        prompt,
        sampling: args.sampling.over(engine.sampling_defaults()),
        max_tokens,
        stop: args.sampling.stop.clone(),
        ignore_eos: args.ignore_eos,
        chunk: args.sampling.chunk,
    };
    let stream = !args.json && engine.tokenizer().is_ok();
    let mut terminal = Terminal::new(stream);
    let completion = engine.generate(&request, &mut terminal)?;
    terminal.finish()?;
    if args.json {
        output::json(&completion)?;
    } else if stream {
        output::line("")?;
    } else {
        // No tokenizer: the ids are the output.
        output::json(&completion.ids)?;
    }
    Ok(ExitCode::SUCCESS)
}

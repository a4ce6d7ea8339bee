use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use longhaul_engine::{EngineError, Generate, Loader, Precision};
use longhaul_longdoc::{Answer, AskOptions, Document, ask};

use crate::args::AskArgs;
use crate::exit::UsageError;
use crate::output::{self, grouped};
use crate::progress::{self, Terminal};

/// The model to load.
pub fn loader(args: &AskArgs) -> Result<Loader, EngineError> {
    args.model.loader(Precision::Fastest)
}

/// `longhaul ask`
pub fn run(args: &AskArgs) -> Result<ExitCode> {
    let (paths, question) = documents_and_question(args)?;
    let documents = Document::load_all(&paths)?;
    let start = Instant::now();
    let mut engine = progress::load(&loader(args)?)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let options = AskOptions {
        max_tokens: args.max_tokens,
        sampling: args.sampling.over(engine.sampling_defaults()),
        stop: args.sampling.stop.clone(),
        system: args.system.clone(),
        chunk: args.sampling.chunk,
    };
    let mut terminal = Terminal::new(!args.json);
    let answer = ask(&mut engine, &documents, &question, &options, &mut terminal)?;
    terminal.finish()?;
    if args.json {
        output::json(&answer)?;
    } else {
        output::line("")?;
        print_support(&answer)?;
        eprintln!(
            "{} tokens from {} read in {:.2} s ({} tok/s), {} tokens answered at {:.0} tok/s; model {} \
             (--long-context {}) on {} loaded in {:.2} s",
            grouped(answer.timings.prompt_tokens as u64),
            match answer.documents.as_slice() {
                [one] => one.name.clone(),
                many => format!("{} documents", many.len()),
            },
            answer.timings.prefill_seconds,
            grouped(answer.timings.prefill_tokens_per_second() as u64),
            answer.timings.completion_tokens,
            answer.timings.decode_tokens_per_second(),
            engine.name(),
            engine.long_context(),
            engine.device(),
            load_seconds,
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn print_support(answer: &Answer) -> Result<()> {
    match &answer.passage {
        Some(passage) => {
            output::line(&format!("\nfrom {} line {}:", passage.document, passage.line))?;
            output::line(&format!("  {}", passage.text.trim().replace('\n', "\n  ")))?;
        }
        None => output::line("\nno passage of the documents supports this answer")?,
    }
    Ok(())
}

/// `--document` takes every value up to the next flag, so the question, when it comes last, is among them.
fn documents_and_question(args: &AskArgs) -> Result<(Vec<PathBuf>, String)> {
    match (&args.question, args.document.split_last()) {
        (Some(question), _) => Ok((args.document.clone(), question.clone())),
        (None, Some((question, documents))) if !documents.is_empty() => {
            if question.exists() {
                return Err(UsageError(format!(
                    "the question is missing: {} is a document",
                    question.display()
                ))
                .into());
            }
            let question = question.to_str().ok_or_else(|| UsageError("the question is not UTF-8".into()))?;
            Ok((documents.to_vec(), question.to_owned()))
        }
        _ => {
            Err(UsageError("the question is missing: longhaul ask --document FILE \"QUESTION\"".into())
                .into())
        }
    }
}

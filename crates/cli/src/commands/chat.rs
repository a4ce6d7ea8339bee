use std::io::{self, BufRead, IsTerminal};
use std::process::ExitCode;

use anyhow::Result;
use longhaul_engine::{EngineError, Generate, Loader, Precision, Request};
use longhaul_text::Message;

use crate::args::ChatArgs;
use crate::output;
use crate::progress::{self, Terminal};

const HELP: &str = "/reset forgets the conversation, /exit (or end of input) leaves, /help shows this";

/// The model to load.
pub fn loader(args: &ChatArgs) -> Result<Loader, EngineError> {
    args.model.loader(Precision::Fastest)
}

/// `longhaul chat`
pub fn run(args: &ChatArgs) -> Result<ExitCode> {
    let mut engine = progress::load(&loader(args)?)?;
    let opening: Vec<Message> =
        args.system.iter().map(|text| Message { role: "system".into(), content: text.clone() }).collect();
    let mut messages = opening.clone();
    let interactive = io::stdin().is_terminal();
    if interactive {
        eprintln!("{} on {}. {HELP}", engine.name(), engine.device());
    }
    let mut lines = io::stdin().lock().lines();
    loop {
        if interactive {
            eprint!("> ");
        }
        let Some(line) = lines.next().transpose()? else { break };
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/help" => {
                eprintln!("{HELP}");
                continue;
            }
            "/reset" => {
                messages = opening.clone();
                eprintln!("forgotten");
                continue;
            }
            command if command.starts_with('/') => {
                eprintln!("{command} is not a command; {HELP}");
                continue;
            }
            _ => {}
        }
        messages.push(Message { role: "user".into(), content: line });
        match answer(&mut engine, &messages, args) {
            Ok(text) => messages.push(Message { role: "assistant".into(), content: text }),
            // The conversation outgrew the context: say so and go on without the last turn.
            Err(error) if matches!(error.downcast_ref(), Some(EngineError::TooLong { .. })) => {
                eprintln!("error: {error}; /reset starts a new conversation");
                messages.pop();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn answer(engine: &mut impl Generate, messages: &[Message], args: &ChatArgs) -> Result<String> {
    let prompt = engine.chat_ids(messages)?;
    let room = engine.max_model_len().saturating_sub(prompt.len()).max(1);
    let request = Request {
        prompt,
        sampling: args.sampling.over(engine.sampling_defaults()),
        max_tokens: args.max_tokens.min(room),
        stop: args.sampling.stop.clone(),
        ignore_eos: false,
        chunk: args.sampling.chunk,
    };
    let mut terminal = Terminal::new(true);
    let completion = engine.generate(&request, &mut terminal)?;
    terminal.finish()?;
    output::line("")?;
    Ok(completion.text)
}

//! The `longhaul` command: parses arguments, wires the crates together, prints. Nothing else lives here.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod exit;
mod output;
mod progress;
mod systemd;
mod vllm;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use exit::UsageError;

fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => return exit::report(&error.into()),
    };
    let result = match commands::worker::loader(&cli.command) {
        Ok(Some(loader)) => commands::worker::run(&loader),
        Ok(None) => run(cli.command),
        Err(error) => Err(error),
    };
    match result {
        Ok(code) => code,
        Err(error) => exit::report(&error),
    }
}

/// The command line, `serve`'s with the flags of vLLM.
fn parse() -> Result<Cli, UsageError> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    // What is not text is no flag of anybody's: the parser says what is wrong with it.
    let words: Option<Vec<String>> = arguments.iter().map(|word| word.to_str().map(str::to_owned)).collect();
    let Some(words) = words.filter(|words| words.get(1).is_some_and(|command| command == "serve")) else {
        return Ok(Cli::parse_from(arguments));
    };
    let (command, rest) = words.split_at(2);
    let translated = vllm::translate(rest.to_vec())?;
    let mut cli = Cli::parse_from(command.iter().chain(&translated.arguments));
    if let Command::Serve(args) = &mut cli.command {
        args.warnings = translated.warnings;
    }
    Ok(cli)
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Ask(args) => commands::ask::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Detokenize(args) => commands::tokenize::detokenize(&args),
        Command::Generate(args) => commands::generate::run(&args),
        Command::Logits(args) => commands::logits::run(&args),
        Command::Models(args) => commands::models::run(&args),
        Command::Needle(args) => commands::needle::run(&args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Serve(args) => commands::serve::run(&args),
        Command::Tokenize(args) => commands::tokenize::tokenize(&args),
    }
}

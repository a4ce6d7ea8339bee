//! The `longhaul` command: parses arguments, wires the crates together, prints. Nothing else lives here.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod exit;
mod output;
mod progress;
mod systemd;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
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

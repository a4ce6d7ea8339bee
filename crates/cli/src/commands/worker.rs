//! Any command that runs a model, on a node that works for a leader.

use std::process::ExitCode;

use anyhow::Result;
use longhaul_engine::Loader;

use super::{ask, bench, chat, generate, logits, needle, serve};
use crate::args::{BenchCommand, Command};
use crate::progress;

/// What `command` loads, if this node is a worker.
///
/// # Errors
/// Nodes that are not described whole, and the command's own.
pub fn loader(command: &Command) -> Result<Option<Loader>> {
    let model = match command {
        Command::Ask(args) => &args.model,
        Command::Bench(args) => match &args.what {
            BenchCommand::Latency(args) => &args.model,
            _ => return Ok(None),
        },
        Command::Chat(args) => &args.model,
        Command::Generate(args) => &args.model,
        Command::Logits(args) => &args.model,
        Command::Needle(args) => &args.model,
        Command::Serve(args) => &args.model,
        Command::Detokenize(_) | Command::Models(_) | Command::Plan(_) | Command::Tokenize(_) => {
            return Ok(None);
        }
    };
    if model.nodes.options()?.is_none_or(|nodes| nodes.placement.rank == 0) {
        return Ok(None);
    }
    let loader = match command {
        Command::Ask(args) => ask::loader(args)?,
        Command::Bench(args) => match &args.what {
            BenchCommand::Latency(args) => bench::latency_loader(args)?,
            _ => return Ok(None),
        },
        Command::Chat(args) => chat::loader(args)?,
        Command::Generate(args) => generate::loader(args)?,
        Command::Logits(args) => logits::loader(args)?,
        Command::Needle(args) => needle::worker_loader(args)?,
        Command::Serve(args) => serve::loader(args)?,
        Command::Detokenize(_) | Command::Models(_) | Command::Plan(_) | Command::Tokenize(_) => {
            return Ok(None);
        }
    };
    Ok(Some(loader))
}

/// Works until the leader ends the group.
pub fn run(loader: &Loader) -> Result<ExitCode> {
    progress::follow(loader)?;
    Ok(ExitCode::SUCCESS)
}

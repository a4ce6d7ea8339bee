use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use longhaul_engine::{EngineError, Generate, Loader, LongContext, Precision};
use longhaul_longdoc::needle::{
    Cell, ModeInfo, NeedleConfig, NeedleObserver, NeedleOutput, Progress, run as run_needle,
};
use longhaul_longdoc::render::{TerminalStyle, terminal};

use crate::args::{DTypeArg, KvCacheDtypeArg, LoadFormatArg, ModelArgs, NeedleArgs};
use crate::exit::UsageError;
use crate::output;
use crate::progress;

/// *Pride and Prejudice*, public domain (`assets/README.md`).
const HAYSTACK: &str = include_str!("../../../../assets/haystack.txt");

/// Prompt lengths to ask at.
fn lengths(args: &NeedleArgs) -> Result<Vec<usize>> {
    if !args.lengths.is_empty() {
        return Ok(args.lengths.clone());
    }
    let spec = single(args, None).loader(Precision::Fastest)?.files()?.spec;
    let trained = spec.trained_window();
    let limit = args.model.max_model_len.unwrap_or(spec.max_position_embeddings.max(trained));
    // The answer needs room too where the window is the whole context.
    let room = limit.saturating_sub(args.max_tokens);
    let mut lengths: Vec<usize> = [1, 2, 4, 8].map(|n| (n * trained).min(room)).into();
    lengths.dedup();
    Ok(lengths)
}

fn single(args: &NeedleArgs, mode: Option<LongContext>) -> ModelArgs {
    ModelArgs { long_context: mode.into_iter().collect(), ..args.model.clone() }
}

/// The model to load for one of the modes, with room for the longest prompt and its answer.
fn loader(args: &NeedleArgs, mode: LongContext, lengths: &[usize]) -> Result<Loader, EngineError> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut model = single(args, Some(mode));
    model.max_model_len.get_or_insert(longest.saturating_add(args.max_tokens));
    model.loader(Precision::Fastest)
}

/// What a worker loads.
///
/// # Errors
/// Several modes: nodes meet for one model.
pub fn worker_loader(args: &NeedleArgs) -> Result<Loader> {
    match args.model.long_context.as_slice() {
        &[mode] => Ok(loader(args, mode, &lengths(args)?)?),
        _ => {
            Err(UsageError("several nodes compare no modes: give one, such as --long-context dca".into())
                .into())
        }
    }
}

/// `longhaul needle`
pub fn run(args: &NeedleArgs) -> Result<ExitCode> {
    if args.model.nodes.options()?.is_some() {
        worker_loader(args)?;
    }
    let files = single(args, None).loader(Precision::Fastest)?.files()?;
    let lengths = lengths(args)?;
    let modes = if args.model.long_context.is_empty() {
        vec![LongContext::None, LongContext::Dca]
    } else {
        args.model.long_context.clone()
    };
    let (haystack, haystack_name) = match &args.haystack {
        None => (HAYSTACK.to_owned(), "built-in".to_owned()),
        Some(path) => (read(path)?, path.display().to_string()),
    };
    let defaults = NeedleConfig::default();
    let config = NeedleConfig {
        model: label(files.name, &args.model),
        lengths: lengths.clone(),
        depths: args.depths.clone(),
        modes,
        haystack,
        haystack_name,
        needle: args.needle.clone().unwrap_or(defaults.needle),
        question: args.question.clone().unwrap_or(defaults.question),
        expect: if args.expect.is_empty() { defaults.expect } else { args.expect.clone() },
        instances: args.instances,
        seed: args.seed,
        max_tokens: args.max_tokens,
        control: args.control,
        chunk: args.chunk,
    };
    let destination = args.out.clone().map(|dir| NeedleOutput { dir, overwrite: args.overwrite });
    let mut open = |mode| {
        let engine = progress::load_engine(&loader(args, mode, &lengths)?)?;
        Ok(Box::new(engine) as Box<dyn Generate>)
    };
    let mut watcher = Watcher::new();
    let report = run_needle(&config, destination.as_ref(), &mut open, &mut watcher)?;
    watcher.bar.finish_and_clear();
    if args.json {
        output::json(&report)?;
    } else {
        let style = TerminalStyle { color: color(), width: width() };
        output::line(terminal(&report, style).trim_end())?;
    }
    if let Some(dir) = &args.out {
        eprintln!("wrote {}/needle.html, needle.svg, report.json", dir.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The model as reports and the resume check name it: results of other weights or another precision must not mix.
fn label(mut name: String, args: &ModelArgs) -> String {
    if args.load_format == LoadFormatArg::Dummy {
        name.push_str(&format!(" (dummy weights, seed {})", args.dummy_seed));
    }
    match args.dtype {
        DTypeArg::Auto => {}
        DTypeArg::Float32 => name.push_str(", float32"),
        DTypeArg::Bfloat16 => name.push_str(", bfloat16"),
    }
    match args.kv_cache_dtype {
        KvCacheDtypeArg::Auto => {}
        KvCacheDtypeArg::Float32 => name.push_str(", float32 KV cache"),
        KvCacheDtypeArg::Bfloat16 => name.push_str(", bfloat16 KV cache"),
        KvCacheDtypeArg::Fp8E4m3 => name.push_str(", fp8_e4m3 KV cache"),
    }
    name
}

fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    super::utf8(bytes, &path.display().to_string())
}

/// Colours on a terminal, unless NO_COLOR (no-color.org) is set.
fn color() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

fn width() -> usize {
    std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()).unwrap_or(100)
}

/// A bar over all questions; its time left counts tokens, since long prompts take longer.
struct Watcher {
    bar: ProgressBar,
    start: Instant,
    found: usize,
    asked: usize,
}

impl Watcher {
    fn new() -> Self {
        let bar = progress::bar("{prefix} {bar:30} {pos}/{len} {msg}");
        Self { bar, start: Instant::now(), found: 0, asked: 0 }
    }
}

impl NeedleObserver for Watcher {
    fn mode_started(&mut self, info: &ModeInfo, progress: &Progress) {
        self.bar.set_prefix(info.mode.to_string());
        self.bar.set_length(progress.total as u64);
        self.bar.set_position(progress.done as u64);
        (self.found, self.asked) = (0, 0);
    }

    fn cell_finished(&mut self, cell: &Cell, progress: &Progress) {
        if !cell.control {
            self.found += usize::from(cell.found);
            self.asked += 1;
        }
        let rate = progress.tokens_done as f64 / self.start.elapsed().as_secs_f64().max(1e-9);
        let left = progress.tokens_left as f64 / rate.max(1e-9);
        self.bar.set_position(progress.done as u64);
        self.bar
            .set_message(format!("found {}/{}, {rate:.0} tok/s, ETA {left:.0} s", self.found, self.asked));
    }
}

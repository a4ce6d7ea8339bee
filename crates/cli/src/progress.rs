//! Progress on stderr: a bar for loading, a bar for prefill, streamed text. Bars appear only on a terminal.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use longhaul_engine::{Engine, EngineError, Loader, Observer};

use crate::output;

/// A bar on stderr with the style of all bars.
pub fn bar(template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸ "));
    }
    bar
}

/// Loads a model behind a progress bar.
pub fn load(loader: &Loader) -> anyhow::Result<Engine> {
    Ok(load_engine(loader)?)
}

/// Works for the leader of a group of nodes, behind the same bar.
pub fn follow(loader: &Loader) -> Result<(), EngineError> {
    loading(|progress| loader.follow(progress))
}

fn loading<R>(load: impl FnOnce(&mut dyn FnMut(u64, u64)) -> R) -> R {
    let bar = bar("loading {bar:30} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}");
    let result = load(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        if done >= total {
            bar.finish_and_clear();
        }
    });
    bar.finish_and_clear();
    result
}

/// [`load`] with the engine's own error.
pub fn load_engine(loader: &Loader) -> Result<Engine, EngineError> {
    let engine = loading(|progress| loader.load(progress));
    if let Ok(engine) = &engine {
        engine.notes().iter().for_each(|note| eprintln!("note: {note}"));
    }
    engine
}

/// Shows prefill as a bar on stderr and streams text to stdout.
pub struct Terminal {
    bar: ProgressBar,
    stream: bool,
    failed: Option<std::io::Error>,
}

impl Terminal {
    /// `stream`: print text as it comes.
    pub fn new(stream: bool) -> Self {
        let bar = if std::io::stderr().is_terminal() {
            bar("reading {bar:30} {pos}/{len} tokens {per_sec} ETA {eta}")
        } else {
            ProgressBar::hidden()
        };
        Self { bar, stream, failed: None }
    }

    /// The first error of writing to stdout.
    ///
    /// # Errors
    /// That error.
    pub fn finish(self) -> std::io::Result<()> {
        self.bar.finish_and_clear();
        self.failed.map_or(Ok(()), Err)
    }
}

impl Observer for Terminal {
    fn prefill(&mut self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        if done == total {
            self.bar.finish_and_clear();
        }
    }

    fn text(&mut self, piece: &str) {
        if self.stream && self.failed.is_none() {
            self.failed = output::piece(piece).err();
        }
    }
}

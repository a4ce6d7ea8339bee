//! Needle in a haystack: a fact hidden in a long text, at every depth and length, for every long-context mode.
//!
//! The protocol follows the Qwen2 technical report (figure 1) and LLMTest_NeedleInAHaystack: the needle is inserted at a
//! depth in percent of the haystack's tokens and moved back to the end of a sentence; the question follows the text.
//! Differences: every cell hides its own random fact, so that neither the model's knowledge nor another cell helps;
//! answers are scored by the expected text, without a judge; a control asks the same without the needle.
//!
//! "Length" is the number of tokens of the whole prompt, template and question included, answer not included.

mod config;
mod haystack;
mod plan;
mod report;
mod store;

use longhaul_engine::{EngineError, Generate, LongContext, Observer, Request};

pub use config::{Grid, NeedleConfig, Settings};
pub use report::{Cell, LengthSummary, ModeInfo, ModeSummary, NeedleReport, Score};
pub use store::NeedleOutput;

use crate::{LongdocError, Result};
use config::contains;
use haystack::{Haystack, encode};
use plan::{PlannedCell, plan};
use store::Store;

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Questions finished, controls and those of an earlier run included.
    pub done: usize,
    /// Questions of the whole run.
    pub total: usize,
    /// Of those finished, how many an earlier run had finished.
    pub resumed: usize,
    /// Prompt tokens of the questions finished in this run.
    pub tokens_done: u64,
    /// Prompt tokens still to read, by the lengths asked for.
    pub tokens_left: u64,
}

/// Follows a run.
pub trait NeedleObserver {
    /// The model of a mode is loaded and its questions begin.
    fn mode_started(&mut self, info: &ModeInfo, progress: &Progress) {
        let _ = (info, progress);
    }

    /// `done` of `total` prompt tokens of the current question are read.
    fn prefill(&mut self, done: usize, total: usize) {
        let _ = (done, total);
    }

    /// A question is answered and its result is on disk.
    fn cell_finished(&mut self, cell: &Cell, progress: &Progress) {
        let _ = (cell, progress);
    }
}

impl NeedleObserver for () {}

/// Opens the model in a mode.
pub type OpenModel<'a> = dyn FnMut(LongContext) -> std::result::Result<Box<dyn Generate>, EngineError> + 'a;

/// Runs all questions of `config`, mode by mode, short prompts first, and reports.
///
/// `open` is called once for each mode that has questions left, after the model before it was dropped. With `output`,
/// results are kept as they come, questions answered by an earlier run with the same settings are skipped, and the
/// report is written as JSON, HTML and SVG at the end.
///
/// # Errors
/// Settings that cannot work, lengths beyond a model's context (before any question of that mode), a folder of another
/// run, and the model's errors; results up to there are kept.
pub fn run(
    config: &NeedleConfig,
    output: Option<&NeedleOutput>,
    open: &mut OpenModel<'_>,
    observer: &mut dyn NeedleObserver,
) -> Result<NeedleReport> {
    let (grid, cells) = plan(config)?;
    let settings = config.settings();
    let mut store = match output {
        Some(output) => Store::open(output, &settings)?,
        None => Store::memory(),
    };
    let resumed = cells.iter().filter(|c| store.get(c).is_some()).count();
    let tokens_left = cells.iter().filter(|c| store.get(c).is_none()).map(|c| c.length as u64).sum();
    let mut progress = Progress { done: resumed, total: cells.len(), resumed, tokens_done: 0, tokens_left };
    let mut haystack: Option<Haystack> = None;
    for &mode in &grid.modes {
        let todo: Vec<&PlannedCell> =
            cells.iter().filter(|c| c.mode == mode && store.get(c).is_none()).collect();
        let Some(longest) = todo.iter().map(|c| c.length).max() else { continue };
        let mut model = open(mode)?;
        let max_model_len = model.max_model_len();
        if longest.saturating_add(config.max_tokens) > max_model_len {
            let length = longest;
            return Err(LongdocError::LengthBeyondContext {
                mode,
                length,
                max_tokens: config.max_tokens,
                max_model_len,
            });
        }
        // All modes of a run have the checkpoint's tokenizer, so the long text is encoded once.
        let haystack = match &mut haystack {
            Some(haystack) => haystack,
            none => none.insert(Haystack::new(model.tokenizer()?, &config.haystack)?),
        };
        let info = ModeInfo {
            mode,
            trained_window: model.trained_window(),
            max_model_len,
            haystack_tokens: haystack.tokens(),
        };
        store.add_mode(info.clone())?;
        observer.mode_started(&info, &progress);
        for planned in todo {
            let cell = answer(config, haystack, model.as_mut(), planned, observer)?;
            store.add(cell.clone())?;
            progress.done += 1;
            progress.tokens_done += cell.prompt_tokens as u64;
            progress.tokens_left -= planned.length as u64;
            observer.cell_finished(&cell, &progress);
        }
    }
    let results = cells.iter().filter_map(|c| store.get(c).cloned()).collect();
    let modes =
        grid.modes.iter().filter_map(|m| store.modes().iter().find(|i| i.mode == *m).cloned()).collect();
    let report = NeedleReport::new(settings, grid, modes, results);
    if let Some(output) = output {
        report.write(&output.dir)?;
    }
    Ok(report)
}

/// Asks one question.
fn answer(
    config: &NeedleConfig,
    haystack: &Haystack,
    model: &mut dyn Generate,
    planned: &PlannedCell,
    observer: &mut dyn NeedleObserver,
) -> Result<Cell> {
    struct Prefill<'a>(&'a mut dyn NeedleObserver);
    impl Observer for Prefill<'_> {
        fn prefill(&mut self, done: usize, total: usize) {
            self.0.prefill(done, total);
        }
    }
    let start = haystack.start(config.seed, planned.instance);
    let prompt = haystack.prompt(model, &planned.fact, start, planned.length, planned.depth)?;
    let (ids, needle_at) = match planned.control {
        false => (prompt.ids, Some(prompt.needle_at)),
        true => (encode(model, &prompt.control)?, None),
    };
    let mut request = Request::greedy(ids, config.max_tokens);
    request.chunk = config.chunk;
    let completion = model.generate(&request, &mut Prefill(observer))?;
    let answer = completion.text.trim().to_owned();
    Ok(Cell {
        mode: planned.mode,
        length: planned.length,
        depth: planned.depth,
        instance: planned.instance,
        control: planned.control,
        prompt_tokens: request.prompt.len(),
        needle_position_tokens: needle_at,
        question: planned.fact.question.clone(),
        expected: planned.fact.expected.clone(),
        found: planned.fact.expected.iter().all(|e| contains(&answer, e)),
        answer,
        prefill_seconds: completion.timings.prefill_seconds,
        prefill_tok_s: completion.timings.prefill_tokens_per_second(),
    })
}

#[cfg(test)]
mod tests;

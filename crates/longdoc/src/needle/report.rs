//! What a needle run found: every cell, and the sums.

use std::path::{Path, PathBuf};

use longhaul_engine::LongContext;
use serde::{Deserialize, Serialize};

use super::config::{Grid, Settings, depth_key};
use super::store::write_atomically;
use crate::{LongdocError, Result, render};

/// One question and its answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Long-context mode.
    pub mode: LongContext,
    /// Tokens asked for.
    pub length: usize,
    /// Percent asked for.
    pub depth: f32,
    /// Number of the question at this place, from 0.
    pub instance: usize,
    /// Whether the needle was left out.
    pub control: bool,
    /// Tokens of the prompt: at most `length`, less by the needle in a control.
    pub prompt_tokens: usize,
    /// Tokens in front of the needle; `None` in a control.
    pub needle_position_tokens: Option<usize>,
    /// The question.
    pub question: String,
    /// What the answer must contain.
    pub expected: Vec<String>,
    /// The model's answer.
    pub answer: String,
    /// Whether the answer contains all of it.
    pub found: bool,
    /// Time to the first token of the answer.
    pub prefill_seconds: f64,
    /// Prompt tokens per second.
    pub prefill_tok_s: f64,
}

impl Cell {
    pub(crate) fn key(&self) -> CellKey {
        (self.mode.to_string(), self.length, depth_key(self.depth), self.instance, self.control)
    }
}

/// Mode, length, depth in thousandths of a percent, instance, control.
pub(crate) type CellKey = (String, usize, u32, usize, bool);

/// What a mode's model said about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModeInfo {
    /// The mode.
    pub mode: LongContext,
    /// Tokens the weights were trained on.
    pub trained_window: usize,
    /// Tokens of prompt and answer that fit.
    pub max_model_len: usize,
    /// Tokens of one copy of the haystack.
    pub haystack_tokens: usize,
}

/// Questions answered.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Answers that contain what was expected.
    pub found: usize,
    /// Questions.
    pub total: usize,
}

impl Score {
    /// Share found, 0 to 1; 0 of nothing is 0.
    pub fn accuracy(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.found as f64 / self.total as f64 }
    }

    fn of<'a>(cells: impl Iterator<Item = &'a Cell>) -> Self {
        cells.fold(Self { found: 0, total: 0 }, |s, c| Self {
            found: s.found + usize::from(c.found),
            total: s.total + 1,
        })
    }
}

/// The sum over all depths and instances of one mode and length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LengthSummary {
    /// Mode.
    pub mode: LongContext,
    /// Tokens of the prompts.
    pub length: usize,
    /// With the needle.
    pub score: Score,
    /// Without the needle; found must be 0.
    pub control: Option<Score>,
    /// Prompt tokens of all questions by the time of all prefills.
    pub prefill_tok_s: f64,
}

/// The sum over a whole mode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModeSummary {
    /// Mode.
    pub mode: LongContext,
    /// With the needle.
    pub score: Score,
    /// Without the needle; found must be 0.
    pub control: Option<Score>,
}

/// A finished run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NeedleReport {
    /// What was asked.
    pub settings: Settings,
    /// Of which places.
    pub grid: Grid,
    /// The models.
    pub modes: Vec<ModeInfo>,
    /// Sums per mode and length.
    pub lengths: Vec<LengthSummary>,
    /// Sums per mode.
    pub totals: Vec<ModeSummary>,
    /// What a reader should know: a repeated haystack, a control that found something.
    pub notes: Vec<String>,
    /// Every question, in the order of the grid.
    pub cells: Vec<Cell>,
}

impl NeedleReport {
    pub(crate) fn new(settings: Settings, grid: Grid, modes: Vec<ModeInfo>, cells: Vec<Cell>) -> Self {
        let sum =
            |mode: LongContext, length: Option<usize>, control: bool| {
                Score::of(cells.iter().filter(|c| {
                    c.mode == mode && c.control == control && length.is_none_or(|l| l == c.length)
                }))
            };
        let mut lengths = Vec::new();
        let mut totals = Vec::new();
        for &mode in &grid.modes {
            for &length in &grid.lengths {
                let of_length = cells.iter().filter(|c| c.mode == mode && c.length == length);
                let (tokens, seconds) = of_length
                    .fold((0.0, 0.0), |(t, s), c| (t + c.prompt_tokens as f64, s + c.prefill_seconds));
                lengths.push(LengthSummary {
                    mode,
                    length,
                    score: sum(mode, Some(length), false),
                    control: grid.control.then(|| sum(mode, Some(length), true)),
                    prefill_tok_s: if seconds > 0.0 { tokens / seconds } else { 0.0 },
                });
            }
            let control = grid.control.then(|| sum(mode, None, true));
            totals.push(ModeSummary { mode, score: sum(mode, None, false), control });
        }
        let mut report = Self { settings, grid, modes, lengths, totals, notes: Vec::new(), cells };
        report.notes = report.collect_notes();
        report
    }

    fn collect_notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let (Some(info), Some(&longest)) = (self.modes.first(), self.grid.lengths.last())
            && longest > info.haystack_tokens
        {
            notes.push(format!(
                "The haystack has {} tokens, so prompts of more repeat it; the needle stands in them once.",
                info.haystack_tokens
            ));
        }
        for total in &self.totals {
            if let Some(control) = total.control.filter(|c| c.found > 0) {
                notes.push(format!(
                    "Control failed for {}: {} of {} prompts without the needle were answered right, so its score says \
                     little about reading.",
                    total.mode, control.found, control.total
                ));
            }
        }
        notes
    }

    /// Found and asked at one place of a map; `None` where nothing was asked.
    pub fn score(&self, mode: LongContext, length: usize, depth: f32) -> Option<Score> {
        let here = |c: &&Cell| {
            c.mode == mode && c.length == length && depth_key(c.depth) == depth_key(depth) && !c.control
        };
        Some(Score::of(self.cells.iter().filter(here))).filter(|s| s.total > 0)
    }

    /// Writes `report.json`, `needle.html` and `needle.svg` into `dir`, each in one step. Returns their paths.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn write(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let io = |path: &Path, source| LongdocError::Io { path: path.into(), action: "cannot write", source };
        std::fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
        let json = serde_json::to_string_pretty(self).map_err(|e| io(&dir.join("report.json"), e.into()))?;
        let files = [
            ("report.json", json + "\n"),
            ("needle.html", render::html(self)),
            ("needle.svg", render::svg(self)),
        ];
        let mut paths = Vec::new();
        for (name, content) in files {
            let path = dir.join(name);
            write_atomically(&path, content.as_bytes()).map_err(|e| io(&path, e))?;
            paths.push(path);
        }
        Ok(paths)
    }
}

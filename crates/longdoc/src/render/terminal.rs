//! Heat maps for the terminal.

use std::fmt::Write;

use longhaul_engine::LongContext;

use super::{axis_label, black_text, color, control_line, grouped, mode_title, percent, window_column};
use crate::needle::{NeedleReport, Score};

/// How the terminal shows colours and how wide it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalStyle {
    /// 24-bit colours; without them cells show a shade and the number.
    pub color: bool,
    /// Columns of the terminal; wider maps are broken into parts.
    pub width: usize,
}

impl Default for TerminalStyle {
    fn default() -> Self {
        Self { color: false, width: 80 }
    }
}

/// One map a mode, with the trained window, sums per length, the control and notes.
pub fn terminal(report: &NeedleReport, style: TerminalStyle) -> String {
    let mut out = String::new();
    let bold = |text: &str| if style.color { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() };
    for total in &report.totals {
        let Score { found, total: asked } = total.score;
        let share = percent(total.score.accuracy());
        let title = format!("{} ({})", mode_title(total.mode), total.mode);
        let _ = writeln!(out, "{}  {share} % found ({found} of {asked})", bold(&title));
        map(&mut out, report, total.mode, style);
        out.push('\n');
    }
    if let Some(line) = control_line(report) {
        let _ = writeln!(out, "{line}");
    }
    for note in &report.notes {
        let _ = writeln!(out, "Note: {note}");
    }
    out
}

fn map(out: &mut String, report: &NeedleReport, mode: LongContext, style: TerminalStyle) {
    const LEFT: usize = 8;
    let labels: Vec<String> = report.grid.lengths.iter().map(|&l| axis_label(l)).collect();
    let column = labels.iter().map(|l| l.chars().count()).max().unwrap_or(0).max(5) + 2;
    let per_part = (style.width.saturating_sub(LEFT) / column).max(1);
    let window = window_column(report, mode);
    for (part, lengths) in report.grid.lengths.chunks(per_part).enumerate() {
        let first = part * per_part;
        // The bar stands in the last character of the column before it.
        let bar = |index: usize| {
            if window.is_some_and(|(before, _)| before == first + index + 1) { '|' } else { ' ' }
        };
        let _ = write!(out, "{:>LEFT$}", "depth ");
        for (i, _) in lengths.iter().enumerate() {
            let label = labels.get(first + i).map_or("", String::as_str);
            let _ = write!(out, "{label:^w$}{}", bar(i), w = column - 1);
        }
        trim_end(out);
        out.push('\n');
        for &depth in &report.grid.depths {
            let _ = write!(out, "{:>LEFT$}", format!("{depth} % "));
            for (i, &length) in lengths.iter().enumerate() {
                cell(out, report.score(mode, length, depth), column - 1, style.color);
                out.push(bar(i));
            }
            trim_end(out);
            out.push('\n');
        }
        let _ = write!(out, "{:>LEFT$}", "all ");
        for (i, &length) in lengths.iter().enumerate() {
            let sum = report.lengths.iter().find(|s| s.mode == mode && s.length == length).map(|s| s.score);
            cell(out, sum, column - 1, style.color);
            out.push(bar(i));
        }
        trim_end(out);
        out.push('\n');
    }
    let _ = writeln!(out, "{:LEFT$}tokens of the prompt; % of answers found", "");
    if let Some((before, window)) = window {
        let place = if before == 0 { "all lengths are beyond" } else { "| is" };
        let _ = writeln!(out, "{:LEFT$}{place} the trained window of {} tokens", "", grouped(window));
    }
}

fn cell(out: &mut String, score: Option<Score>, width: usize, colored: bool) {
    let Some(score) = score else {
        let _ = write!(out, "{:^width$}", "-");
        return;
    };
    let number = percent(score.accuracy());
    let _ = if colored {
        let rgb = color(score.accuracy());
        let text = if black_text(rgb) { "0;0;0" } else { "255;255;255" };
        let [r, g, b] = rgb;
        write!(out, "\x1b[48;2;{r};{g};{b}m\x1b[38;2;{text}m{number:^width$}\x1b[0m")
    } else {
        let shade = match number {
            0 => '·',
            1..=33 => '░',
            34..=66 => '▒',
            67..=99 => '▓',
            _ => '█',
        };
        write!(out, "{:^width$}", format!("{shade} {number:>3}"))
    };
}

fn trim_end(out: &mut String) {
    out.truncate(out.trim_end_matches(' ').len());
}

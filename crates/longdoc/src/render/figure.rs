//! The heat maps as SVG: one map for the page, all maps as a figure that stands alone.

use std::fmt::Write;

use longhaul_engine::LongContext;

use super::{
    RAMP, axis_label, black_text, color, control_line, escape, grouped, mode_title, percent, window_column,
};
use crate::needle::{NeedleReport, Score};

const CELL_HEIGHT: f64 = 26.0;
/// Space for depth labels and their title.
const LEFT: f64 = 62.0;
/// Heading, result, label of the trained window.
const TOP: f64 = 66.0;
/// Row of sums, length labels and their title.
const BOTTOM: f64 = 84.0;
const RIGHT: f64 = 14.0;
/// Between the map and its row of sums.
const SUM_GAP: f64 = 6.0;
const MARGIN: f64 = 24.0;
/// Maps stand side by side up to this width, one below the other beyond.
const MAX_WIDTH: f64 = 1280.0;

/// Text of the standalone figure. Classes, because on the page they follow the reader's colour scheme.
const STYLE: &str = "text{font-family:Inter,'Helvetica Neue',Helvetica,Arial,'Liberation Sans',sans-serif;\
fill:#1f2328}.h{font-size:20px;font-weight:600}.p{font-size:15px;font-weight:600}\
.m{font-size:12.5px;fill:#59636e}.a{font-size:12px;fill:#59636e}\
.c{font-size:12px;font-variant-numeric:tabular-nums}.k{fill:#111}.w{fill:#fff}.n{fill:#d8dee4}\
.l{stroke:#1f2328;stroke-width:1.5;stroke-dasharray:5 4;fill:none}";

/// A figure of all maps with title, colour scale and control: SVG without external resources, on a white ground.
pub fn svg(report: &NeedleReport) -> String {
    let cell = cell_width(report);
    let (w, h) = panel_size(report, cell);
    let n = report.grid.modes.len().max(1);
    let beside = if w * n as f64 + 2.0 * MARGIN <= MAX_WIDTH { n } else { 1 };
    let below = n.div_ceil(beside);
    // The title and the footer need some width of their own.
    let width = (w * beside as f64 + 2.0 * MARGIN).max(640.0);
    let shift = (width - w * beside as f64) / 2.0 - if beside == 1 { LEFT / 4.0 } else { 0.0 };
    let head = 84.0;
    let footers = footer_lines(report, width);
    let foot = 56.0 + 18.0 * footers.len() as f64;
    let height = head + h * below as f64 + foot;
    let title = format!("Needle in a haystack: {}", report.settings.model);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 \
         {width:.0} {height:.0}\" role=\"img\"><title>{0}</title><desc>{1}</desc><style>{STYLE}</style>\n<rect \
         width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#fff\"/>\n<text class=\"h\" x=\"{MARGIN}\" \
         y=\"40\">{0}</text>\n<text class=\"m\" x=\"{MARGIN}\" y=\"61\">{2}</text>\n",
        escape(&title),
        escape(&description(report)),
        escape(&subtitle(report)),
    );
    for (i, &mode) in report.grid.modes.iter().enumerate() {
        let (x, y) = (shift + w * (i % beside) as f64, head + h * (i / beside) as f64);
        let _ = writeln!(out, "<g transform=\"translate({x:.1} {y:.1})\">");
        panel(&mut out, report, mode, cell);
        out.push_str("</g>\n");
    }
    let y = head + h * below as f64;
    scale(&mut out, width / 2.0 - 110.0, y, 220.0);
    for (i, line) in footers.iter().enumerate() {
        let _ = writeln!(
            out,
            "<text class=\"m\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            width / 2.0,
            y + 56.0 + 18.0 * i as f64,
            escape(line)
        );
    }
    out.push_str("</svg>\n");
    out
}

/// One map as an SVG element for the page, which styles its classes.
pub(super) fn inline_panel(report: &NeedleReport, mode: LongContext) -> String {
    let cell = cell_width(report);
    let (w, h) = panel_size(report, cell);
    let label = format!("{}: {}", mode_title(mode), result_line(report, mode));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w:.0}\" height=\"{h:.0}\" viewBox=\"0 0 {w:.0} {h:.0}\" \
         role=\"img\" aria-label=\"{}\">\n",
        escape(&label)
    );
    panel(&mut out, report, mode, cell);
    out.push_str("</svg>\n");
    out
}

/// The colour scale as an SVG element for the page.
pub(super) fn inline_scale() -> String {
    let mut out =
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"270\" height=\"36\" viewBox=\"0 0 270 36\" \
                   role=\"img\" aria-label=\"Colour scale from 0 to 100 percent\">\n"
            .to_owned();
    scale(&mut out, 20.0, 2.0, 220.0);
    out.push_str("</svg>\n");
    out
}

/// What the numbers are, in one line.
pub(super) fn subtitle(report: &NeedleReport) -> String {
    let questions = match report.grid.instances {
        1 => "one question per cell, each about a fact of its own".to_owned(),
        n => format!("{n} questions per cell, each about a fact of its own"),
    };
    format!("Hidden facts retrieved, in percent; {questions}")
}

fn description(report: &NeedleReport) -> String {
    let lines: Vec<String> =
        report.grid.modes.iter().map(|&m| format!("{}: {}", mode_title(m), result_line(report, m))).collect();
    lines.join("; ")
}

fn result_line(report: &NeedleReport, mode: LongContext) -> String {
    report.totals.iter().find(|t| t.mode == mode).map_or_else(String::new, |t| {
        format!("{} of {} found ({} %)", t.score.found, t.score.total, percent(t.score.accuracy()))
    })
}

/// The control and the notes, broken to fit.
fn footer_lines(report: &NeedleReport, width: f64) -> Vec<String> {
    let most = ((width - 2.0 * MARGIN) / 6.3) as usize;
    let mut lines = Vec::new();
    for text in control_line(report).into_iter().chain(report.notes.iter().cloned()) {
        let mut line = String::new();
        for word in text.split_whitespace() {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > most {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines
}

/// Few columns are wider; many still hold their labels.
fn cell_width(report: &NeedleReport) -> f64 {
    let label = report.grid.lengths.iter().map(|&l| axis_label(l).chars().count()).max().unwrap_or(0);
    let least = (label as f64 * 6.8 + 6.0).max(34.0);
    (420.0 / report.grid.lengths.len().max(1) as f64).clamp(least, least.max(64.0))
}

/// Least width and height of the axes, so that their titles and the heading fit.
const LEAST: (f64, f64) = (200.0, CELL_HEIGHT * 4.0);

fn panel_size(report: &NeedleReport, cell: f64) -> (f64, f64) {
    let (columns, rows) = (report.grid.lengths.len() as f64, report.grid.depths.len() as f64);
    (LEFT + (cell * columns).max(LEAST.0) + RIGHT, TOP + (CELL_HEIGHT * rows).max(LEAST.1) + BOTTOM)
}

fn panel(out: &mut String, report: &NeedleReport, mode: LongContext, cell: f64) {
    let (lengths, depths) = (&report.grid.lengths, &report.grid.depths);
    let (width, height) = (cell * lengths.len() as f64, CELL_HEIGHT * depths.len() as f64);
    let _ = writeln!(
        out,
        "<text class=\"p\" x=\"{LEFT}\" y=\"16\">{}</text><text class=\"m\" x=\"{LEFT}\" y=\"35\">{}</text>",
        escape(mode_title(mode)),
        escape(&result_line(report, mode))
    );
    for (row, &depth) in depths.iter().enumerate() {
        let y = TOP + CELL_HEIGHT * row as f64;
        row_label(out, y, &depth.to_string());
        for (column, &length) in lengths.iter().enumerate() {
            let score = report.score(mode, length, depth);
            let hint = score.map_or_else(String::new, |s| {
                format!("{} tokens, depth {depth} %: {} of {} found", grouped(length), s.found, s.total)
            });
            square(out, LEFT + cell * column as f64, y, cell, score, &hint);
        }
    }
    let sums = TOP + height + SUM_GAP;
    row_label(out, sums, "all");
    for (column, &length) in lengths.iter().enumerate() {
        let score = report.lengths.iter().find(|s| s.mode == mode && s.length == length).map(|s| s.score);
        let hint = score.map_or_else(String::new, |s| {
            format!("{} tokens, all depths: {} of {} found", grouped(length), s.found, s.total)
        });
        let x = LEFT + cell * column as f64;
        square(out, x, sums, cell, score, &hint);
        let _ = writeln!(
            out,
            "<text class=\"a\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x + cell / 2.0,
            sums + CELL_HEIGHT + 17.0,
            axis_label(length)
        );
    }
    let center = LEFT + width / 2.0;
    let (center, anchor) = if width < 150.0 { (LEFT, "start") } else { (center, "middle") };
    let _ = writeln!(
        out,
        "<text class=\"m\" x=\"{center:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">Context length (tokens)</text>\n\
         <text class=\"m\" transform=\"translate(16 {:.1}) rotate(-90)\" text-anchor=\"middle\">Depth of the fact \
         (%)</text>",
        sums + CELL_HEIGHT + 38.0,
        TOP + height.max(LEAST.1 - TOP / 2.0) / 2.0
    );
    if let Some((before, window)) = window_column(report, mode) {
        let x = LEFT + cell * before as f64;
        // The label turns to the side where there is more of the map.
        let left = x > LEFT + width / 2.0;
        let (label, anchor) = if left { (x - 5.0, "end") } else { (x + 5.0, "start") };
        let _ = writeln!(
            out,
            "<path class=\"l\" d=\"M{x:.1} {:.1}V{:.1}\"/><text class=\"a\" x=\"{label:.1}\" y=\"{:.1}\" \
             text-anchor=\"{anchor}\">trained window: {}</text>",
            TOP - 16.0,
            sums + CELL_HEIGHT,
            TOP - 7.0,
            grouped(window)
        );
    }
}

fn row_label(out: &mut String, y: f64, text: &str) {
    let _ = writeln!(
        out,
        "<text class=\"a\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
        LEFT - 8.0,
        y + CELL_HEIGHT / 2.0 + 4.0
    );
}

fn square(out: &mut String, x: f64, y: f64, width: f64, score: Option<Score>, hint: &str) {
    let (fill, class, number) = match score {
        Some(score) => {
            let rgb = color(score.accuracy());
            let class = if black_text(rgb) { "k" } else { "w" };
            (format!("fill=\"{}\"", hex(rgb)), class, percent(score.accuracy()).to_string())
        }
        None => ("class=\"n\"".to_owned(), "k", "–".to_owned()),
    };
    let _ = writeln!(
        out,
        "<g><title>{}</title><rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\" {fill}/><text \
         class=\"c {class}\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{number}</text></g>",
        escape(hint),
        x + 0.5,
        y + 0.5,
        width - 1.0,
        CELL_HEIGHT - 1.0,
        x + width / 2.0,
        y + CELL_HEIGHT / 2.0 + 4.3
    );
}

fn scale(out: &mut String, x: f64, y: f64, width: f64) {
    out.push_str("<defs><linearGradient id=\"ramp\">");
    for (i, &rgb) in RAMP.iter().enumerate() {
        let _ = write!(out, "<stop offset=\"{}%\" stop-color=\"{}\"/>", i * 100 / (RAMP.len() - 1), hex(rgb));
    }
    let _ = writeln!(
        out,
        "</linearGradient></defs><rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"12\" rx=\"2\" \
         fill=\"url(#ramp)\"/>"
    );
    for (part, label) in [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 %")] {
        let _ = writeln!(
            out,
            "<text class=\"a\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            x + width * part,
            y + 28.0
        );
    }
}

fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

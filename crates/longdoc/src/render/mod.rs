//! Pictures of a needle report: heat maps for the terminal, a page, and a figure for papers and READMEs.
//!
//! Rows are depths from top to bottom, columns lengths from left to right, one map a mode. Colours run from red over
//! yellow to green; the number is printed in every cell, so that no one needs to tell colours apart.

mod figure;
mod page;
mod terminal;

use longhaul_engine::LongContext;

pub use figure::svg;
pub use page::html;
pub use terminal::{TerminalStyle, terminal};

use crate::needle::NeedleReport;

/// Red, orange, yellow, light green, green: ColorBrewer's diverging scheme RdYlGn.
const RAMP: [[u8; 3]; 5] = [[215, 48, 39], [252, 141, 89], [254, 224, 139], [145, 207, 96], [26, 152, 80]];

/// The colour of a share from 0 to 1.
fn color(share: f64) -> [u8; 3] {
    let at = share.clamp(0.0, 1.0) * (RAMP.len() - 1) as f64;
    let low = (at.floor() as usize).min(RAMP.len() - 2);
    let part = at - low as f64;
    let (a, b) = (RAMP.get(low).copied().unwrap_or_default(), RAMP.get(low + 1).copied().unwrap_or_default());
    std::array::from_fn(|i| {
        let (from, to) = (a.get(i).copied().unwrap_or_default(), b.get(i).copied().unwrap_or_default());
        (f64::from(from) + (f64::from(to) - f64::from(from)) * part).round() as u8
    })
}

/// Whether black reads better on a colour than white (WCAG 2 contrast); the better one always reaches 4.5 : 1.
fn black_text(rgb: [u8; 3]) -> bool {
    let [r, g, b] = rgb.map(|c| {
        let c = f64::from(c) / 255.0;
        if c <= 0.040_45 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
    });
    let luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05)
}

/// The name of a mode in headings.
fn mode_title(mode: LongContext) -> &'static str {
    match mode {
        LongContext::None => "Plain RoPE",
        LongContext::Yarn => "YaRN",
        LongContext::Dca => "Dual Chunk Attention",
    }
}

/// 6144 -> `6,144`.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A length on an axis: `6,144`, `8K` (of 1,024), `100,000`.
fn axis_label(tokens: usize) -> String {
    if tokens >= 8192 && tokens.is_multiple_of(1024) {
        format!("{}K", tokens / 1024)
    } else {
        grouped(tokens)
    }
}

/// Whole percent, but 100 only for all and 0 only for none.
fn percent(share: f64) -> u8 {
    let rounded = (share * 100.0).round().clamp(0.0, 100.0) as u8;
    match rounded {
        100 if share < 1.0 => 99,
        0 if share > 0.0 => 1,
        other => other,
    }
}

/// Text for HTML and XML, in content and in quoted attributes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // XML 1.0 has no place for these, not even escaped.
            '\0'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => {
                out.push('\u{fffd}')
            }
            c => out.push(c),
        }
    }
    out
}

/// Where the dashed line of the trained window goes: the number of columns before it, and the window. `None` when all
/// lengths lie inside the window.
fn window_column(report: &NeedleReport, mode: LongContext) -> Option<(usize, usize)> {
    let window = report.modes.iter().find(|m| m.mode == mode)?.trained_window;
    let before = report.grid.lengths.iter().filter(|&&l| l <= window).count();
    (before < report.grid.lengths.len()).then_some((before, window))
}

/// What the control found, in words; `None` without one.
fn control_line(report: &NeedleReport) -> Option<String> {
    let parts: Vec<String> = report
        .totals
        .iter()
        .filter_map(|t| t.control.map(|c| format!("{}: {} of {}", t.mode, c.found, c.total)))
        .collect();
    (!parts.is_empty()).then(|| format!("Control, answered right without the needle: {}.", parts.join(", ")))
}

#[cfg(test)]
mod tests;

//! The report as one HTML page: no script, nothing loaded, light and dark by the reader's scheme.

use std::fmt::Write;

use super::figure::{inline_panel, inline_scale, subtitle};
use super::{control_line, escape, grouped, mode_title, percent};
use crate::needle::{NeedleReport, Score};

const CSS: &str = include_str!("page.css");
/// Missed questions that are shown.
const MISSES: usize = 20;
/// Characters of a missed answer that are shown.
const ANSWER: usize = 300;

/// The page. Everything that comes from outside — model, haystack, templates, answers — is escaped.
pub fn html(report: &NeedleReport) -> String {
    let title = escape(&format!("Needle in a haystack: {}", report.settings.model));
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\">\n<title>{title}</title>\n<style>\n{CSS}</style>\n</head>\n\
         <body>\n<h1>{title}</h1>\n<p class=\"soft\">{}.</p>\n<div class=\"maps\">\n",
        escape(&subtitle(report))
    );
    for &mode in &report.grid.modes {
        let _ = writeln!(out, "<figure>{}</figure>", inline_panel(report, mode));
    }
    let _ = writeln!(out, "</div>\n{}", inline_scale());
    for line in control_line(report).iter().chain(&report.notes) {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(line));
    }
    lengths(&mut out, report);
    misses(&mut out, report);
    settings(&mut out, report);
    out.push_str("</body>\n</html>\n");
    out
}

fn score(score: Score) -> String {
    format!("{} % ({} of {})", percent(score.accuracy()), score.found, score.total)
}

/// Found and speed per length; one group of columns a mode.
fn lengths(out: &mut String, report: &NeedleReport) {
    let columns = if report.grid.control { 3 } else { 2 };
    out.push_str(
        "<h2>By length</h2>\n<div class=\"scroll\"><table>\n<thead>\n<tr><th rowspan=\"2\" scope=\"col\">Tokens</th>",
    );
    for &mode in &report.grid.modes {
        let _ = write!(out, "<th colspan=\"{columns}\" scope=\"colgroup\">{}</th>", escape(mode_title(mode)));
    }
    out.push_str("</tr>\n<tr>");
    for _ in &report.grid.modes {
        out.push_str("<th scope=\"col\">found</th>");
        if report.grid.control {
            out.push_str("<th scope=\"col\">control</th>");
        }
        out.push_str("<th scope=\"col\">prefill tokens/s</th>");
    }
    out.push_str("</tr>\n</thead>\n<tbody>\n");
    for &length in &report.grid.lengths {
        let _ = write!(out, "<tr><th scope=\"row\">{}</th>", grouped(length));
        for &mode in &report.grid.modes {
            let Some(sum) = report.lengths.iter().find(|s| s.mode == mode && s.length == length) else {
                continue;
            };
            let _ = write!(out, "<td>{}</td>", score(sum.score));
            if let Some(control) = sum.control {
                let _ = write!(out, "<td>{} of {}</td>", control.found, control.total);
            }
            let _ = write!(out, "<td>{}</td>", grouped(sum.prefill_tok_s.round() as usize));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("<tr><th scope=\"row\">all</th>");
    for total in &report.totals {
        let _ = write!(out, "<td>{}</td>", score(total.score));
        if let Some(control) = total.control {
            let _ = write!(out, "<td>{} of {}</td>", control.found, control.total);
        }
        out.push_str("<td></td>");
    }
    out.push_str("</tr>\n</tbody>\n</table></div>\n");
}

/// What the model said where it did not find the fact.
fn misses(out: &mut String, report: &NeedleReport) {
    let missed: Vec<_> = report.cells.iter().filter(|c| !c.found && !c.control).collect();
    if missed.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<h2>Missed</h2>\n<p class=\"soft\">{}</p>\n<div class=\"scroll\"><table class=\"text\">\n\
         <thead><tr><th scope=\"col\">Mode</th><th scope=\"col\">Tokens</th><th scope=\"col\">Depth</th><th \
         scope=\"col\">Question</th><th scope=\"col\">Expected</th><th scope=\"col\">Answer</th></tr></thead>\n<tbody>\n",
        match missed.len() {
            1 => "One question.".to_owned(),
            n if n <= MISSES => format!("{n} questions."),
            n => format!("The first {MISSES} of {n} questions."),
        }
    );
    for cell in missed.iter().take(MISSES) {
        let mut answer: String = cell.answer.chars().take(ANSWER).collect();
        if answer.len() < cell.answer.len() {
            answer.push('…');
        }
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{} %</td><td class=\"words\">{}</td><td class=\"words\">{}</td><td \
             class=\"words\">{}</td></tr>",
            cell.mode,
            grouped(cell.length),
            cell.depth,
            escape(&cell.question),
            escape(&cell.expected.join(", ")),
            escape(&answer)
        );
    }
    out.push_str("</tbody>\n</table></div>\n");
}

fn settings(out: &mut String, report: &NeedleReport) {
    let s = &report.settings;
    let haystack_tokens = report.modes.first().map_or(0, |m| m.haystack_tokens);
    let rows = [
        ("Model", s.model.clone()),
        ("Needle", s.needle.clone()),
        ("Question", s.question.clone()),
        ("Found when the answer contains", s.expect.join(", ")),
        (
            "Length",
            "tokens of the whole prompt, template and question included, answer not included".to_owned(),
        ),
        (
            "Depth",
            "percent of the haystack's tokens before the fact, back to the end of a sentence".to_owned(),
        ),
        (
            "Haystack",
            format!(
                "{}: {} bytes, {} tokens",
                s.haystack,
                grouped(s.haystack_bytes),
                grouped(haystack_tokens)
            ),
        ),
        ("Haystack hash (FNV-1a)", s.haystack_hash.clone()),
        ("Questions per cell", report.grid.instances.to_string()),
        ("Most tokens of an answer", s.max_tokens.to_string()),
        ("Sampling", "greedy".to_owned()),
        ("Seed", s.seed.to_string()),
    ];
    out.push_str("<h2>Settings</h2>\n<dl>\n");
    for (name, value) in rows {
        let _ = writeln!(out, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(&value));
    }
    for info in &report.modes {
        let _ = writeln!(
            out,
            "<dt>{}</dt><dd>trained window {} tokens, context {} tokens</dd>",
            escape(mode_title(info.mode)),
            grouped(info.trained_window),
            grouped(info.max_model_len)
        );
    }
    out.push_str("</dl>\n");
}

use super::*;
use crate::needle::{Cell, Grid, ModeInfo, NeedleConfig, NeedleReport};

/// A report of the given size, with control: `dca` finds everything; other modes find what stands within the trained
/// window of 768 tokens, or in rows far enough down.
fn report(
    lengths: &[usize],
    depths: usize,
    modes: &[LongContext],
    model: &str,
    answer: &str,
) -> NeedleReport {
    let depth = |d: usize| if depths == 1 { 50.0 } else { (d * 100) as f32 / (depths - 1) as f32 };
    let depths: Vec<f32> = (0..depths).map(depth).collect();
    let config = NeedleConfig { model: model.into(), haystack: "text".into(), ..NeedleConfig::default() };
    let info = |&mode: &LongContext| ModeInfo {
        mode,
        trained_window: 768,
        max_model_len: 65_536,
        haystack_tokens: 150_000,
    };
    let mut cells = Vec::new();
    for &mode in modes {
        for &length in lengths {
            for (row, &depth) in depths.iter().enumerate() {
                for control in [false, true] {
                    let seen = mode == LongContext::Dca || length <= 768 || (row + 1) * 1500 > length;
                    cells.push(Cell {
                        mode,
                        length,
                        depth,
                        instance: 0,
                        control,
                        prompt_tokens: length,
                        needle_position_tokens: None,
                        question: "What is the secret code of Oslo?".into(),
                        expected: vec!["48213".into()],
                        answer: answer.into(),
                        found: seen && !control,
                        prefill_seconds: 1.0,
                        prefill_tok_s: length as f64,
                    });
                }
            }
        }
    }
    let grid = Grid { modes: modes.to_vec(), lengths: lengths.to_vec(), depths, instances: 1, control: true };
    NeedleReport::new(config.settings(), grid, modes.iter().map(info).collect(), cells)
}

const BOTH: [LongContext; 2] = [LongContext::None, LongContext::Dca];

fn large() -> NeedleReport {
    report(&[512, 768, 1536, 3072, 6144], 11, &BOTH, "demo", "I do not know.")
}

/// Every element that is opened is closed, in order: what an XML parser would complain about first.
fn assert_well_formed(text: &str) {
    let mut open = Vec::new();
    for part in text.split('<').skip(1) {
        let (tag, _) = part.split_once('>').unwrap();
        if tag.starts_with('!') || tag.ends_with('/') || tag.starts_with("meta") {
            continue;
        }
        let name = tag.split_whitespace().next().unwrap();
        match name.strip_prefix('/') {
            Some(closed) => assert_eq!(open.pop(), Some(closed), "in {text}"),
            None => open.push(name),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn figure_and_page_hold_every_cell() {
    for report in
        [large(), report(&[1024], 1, &[LongContext::Dca], "m", "x"), report(&[4096], 11, &BOTH, "m", "x")]
    {
        let cells = report.grid.modes.len() * report.grid.lengths.len() * (report.grid.depths.len() + 1);
        for text in [svg(&report), html(&report)] {
            assert_eq!(text.matches("class=\"c ").count(), cells);
            assert_well_formed(&text);
            assert!(!text.contains("NaN"));
        }
    }
}

#[test]
fn nothing_is_loaded() {
    for text in [html(&large()), svg(&large())] {
        for foreign in ["<script", "<link", "src=", "@import", "url(h", "href="] {
            assert!(!text.contains(foreign), "{foreign}");
        }
        assert_eq!(text.matches("://").count(), text.matches("xmlns=\"http://www.w3.org/2000/svg\"").count());
    }
}

#[test]
fn the_page_has_both_schemes_and_all_sums() {
    let page = html(&large());
    assert!(page.contains("prefers-color-scheme:dark"));
    assert!(page.contains("Control, answered right without the needle: none: 0 of 55, dca: 0 of 55."));
    assert!(page.contains("<td>100 % (11 of 11)</td><td>0 of 11</td><td>768</td>"));
    assert!(page.contains("I do not know."));
}

#[test]
fn what_comes_from_outside_is_escaped() {
    let evil = "<script>alert('x')</script>&\"\u{1}";
    let mut report = report(&[512, 4096], 3, &BOTH, evil, evil);
    report.settings.needle = format!("{evil} {{code}}");
    report.settings.question = evil.into();
    report.settings.expect = vec![evil.into()];
    report.settings.haystack = evil.into();
    report.notes = vec![evil.into()];
    for cell in &mut report.cells {
        cell.question = evil.into();
        cell.expected = vec![evil.into()];
    }
    for text in [html(&report), svg(&report)] {
        assert!(!text.contains("<script") && !text.contains("alert('x')") && !text.contains('\u{1}'));
        assert!(text.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&quot;\u{fffd}"));
        assert_well_formed(&text);
    }
}

#[test]
fn the_terminal_without_colour_prints_shades_and_numbers() {
    let report = report(&[512, 768, 4096], 3, &BOTH, "demo", "x");
    let text = terminal(&report, TerminalStyle { color: false, width: 80 });
    let expected = "\
Plain RoPE (none)  78 % found (7 of 9)
 depth  512   768  |4,096
   0 % █ 100 █ 100 | ·   0
  50 % █ 100 █ 100 | ·   0
 100 % █ 100 █ 100 | █ 100
   all █ 100 █ 100 | ░  33
        tokens of the prompt; % of answers found
        | is the trained window of 768 tokens
";
    let squeezed = |s: &str| s.split([' ', '|']).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
    assert!(squeezed(&text).starts_with(&squeezed(expected)), "{text}");
    let columns: Vec<_> = text.lines().take(6).skip(1).map(|l| l.chars().position(|c| c == '|')).collect();
    assert!(columns[0].is_some() && columns.iter().all(|c| *c == columns[0]), "{text}");
    assert!(!text.contains('\x1b'));
    assert!(text.ends_with("Control, answered right without the needle: none: 0 of 9, dca: 0 of 9.\n"));
}

#[test]
fn the_terminal_uses_24_bit_colour() {
    let text = terminal(
        &report(&[1024], 1, &[LongContext::Dca], "m", "x"),
        TerminalStyle { color: true, width: 80 },
    );
    assert!(text.contains("\x1b[48;2;26;152;80m\x1b[38;2;0;0;0m 100  \x1b[0m"), "{text:?}");
}

#[test]
fn wide_maps_are_broken() {
    let lengths: Vec<usize> = (1..=16).map(|i| i * 8192).collect();
    let report = report(&lengths, 11, &[LongContext::Dca], "m", "x");
    for width in [20, 40, 80, 200] {
        let text = terminal(&report, TerminalStyle { color: false, width });
        let heads: Vec<&str> = text.lines().filter(|l| l.contains("depth")).collect();
        let rows = text.lines().filter(|l| l.contains('█'));
        assert!(rows.chain(heads.iter().copied()).all(|l| l.chars().count() <= width), "{text}");
        assert_eq!(heads.iter().map(|l| l.split_whitespace().count() - 1).sum::<usize>(), 16);
    }
}

#[test]
fn colours_run_from_red_to_green_and_text_is_readable() {
    assert_eq!((color(0.0), color(0.5), color(1.0)), ([215, 48, 39], [254, 224, 139], [26, 152, 80]));
    assert_eq!((color(-1.0), color(7.0)), (color(0.0), color(1.0)));
    assert!(!black_text([0, 0, 0]) && black_text([255, 255, 255]) && black_text(color(0.5)));
}

#[test]
fn labels_and_percentages() {
    assert_eq!([768, 6144, 8192, 100_000].map(axis_label), ["768", "6,144", "8K", "100,000"]);
    assert_eq!(grouped(1_234_567), "1,234,567");
    assert_eq!([0.0, 0.001, 0.5, 0.999, 1.0].map(percent), [0, 1, 50, 99, 100]);
}

#[test]
fn the_window_is_marked_where_it_lies() {
    assert_eq!(window_column(&large(), LongContext::Dca), Some((2, 768)));
    assert_eq!(window_column(&report(&[256, 512], 1, &BOTH, "m", "x"), LongContext::Dca), None);
    assert!(svg(&large()).contains("trained window: 768"));
}

/// Writes samples to look at: `LONGDOC_SAMPLES=DIR cargo test -p longhaul-longdoc samples -- --ignored`.
#[test]
#[ignore = "writes pictures to look at"]
fn samples() {
    let dir = std::path::PathBuf::from(std::env::var_os("LONGDOC_SAMPLES").unwrap());
    let long: Vec<usize> = (1..=16).map(|i| i * 8192).collect();
    let all = [LongContext::None, LongContext::Yarn, LongContext::Dca];
    let samples = [
        ("demo", large()),
        ("long", report(&long, 11, &all, "Qwen2-72B-Instruct", "x")),
        ("one", report(&[1024], 1, &[LongContext::Dca], "demo", "x")),
    ];
    for (name, report) in samples {
        report.write(&dir.join(name)).unwrap();
        let text = terminal(&report, TerminalStyle { color: true, width: 100 });
        std::fs::write(dir.join(name).join("needle.ansi"), text).unwrap();
    }
}

//! Whole runs on a model that reads its prompt, and on one that only sees its end.

use std::cell::RefCell;
use std::fs;
use std::rc::Rc;

use super::*;
use crate::testing::SearchModel;

const WINDOW: usize = 300;

fn config() -> NeedleConfig {
    NeedleConfig {
        model: "search".into(),
        lengths: vec![200, 400, 800],
        depths: vec![0.0, 50.0, 100.0],
        modes: vec![LongContext::None, LongContext::Dca],
        haystack: (0..80).map(|i| format!("On day {i} they walked, and nobody spoke. ")).collect(),
        control: true,
        ..NeedleConfig::default()
    }
}

/// `none` sees the last `WINDOW` tokens, `dca` everything; counts the models opened.
fn opener(
    opened: &mut Vec<LongContext>,
    fails_after: Option<usize>,
) -> impl FnMut(LongContext) -> std::result::Result<Box<dyn Generate>, EngineError> {
    move |mode| {
        opened.push(mode);
        let mut model = SearchModel::new(mode);
        model.sees = (mode == LongContext::None).then_some(WINDOW);
        model.fails_after = fails_after;
        Ok(Box::new(model))
    }
}

fn run_all(config: &NeedleConfig, output: Option<&NeedleOutput>) -> Result<NeedleReport> {
    run(config, output, &mut opener(&mut Vec::new(), None), &mut ())
}

fn output(dir: &tempfile::TempDir) -> NeedleOutput {
    NeedleOutput { dir: dir.path().join("run"), overwrite: false }
}

#[test]
fn a_model_that_sees_only_the_end_fails_at_the_cells_beyond_it() {
    let report = run_all(&config(), None).unwrap();
    let found = |mode, length, depth| report.score(mode, length, depth).unwrap().found == 1;
    for length in [200, 400, 800] {
        for depth in [0.0, 50.0, 100.0] {
            assert!(found(LongContext::Dca, length, depth));
            // The needle stands about (100 − depth) % of the length before the end.
            let seen = length as f32 * (1.0 - depth / 100.0) < WINDOW as f32 - 30.0;
            assert_eq!(found(LongContext::None, length, depth), seen, "{length} tokens, {depth} %");
        }
    }
    assert_eq!(report.totals[0].score, Score { found: 6, total: 9 });
    assert_eq!(report.totals[1].score, Score { found: 9, total: 9 });
    let none_800 = report.lengths.iter().find(|s| s.mode == LongContext::None && s.length == 800).unwrap();
    assert_eq!(none_800.score, Score { found: 1, total: 3 });
    assert!((none_800.prefill_tok_s - 1000.0).abs() < 1e-6);
}

#[test]
fn controls_are_counted_apart_and_find_nothing() {
    let report = run_all(&config(), None).unwrap();
    let controls: Vec<&Cell> = report.cells.iter().filter(|c| c.control).collect();
    assert_eq!(controls.len(), 18);
    assert!(controls.iter().all(|c| !c.found && c.needle_position_tokens.is_none()));
    assert!(report.totals.iter().all(|t| t.control == Some(Score { found: 0, total: 9 })));
    // The twin with the needle is longer by about the needle.
    for pair in report.cells.chunks(2) {
        let (with, without) = (&pair[0], &pair[1]);
        assert_eq!(
            (with.length, with.depth, with.control, without.control),
            (without.length, without.depth, false, true)
        );
        assert!((10..40).contains(&(with.prompt_tokens - without.prompt_tokens)));
    }
    let without = run_all(&NeedleConfig { control: false, ..config() }, None).unwrap();
    assert!(without.cells.iter().all(|c| !c.control) && without.totals[0].control.is_none());
}

#[test]
fn a_control_that_finds_the_answer_is_reported() {
    let mut report = run_all(&config(), None).unwrap();
    for cell in report.cells.iter_mut().filter(|c| c.control && c.length == 200 && c.mode == LongContext::Dca)
    {
        cell.found = true;
    }
    let report = NeedleReport::new(report.settings, report.grid, report.modes, report.cells);
    assert_eq!(report.totals[1].control, Some(Score { found: 3, total: 9 }));
    assert!(report.notes.iter().any(|n| n.contains("Control failed for dca: 3 of 9")), "{:?}", report.notes);
    assert_eq!(report.totals[1].score, Score { found: 9, total: 9 });
}

#[test]
fn cells_come_by_mode_and_ascending_length_and_fit() {
    let report = run_all(&config(), None).unwrap();
    let order: Vec<_> = report.cells.iter().map(|c| (c.mode == LongContext::Dca, c.length)).collect();
    assert!(order.is_sorted());
    for cell in report.cells.iter().filter(|c| !c.control) {
        assert!(cell.prompt_tokens <= cell.length && cell.prompt_tokens + 3 >= cell.length);
    }
    // Both modes read the same prompts.
    let prompts = Rc::new(RefCell::new(Vec::new()));
    let keep = Rc::clone(&prompts);
    let mut open = move |mode| {
        let mut model = SearchModel::new(mode);
        model.prompts = Rc::clone(&keep);
        Ok(Box::new(model) as Box<dyn Generate>)
    };
    run(&config(), None, &mut open, &mut ()).unwrap();
    let prompts = prompts.borrow();
    let (first, second) = prompts.split_at(prompts.len() / 2);
    assert_eq!(first, second);
}

#[test]
fn instances_read_different_stretches() {
    let prompts = Rc::new(RefCell::new(Vec::new()));
    let keep = Rc::clone(&prompts);
    let mut open = move |mode| {
        let mut model = SearchModel::new(mode);
        model.prompts = Rc::clone(&keep);
        Ok(Box::new(model) as Box<dyn Generate>)
    };
    let config = NeedleConfig {
        lengths: vec![200],
        depths: vec![100.0],
        instances: 3,
        control: false,
        modes: vec![LongContext::Dca],
        ..config()
    };
    run(&config, None, &mut open, &mut ()).unwrap();
    let starts: std::collections::HashSet<String> =
        prompts.borrow().iter().map(|p| p.chars().take(60).collect()).collect();
    assert_eq!(starts.len(), 3);
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let output = output(&dir);
    let whole = run_all(&config(), None).unwrap();
    for cut in [3, 4, 7] {
        let mut opened = Vec::new();
        let error = run(&config(), Some(&output), &mut opener(&mut opened, Some(cut)), &mut ()).unwrap_err();
        assert!(error.to_string().contains("interrupted"));
        assert_eq!(opened, [LongContext::None]);
    }
    struct Watch(Vec<Progress>);
    impl NeedleObserver for Watch {
        fn cell_finished(&mut self, _: &Cell, progress: &Progress) {
            self.0.push(*progress);
        }
    }
    let mut watch = Watch(Vec::new());
    let mut opened = Vec::new();
    let resumed = run(&config(), Some(&output), &mut opener(&mut opened, None), &mut watch).unwrap();
    assert_eq!(resumed, whole);
    assert_eq!((watch.0[0].done, watch.0[0].resumed, watch.0[0].total), (15, 14, 36));
    let last = watch.0.last().unwrap();
    assert_eq!((last.done, last.tokens_left), (36, 0));
    // What was written can be read back.
    let json = fs::read(output.dir.join("report.json")).unwrap();
    assert_eq!(serde_json::from_slice::<NeedleReport>(&json).unwrap(), whole);
    // A finished run opens no model.
    let mut opened = Vec::new();
    assert_eq!(run(&config(), Some(&output), &mut opener(&mut opened, None), &mut ()).unwrap(), whole);
    assert!(opened.is_empty());
}

#[test]
fn a_torn_last_line_is_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let output = output(&dir);
    let whole = run_all(&config(), Some(&output)).unwrap();
    let path = output.dir.join("results.jsonl");
    let full = fs::read(&path).unwrap();
    for missing in [1, 2, 40, 500] {
        fs::write(&path, &full[..full.len() - missing]).unwrap();
        assert_eq!(run_all(&config(), Some(&output)).unwrap(), whole);
        assert_eq!(fs::read(&path).unwrap(), full);
    }
    // Only the settings, cut off.
    fs::write(&path, &full[..30]).unwrap();
    assert_eq!(run_all(&config(), Some(&output)).unwrap(), whole);
}

#[test]
fn other_settings_and_foreign_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut output = output(&dir);
    run_all(&config(), Some(&output)).unwrap();
    let path = output.dir.join("results.jsonl");
    let before = fs::read(&path).unwrap();
    let other = NeedleConfig { seed: 9, haystack: "Other text. More of it.".into(), ..config() };
    let error = run_all(&other, Some(&output)).unwrap_err().to_string();
    for part in ["seed: 0 there, 9 here", "haystack_hash", "--overwrite"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(fs::read(&path).unwrap(), before);
    // A larger grid is no other setting: what is there is kept.
    let larger = NeedleConfig { lengths: vec![200, 400, 600, 800], ..config() };
    let mut opened = Vec::new();
    let report = run(&larger, Some(&output), &mut opener(&mut opened, None), &mut ()).unwrap();
    assert_eq!(report, run_all(&larger, None).unwrap());
    output.overwrite = true;
    assert_eq!(run_all(&other, Some(&output)).unwrap().settings.seed, 9);
    output.overwrite = false;
    for foreign in ["my notes\n", "my notes", "{\"cell\":1}\n{}\n"] {
        fs::write(&path, foreign).unwrap();
        let error = run_all(&config(), Some(&output)).unwrap_err();
        assert!(matches!(error, LongdocError::Results { line: 1, .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), foreign);
    }
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let output = output(&dir);
    let _first = Store::open(&output, &config().settings()).unwrap();
    assert!(matches!(run_all(&config(), Some(&output)), Err(LongdocError::Locked { .. })));
}

#[test]
fn lengths_beyond_the_context_are_refused_before_any_question() {
    let mut open = |mode| {
        let mut model = SearchModel::new(mode);
        model.max_model_len = 800;
        model.fails_after = Some(0);
        Ok(Box::new(model) as Box<dyn Generate>)
    };
    let error = run(&config(), None, &mut open, &mut ()).unwrap_err().to_string();
    for part in ["800 tokens", "up to 32", "holds 800", "--max-model-len"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_repeated_haystack_is_noted() {
    assert!(run_all(&config(), None).unwrap().notes.is_empty());
    let short = NeedleConfig { haystack: "They walked on. Nobody spoke.".into(), ..config() };
    let report = run_all(&short, None).unwrap();
    assert!(report.notes[0].contains("repeat"), "{:?}", report.notes);
    assert_eq!(report.totals[1].score, Score { found: 9, total: 9 });
}

#[test]
fn a_fact_without_places_works_too() {
    let config = NeedleConfig {
        needle: "The secret code of Oslo is 48213.".into(),
        question: "What is the secret code of Oslo?".into(),
        expect: vec!["48213".into(), "oslo".into()],
        ..config()
    };
    let report = run_all(&config, None).unwrap();
    assert_eq!(report.totals[1].score, Score { found: 9, total: 9 });
}

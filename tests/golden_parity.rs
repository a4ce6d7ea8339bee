//! `longhaul logits` and `longhaul generate` against what transformers computes in float64 (the DCA oracle for
//! `dense-dca*`), for every chunking.
//!
//! `LONGHAUL_GOLDENS` may name a directory with further cases of the same layout.

mod common;

use std::path::PathBuf;

use common::{json_output, logits, longhaul};
use longhaul_testkit::{Golden, assert_close, golden_cases};
use serde_json::Value;

/// max|Δlogits| / max|logits| in f32.
const TOLERANCE: f32 = 2e-4;
const CHUNKS: [Option<usize>; 4] = [Some(1), Some(7), Some(64), None];

fn cases() -> Vec<PathBuf> {
    let mut cases = golden_cases();
    assert!(cases.len() >= 8, "only {} golden cases", cases.len());
    if let Ok(dir) = std::env::var("LONGHAUL_GOLDENS") {
        let more = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("LONGHAUL_GOLDENS={dir}: {e}"));
        cases.extend(more.map(|e| e.unwrap().path()).filter(|p| p.join("golden.safetensors").is_file()));
    }
    cases
}

/// Ids that `longhaul generate` adds to a golden's prompt, on the CPU.
fn continuation(golden: &Golden, chunk: Option<usize>, extra: &[&str]) -> Vec<u32> {
    let ids = common::ids_file(&golden.input_ids);
    let mut command = longhaul();
    command.args(["generate", "--ignore-eos", "--json", "--device", "cpu"]).args(extra);
    command.arg("--model").arg(&golden.dir).arg("--ids-file").arg(ids.path());
    command.args(["--max-tokens", &golden.greedy.len().to_string()]);
    if let Some(chunk) = chunk {
        command.args(["--chunk", &chunk.to_string()]);
    }
    let output = json_output(&mut command);
    assert_eq!(output["finish_reason"], Value::from("length"));
    serde_json::from_value(output["ids"].clone()).unwrap()
}

#[test]
fn logits_match_for_every_chunking() {
    for case in cases() {
        let golden = Golden::load(&case);
        let mut whole: Option<Vec<f32>> = None;
        for chunk in CHUNKS.into_iter().rev() {
            let (shape, values) = logits(&golden, chunk, &[]);
            assert_eq!(shape, [golden.input_ids.len(), golden.vocab]);
            assert_close(&format!("{} chunk {chunk:?}", golden.name), &values, &golden.logits, TOLERANCE);
            // Stronger than the tolerance: the split of a prompt changes no bit.
            match &whole {
                None => whole = Some(values),
                Some(whole) => assert!(values == *whole, "{} chunk {chunk:?}: bits differ", golden.name),
            }
        }
    }
}

#[test]
fn greedy_continuations_match_token_for_token() {
    for case in cases() {
        let golden = Golden::load(&case);
        for chunk in CHUNKS {
            let got = continuation(&golden, chunk, &["--temperature", "0"]);
            assert_eq!(got, golden.greedy, "{} chunk {chunk:?}", golden.name);
        }
    }
}

/// Rounding activations to bf16 (`--dtype bfloat16`) costs what bf16 costs, no more.
#[test]
fn bfloat16_products_stay_within_bfloat16() {
    for case in cases() {
        let golden = Golden::load(&case);
        let (_, values) = logits(&golden, None, &["--dtype", "bfloat16"]);
        assert_close(&format!("{} bfloat16", golden.name), &values, &golden.logits, 4e-2);
    }
}

/// The goldens would not notice a mode that is silently ignored: forcing another one must change the result.
#[test]
fn the_long_context_mode_matters() {
    for name in ["dense-dca", "dense-dca-scaled", "dense-yarn"] {
        let case = longhaul_testkit::goldens_dir().join(name);
        let golden = Golden::load(&case);
        let (_, values) = logits(&golden, None, &["--long-context", "none", "--max-model-len", "1024"]);
        let (error, _) = longhaul_testkit::max_relative_to_max(name, &values, &golden.logits);
        assert!(error > 10.0 * TOLERANCE, "{name}: plain RoPE gives the same logits ({error:e})");
    }
}

/// `--tp`: any number of ranks, more than there are heads included, gives one rank's answer. Chunkings rotate, so that every
/// case runs with every number of ranks, and every number of ranks with every chunking.
#[test]
fn tensor_parallel_ranks_give_one_answer() {
    for (index, case) in cases().into_iter().enumerate() {
        let golden = Golden::load(&case);
        for (rotation, tp) in ["1", "2", "3", "4", "5", "7", "8", "16"].into_iter().enumerate() {
            let chunk = |shift: usize| CHUNKS[(index + rotation + shift) % CHUNKS.len()];
            let (_, values) = logits(&golden, chunk(0), &["--tp", tp]);
            let name = format!("{} --tp {tp} chunk {:?}", golden.name, chunk(0));
            assert_close(&name, &values, &golden.logits, TOLERANCE);
            let mut extra = vec!["--temperature", "0", "--tp", tp];
            if golden.name.starts_with("moe") {
                extra.push("--expert-parallel");
            }
            let got = continuation(&golden, chunk(1), &extra);
            assert_eq!(got, golden.greedy, "{} {extra:?} chunk {:?}", golden.name, chunk(1));
        }
    }
}

/// Ranks draw one token from their slices of the vocabulary, whatever the rules: that of a single rank.
#[test]
fn seeded_draws_are_the_same_over_any_number_of_ranks() {
    let golden = Golden::load(&longhaul_testkit::goldens_dir().join("dense-tied"));
    let rules: [&[&str]; 4] = [
        &["--temperature", "0.8", "--top-p", "0.9"],
        &["--temperature", "1.5"],
        &["--temperature", "1", "--top-k", "40", "--min-p", "0.02"],
        &["--temperature", "0", "--repetition-penalty", "1.3", "--frequency-penalty", "0.5"],
    ];
    let mut all = Vec::new();
    for rules in rules {
        let draw = |tp| continuation(&golden, None, &[rules, &["--seed", "7", "--tp", tp]].concat());
        let one = draw("1");
        for tp in ["3", "16"] {
            assert_eq!(draw(tp), one, "{rules:?} --tp {tp}");
        }
        all.push(one);
    }
    // The rules are not ignored: each gives another text.
    all.push(golden.greedy.clone());
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 5, "{all:?}");
}

#[test]
fn a_group_that_cannot_be_is_refused() {
    let run = |extra: &[&str]| {
        let ids = common::ids_file(&[1, 2]);
        let mut command = longhaul();
        command.args(["generate", "--max-tokens", "1", "--ids-file"]).arg(ids.path()).args(extra);
        common::fail(&mut command)
    };
    // What there is to sum over, and where.
    let (code, message) = run(&["--tp", "2", "--device", "cpu", "--all-reduce", "peer"]);
    assert_eq!(code, 64, "{message}");
    assert!(message.contains("--all-reduce") && message.contains("CUDA devices"), "{message}");
    let (code, message) = run(&["--device", "emulated", "--all-reduce", "host"]);
    assert_eq!(code, 64, "{message}");
    assert!(message.contains("--all-reduce") && message.contains("--tp 2"), "{message}");
    let (code, message) = run(&["--tp", "2", "--device", "emulated", "--all-reduce", "nccl"]);
    assert_eq!(code, 69, "{message}");
    assert!(message.contains("--all-reduce nccl") && message.contains("host"), "{message}");
    let (code, message) = run(&["--expert-parallel"]);
    assert_eq!(code, 64, "{message}");
    assert!(message.contains("no experts"), "{message}");
    assert_eq!(run(&["--tp", "0"]).0, 2);
}

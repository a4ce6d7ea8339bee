//! The whole GPU path without a GPU: `--device emulated` runs the CUDA kernels on the CPU.

mod common;

use common::{fail, ids_file, json_output, logits_on, longhaul, succeed};
use longhaul_testkit::{Golden, assert_close, golden_cases, goldens_dir};

/// max|Δlogits| / max|logits| with bf16 activations and KV cache; see `Golden::assert_close_in_bf16` about router ties.
const BF16_TOLERANCE: f32 = 4e-2;
/// With f32 activations, weights and KV cache.
const F32_TOLERANCE: f32 = 1e-3;

/// With an fp8 KV cache whose scales are 1. e4m3 keeps three bits of mantissa, fewer below 2^-6, where many values of these small
/// random checkpoints lie: 0.10 to 0.20 were found over the goldens. `crates/cuda/tests` hold the kernels to float64 over the
/// rounded cache.
const FP8_CACHE_TOLERANCE: f32 = 2.5e-1;

/// Every golden, whole and chunked, with eager and lazy copies: each run takes another schedule of the emulator.
#[test]
fn goldens_match_in_bfloat16() {
    for (seed, case) in golden_cases().into_iter().enumerate() {
        let golden = Golden::load(&case);
        for (chunk, copies) in [(None, "eager"), (None, "lazy"), (Some(7), "eager"), (Some(64), "lazy")] {
            let emulator = format!("seed={},copies={copies},blocks=2", seed + 1);
            let (shape, values) = logits_on("emulated", &golden, chunk, &["--emulator", &emulator]);
            assert_eq!(shape, [golden.input_ids.len(), golden.vocab]);
            let name = format!("{} chunk {chunk:?} {copies}", golden.name);
            golden.assert_close_in_bf16(&name, &values, BF16_TOLERANCE);
        }
    }
}

#[test]
fn goldens_match_in_float32() {
    for case in golden_cases() {
        let golden = Golden::load(&case);
        for chunk in [None, Some(7)] {
            let (_, values) = logits_on("emulated", &golden, chunk, &["--dtype", "float32"]);
            let name = format!("{} chunk {chunk:?} float32", golden.name);
            assert_close(&name, &values, &golden.logits, F32_TOLERANCE);
        }
    }
}

#[test]
fn goldens_match_with_plain_kernels() {
    for case in golden_cases() {
        let golden = Golden::load(&case);
        let (_, values) = logits_on("emulated", &golden, None, &["--kernels", "plain"]);
        golden.assert_close_in_bf16(&format!("{} plain", golden.name), &values, BF16_TOLERANCE);
    }
}

#[test]
fn goldens_match_with_an_fp8_cache() {
    for (case, name) in golden_cases().into_iter().zip(["fp8", "fp8_e4m3"].into_iter().cycle()) {
        let golden = Golden::load(&case);
        let (_, values) = logits_on("emulated", &golden, Some(64), &["--kv-cache-dtype", name]);
        golden.assert_close_in_bf16(&format!("{} fp8 cache", golden.name), &values, FP8_CACHE_TOLERANCE);
        let (_, exact) = logits_on("emulated", &golden, Some(64), &[]);
        assert_ne!(values, exact, "{}: the cache is not fp8", golden.name);
    }
}

/// One golden over `tp` emulated devices, in bf16.
fn check_ranks(golden: &Golden, tp: usize, chunk: Option<usize>, extra: &[&str], seed: usize) {
    let copies = if seed.is_multiple_of(2) { "eager" } else { "lazy" };
    let (tp, emulator) = (tp.to_string(), format!("seed={},copies={copies}", seed + 1));
    let extra = [&["--tp", &tp, "--emulator", &emulator], extra].concat();
    let (shape, values) = logits_on("emulated", golden, chunk, &extra);
    assert_eq!(shape, [golden.input_ids.len(), golden.vocab]);
    golden.assert_close_in_bf16(
        &format!("{} chunk {chunk:?} {extra:?}", golden.name),
        &values,
        BF16_TOLERANCE,
    );
}

const RANKS: [usize; 3] = [2, 3, 4];
const RANK_CHUNKS: [Option<usize>; 3] = [None, Some(64), Some(23)];

/// Every golden over 2, 3 and 4 ranks, and experts dealt whole. The chunks take turns, so that every number of ranks meets each
/// of them on some goldens; the nightly test has all of them on all.
#[test]
fn goldens_match_over_ranks() {
    for (index, case) in golden_cases().into_iter().enumerate() {
        let golden = Golden::load(&case);
        for (turn, tp) in RANKS.into_iter().enumerate() {
            let chunk = RANK_CHUNKS[(index + turn) % RANK_CHUNKS.len()];
            check_ranks(&golden, tp, chunk, &[], index + turn);
            if golden.name.starts_with("moe") {
                check_ranks(&golden, tp, chunk, &["--expert-parallel"], index + turn);
            }
        }
    }
}

#[test]
#[ignore = "nightly: all combinations of what goldens_match_over_ranks samples, some minutes"]
fn goldens_match_over_ranks_in_every_chunking() {
    for (index, case) in golden_cases().into_iter().enumerate() {
        let golden = Golden::load(&case);
        for tp in RANKS.into_iter().chain([8, 16]) {
            for chunk in RANK_CHUNKS {
                check_ranks(&golden, tp, chunk, &[], index + tp);
                check_ranks(&golden, tp, chunk, &["--all-reduce", "host"], index + tp);
                if golden.name.starts_with("moe") {
                    check_ranks(&golden, tp, chunk, &["--expert-parallel"], index + tp);
                }
            }
        }
    }
}

/// Greedy tokens over ranks in float32: recorded steps peer to peer, op by op through the host.
#[test]
fn greedy_tokens_match_over_ranks() {
    for (index, case) in golden_cases().into_iter().enumerate() {
        let golden = Golden::load(&case);
        let ids = ids_file(&golden.input_ids);
        let mut command = longhaul();
        command.args(["generate", "--temperature", "0", "--ignore-eos", "--json", "--device", "emulated"]);
        command.args(["--dtype", "float32", "--tp", &RANKS[index % 3].to_string()]);
        command.args(["--all-reduce", if index % 4 == 3 { "host" } else { "peer" }]);
        command.arg("--model").arg(&golden.dir).arg("--ids-file").arg(ids.path());
        command.args(["--max-tokens", &golden.greedy.len().to_string()]);
        let got: Vec<u32> = serde_json::from_value(json_output(&mut command)["ids"].clone()).unwrap();
        assert_eq!(got, golden.greedy, "{}", golden.name);
    }
}

/// A cache of another precision than the products', and the one that the CPU does not have.
#[test]
fn the_cache_dtype_is_independent_of_the_products() {
    let golden = Golden::load(&goldens_dir().join("dense-dca"));
    for device in ["emulated", "cpu"] {
        let extra = ["--dtype", "float32", "--kv-cache-dtype", "bfloat16"];
        let (_, values) = logits_on(device, &golden, None, &extra);
        assert_close(&format!("{device} bf16 cache"), &values, &golden.logits, BF16_TOLERANCE);
        let extra = ["--dtype", "bfloat16", "--kv-cache-dtype", "float32"];
        let (_, values) = logits_on(device, &golden, None, &extra);
        assert_close(&format!("{device} f32 cache"), &values, &golden.logits, BF16_TOLERANCE);
    }
    let mut command = longhaul();
    command.args(["generate", "--device", "cpu", "--kv-cache-dtype", "fp8", "--prompt", "x"]);
    let (code, message) = fail(&mut command);
    assert!(
        code != 70 && message.contains("--kv-cache-dtype") && message.contains("--device cuda"),
        "{message}"
    );
}

/// Greedy tokens in float32 are the reference's, from recorded graphs and op by op.
#[test]
fn greedy_tokens_match_with_and_without_graphs() {
    for case in golden_cases() {
        let golden = Golden::load(&case);
        for extra in [&[][..], &["--enforce-eager"]] {
            let ids = ids_file(&golden.input_ids);
            let mut command = longhaul();
            command.args([
                "generate",
                "--temperature",
                "0",
                "--ignore-eos",
                "--json",
                "--device",
                "emulated",
            ]);
            command.args(["--dtype", "float32"]).args(extra);
            command.arg("--model").arg(&golden.dir).arg("--ids-file").arg(ids.path());
            command.args(["--max-tokens", &golden.greedy.len().to_string()]);
            let got: Vec<u32> = serde_json::from_value(json_output(&mut command)["ids"].clone()).unwrap();
            assert_eq!(got, golden.greedy, "{} {extra:?}", golden.name);
        }
    }
}

/// The same seed draws the same tokens on the CPU and on the emulated device.
#[test]
fn sampled_tokens_match_the_cpu() {
    let golden = Golden::load(&goldens_dir().join("dense-tied"));
    let run = |device: &str| -> Vec<u32> {
        let ids = ids_file(&golden.input_ids);
        let mut command = longhaul();
        command.args(["generate", "--ignore-eos", "--json", "--device", device, "--dtype", "float32"]);
        command.args(["--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--seed", "5"]);
        command.args(["--repetition-penalty", "1.1", "--max-tokens", "24"]);
        command.arg("--model").arg(&golden.dir).arg("--ids-file").arg(ids.path());
        serde_json::from_value(json_output(&mut command)["ids"].clone()).unwrap()
    };
    assert_eq!(run("emulated"), run("cpu"));
}

/// A planted fact in a text of about 2,000 tokens, through the product's own command.
#[test]
fn ask_answers_from_a_long_text() {
    let filler = "The road went on between the fields, and nobody spoke of what had happened in the spring. ";
    let fact = "The secret code of Lisbon is 48213. ";
    let text = format!("{}{fact}{}", filler.repeat(50), filler.repeat(50));
    let file = tempfile::Builder::new().suffix(".txt").tempfile().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let mut command = longhaul();
    command.args(["ask", "--device", "emulated", "--json", "--document"]).arg(file.path());
    command.arg("What is the secret code of Lisbon?");
    let answer = json_output(&mut command);
    assert!(answer["answer"].as_str().unwrap().contains("48213"), "{answer}");
    let tokens = answer["prompt_tokens"].as_u64().unwrap();
    assert!(tokens >= 1500, "only {tokens} tokens");
}

#[test]
fn a_missing_device_is_explained() {
    let mut command = longhaul();
    command.args(["generate", "--device", "cuda", "--prompt", "x"]);
    let (code, message) = fail(&mut command);
    assert_eq!(code, 69, "{message}");
    assert!(message.contains("--device cuda") && message.contains("--device cpu"), "{message}");
}

#[test]
fn wrong_emulator_settings_are_named() {
    for (setting, expected) in
        [("seed", "KEY=VALUE"), ("copies=late", "eager or lazy"), ("speed=1", "none of")]
    {
        let mut command = longhaul();
        command.args(["generate", "--device", "emulated", "--prompt", "x", "--emulator", setting]);
        let (code, message) = fail(&mut command);
        assert!(message.contains(expected) && code != 70, "{setting}: {code}, {message}");
    }
}

#[test]
fn auto_means_the_cpu_where_there_is_no_gpu() {
    let mut command = longhaul();
    command.args(["generate", "--prompt", "The", "--max-tokens", "1", "--json"]);
    succeed(&mut command);
}

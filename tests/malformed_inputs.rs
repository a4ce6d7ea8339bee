//! Broken checkpoints, configs, tokenizers and templates, as a user meets them: `longhaul logits` or `generate` must
//! refuse each with a message that names the culprit, write nothing, and never panic.

mod common;

use std::path::Path;

use common::{fail, ids_file, longhaul};
use longhaul_testkit::{TinyCheckpoint, TinyModel};
use serde_json::{Value, json};

/// Builds a broken model, and what its refusal must mention.
type Case = (&'static str, TinyCheckpoint, &'static [&'static str]);

/// `longhaul logits` on the model must fail and name every culprit.
fn refuse(name: &str, model: &Path, culprits: &[&str]) {
    let ids = ids_file(&[1, 2, 3]);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let mut command = longhaul();
    command.args(["logits", "--model"]).arg(model).arg("--ids-file").arg(ids.path()).arg("--out").arg(&out);
    let (code, message) = fail(&mut command);
    assert!((64..=78).contains(&code), "{name}: exit code {code}: {message}");
    for culprit in culprits {
        assert!(message.contains(culprit), "{name}: the message does not mention {culprit}: {message}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{name}: a failed run left {left:?}");
}

fn refuse_all(cases: Vec<Case>) {
    for (name, checkpoint, culprits) in cases {
        let model: TinyModel = checkpoint.build();
        refuse(name, model.path(), culprits);
    }
}

fn set(field: &'static str, value: Value) -> TinyCheckpoint {
    TinyCheckpoint::dense().edit_config(move |config| config[field] = value)
}

fn unset(field: &'static str) -> TinyCheckpoint {
    TinyCheckpoint::dense().edit_config(move |config| {
        config.as_object_mut().unwrap().remove(field);
    })
}

fn moe(field: &'static str, value: Value) -> TinyCheckpoint {
    TinyCheckpoint::moe().edit_config(move |config| config[field] = value)
}

#[test]
fn the_unbroken_models_are_accepted() {
    for checkpoint in [TinyCheckpoint::dense(), TinyCheckpoint::moe(), TinyCheckpoint::dense().shards(3)] {
        let model = checkpoint.build();
        let ids = ids_file(&[1, 2, 3]);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out.safetensors");
        let mut command = longhaul();
        command.args(["logits", "--model"]).arg(model.path()).arg("--ids-file").arg(ids.path());
        common::succeed(command.arg("--out").arg(&out));
        assert_eq!(common::read_logits(&out).0[0], 3);
    }
}

#[test]
fn broken_configs() {
    const FILE: &str = "config.json";
    let raw = |bytes: &'static [u8]| TinyCheckpoint::dense().edit_bytes(FILE, move |b| *b = bytes.to_vec());
    refuse_all(vec![
        ("no config", TinyCheckpoint::dense().remove(FILE), &[FILE, "missing"]),
        ("empty", raw(b""), &[FILE, "JSON"]),
        ("cut", TinyCheckpoint::dense().edit_bytes(FILE, |b| b.truncate(40)), &[FILE, "JSON"]),
        ("a list", raw(b"[1, 2]"), &[FILE, "object"]),
        ("not UTF-8", raw(b"{\"a\": \"\xff\xfe\"}"), &[FILE]),
        (
            "deep nesting",
            TinyCheckpoint::dense().edit_bytes(FILE, |b| *b = "[".repeat(100_000).into_bytes()),
            &[FILE],
        ),
        (
            "another architecture",
            set("architectures", json!(["LlamaForCausalLM"])),
            &[FILE, "architectures", "Llama"],
        ),
        ("two architectures", set("architectures", json!(["Qwen2ForCausalLM", "x"])), &["architectures"]),
        ("another type", set("model_type", json!("qwen3")), &["model_type", "qwen3"]),
        ("contradiction", set("model_type", json!("qwen2_moe")), &["model_type", "qwen2_moe"]),
        ("no hidden_size", unset("hidden_size"), &["hidden_size", "missing"]),
        ("no vocab_size", unset("vocab_size"), &["vocab_size", "missing"]),
        ("zero layers", set("num_hidden_layers", json!(0)), &["num_hidden_layers"]),
        ("negative heads", set("num_attention_heads", json!(-4)), &["num_attention_heads", "-4"]),
        ("fractional size", set("intermediate_size", json!(96.5)), &["intermediate_size", "96.5"]),
        ("a string", set("hidden_size", json!("64")), &["hidden_size", "64"]),
        ("huge", set("hidden_size", json!(u64::MAX)), &["hidden_size"]),
        ("heads that do not divide", set("num_attention_heads", json!(3)), &["num_attention_heads"]),
        ("groups that do not divide", set("num_key_value_heads", json!(3)), &["num_key_value_heads", "3"]),
        ("odd head_dim", set("head_dim", json!(15)), &["head_dim", "15"]),
        ("gelu", set("hidden_act", json!("gelu")), &["hidden_act", "gelu"]),
        ("eps zero", set("rms_norm_eps", json!(0)), &["rms_norm_eps"]),
        ("theta negative", set("rope_theta", json!(-1.0)), &["rope_theta"]),
        ("float8", set("torch_dtype", json!("float8_e4m3fn")), &["torch_dtype", "float8"]),
        ("quantised", set("quantization_config", json!({"quant_method": "gptq"})), &["quantization_config"]),
        ("code", set("auto_map", json!({"AutoModel": "x.Y"})), &["auto_map"]),
        (
            "window",
            TinyCheckpoint::dense().edit_config(|c| {
                c["use_sliding_window"] = json!(true);
                c["max_window_layers"] = json!(1);
                c["sliding_window"] = json!(64);
            }),
            &["sliding_window", "64"],
        ),
        ("layer types", set("layer_types", json!(["full_attention"])), &["layer_types"]),
        (
            "linear attention",
            set("layer_types", json!(["full_attention", "linear_attention"])),
            &["layer_types", "linear"],
        ),
        (
            "linear scaling",
            set("rope_scaling", json!({"type": "linear", "factor": 2})),
            &["rope_scaling", "linear"],
        ),
        ("no factor", set("rope_scaling", json!({"type": "yarn"})), &["rope_scaling.factor", "missing"]),
        (
            "factor below one",
            set("rope_scaling", json!({"type": "yarn", "factor": 0.5})),
            &["rope_scaling.factor", "0.5"],
        ),
        ("scaling is a string", set("rope_scaling", json!("yarn")), &["rope_scaling"]),
        (
            "beta",
            set(
                "rope_parameters",
                json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32}),
            ),
            &["beta_fast"],
        ),
        (
            "chunk",
            set("dual_chunk_attention_config", json!({"chunk_size": 64, "local_size": 64})),
            &["local_size", "64"],
        ),
        (
            "chunk zero",
            set("dual_chunk_attention_config", json!({"chunk_size": 0})),
            &["dual_chunk_attention_config.chunk_size"],
        ),
        ("eos outside", set("eos_token_id", json!(1_000_000)), &["eos_token_id", "1000000"]),
        ("eos list", set("eos_token_id", json!([1, "x"])), &["eos_token_id"]),
        ("tied is a number", set("tie_word_embeddings", json!(1)), &["tie_word_embeddings"]),
        ("too many chosen", moe("num_experts_per_tok", json!(1000)), &["num_experts_per_tok", "1000"]),
        ("no chosen", moe("num_experts_per_tok", json!(0)), &["num_experts_per_tok"]),
        ("sparse step zero", moe("decoder_sparse_step", json!(0)), &["decoder_sparse_step"]),
        ("mlp_only beyond", moe("mlp_only_layers", json!([99])), &["mlp_only_layers", "99"]),
        (
            "too many experts",
            moe("num_experts", json!(65536)).edit_config(|c| c["num_hidden_layers"] = json!(4096)),
            &["num_experts", "65536"],
        ),
        ("no expert size", moe("moe_intermediate_size", Value::Null), &["moe_intermediate_size", "missing"]),
    ]);
}

#[test]
fn broken_weights() {
    const FILE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    let bytes = |edit: fn(&mut Vec<u8>)| TinyCheckpoint::dense().edit_bytes(FILE, edit);
    let tensor = |name: &'static str, edit: fn(&mut Value)| {
        TinyCheckpoint::dense().edit_header(FILE, move |header| edit(&mut header[name]))
    };
    refuse_all(vec![
        ("no weights", TinyCheckpoint::dense().remove(FILE), &[FILE]),
        ("empty file", bytes(Vec::clear), &[FILE]),
        ("seven bytes", bytes(|b| b.truncate(7)), &[FILE]),
        ("header cut", bytes(|b| b.truncate(100)), &[FILE]),
        ("data cut", bytes(|b| b.truncate(b.len() - 1)), &[FILE]),
        ("half the data", bytes(|b| b.truncate(b.len() / 2)), &[FILE]),
        ("trailing bytes", bytes(|b| b.extend([0; 16])), &[FILE]),
        ("header length", bytes(|b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes())), &[FILE]),
        ("header is noise", bytes(|b| b[8..40].fill(0xff)), &[FILE]),
        (
            "a large-file pointer",
            bytes(|b| *b = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".to_vec()),
            &[FILE],
        ),
        (
            "a missing tensor",
            TinyCheckpoint::dense().edit_tensors(|t| t.retain(|t| t.name != "model.norm.weight")),
            &["model.norm.weight"],
        ),
        (
            "a misnamed tensor",
            TinyCheckpoint::dense().edit_tensors(|t| {
                for t in t.iter_mut().filter(|t| t.name == "model.layers.1.mlp.up_proj.weight") {
                    t.name = "model.layers.1.mlp.upp_proj.weight".into();
                }
            }),
            &["model.layers.1.mlp.up_proj.weight"],
        ),
        (
            "an extra tensor",
            TinyCheckpoint::dense().edit_tensors(|t| {
                let mut extra = t[0].clone();
                extra.name = "model.layers.9.extra".into();
                t.push(extra);
            }),
            &["model.layers.9.extra"],
        ),
        ("another shape", set("intermediate_size", json!(112)), &["mlp", "112"]),
        ("another vocabulary", set("vocab_size", json!(384)), &["embed_tokens", "384"]),
        ("more layers", set("num_hidden_layers", json!(3)), &["model.layers.2"]),
        ("untied without head", set("tie_word_embeddings", json!(false)), &["lm_head.weight"]),
        ("overlap", tensor("model.norm.weight", |t| t["data_offsets"] = json!([0, 128])), &[FILE]),
        ("reversed", tensor("model.norm.weight", |t| t["data_offsets"] = json!([64, 0])), &[FILE]),
        (
            "offsets beyond",
            tensor("model.norm.weight", |t| t["data_offsets"] = json!([1u64 << 40, (1u64 << 40) + 128])),
            &[FILE],
        ),
        (
            "shape beyond",
            tensor("model.norm.weight", |t| t["shape"] = json!([1u64 << 40, 1u64 << 40])),
            &[FILE],
        ),
        (
            "integer dtype",
            tensor("model.norm.weight", |t| t["dtype"] = json!("I16")),
            &["model.norm.weight", "I16"],
        ),
        ("unknown dtype", tensor("model.norm.weight", |t| t["dtype"] = json!("Q4")), &[FILE]),
        (
            "a shard missing",
            TinyCheckpoint::dense().shards(2).remove("model-00002-of-00002.safetensors"),
            &["model-00002-of-00002.safetensors"],
        ),
        (
            "a shard cut",
            TinyCheckpoint::dense()
                .shards(2)
                .edit_bytes("model-00002-of-00002.safetensors", |b| b.truncate(b.len() - 8)),
            &["model-00002-of-00002.safetensors"],
        ),
        ("index is noise", TinyCheckpoint::dense().shards(2).edit_bytes(INDEX, |b| b.truncate(20)), &[INDEX]),
        (
            "index without map",
            TinyCheckpoint::dense().shards(2).edit_json(INDEX, |v| *v = json!({})),
            &[INDEX, "weight_map"],
        ),
        (
            "index climbs",
            TinyCheckpoint::dense()
                .shards(2)
                .edit_json(INDEX, |v| v["weight_map"]["model.norm.weight"] = json!("../../etc/passwd")),
            &[INDEX, "passwd"],
        ),
        (
            "index lies",
            TinyCheckpoint::dense().shards(2).edit_json(INDEX, |v| {
                v["weight_map"]["model.norm.weight"] = json!("model-00001-of-00002.safetensors")
            }),
            &["model.norm.weight"],
        ),
    ]);
}

#[test]
fn broken_tokenizers_templates_and_generation_configs() {
    const TOKENIZER: &str = "tokenizer.json";
    const TEMPLATE: &str = "tokenizer_config.json";
    const GENERATION: &str = "generation_config.json";
    let tokenizer = |edit: fn(&mut Value)| TinyCheckpoint::dense().edit_json(TOKENIZER, edit);
    let generation = |edit: fn(&mut Value)| TinyCheckpoint::dense().edit_json(GENERATION, edit);
    refuse_all(vec![
        ("cut", TinyCheckpoint::dense().edit_bytes(TOKENIZER, |b| b.truncate(b.len() / 2)), &[TOKENIZER]),
        ("a number", tokenizer(|v| *v = json!(3)), &[TOKENIZER]),
        ("no model", tokenizer(|v| v["model"] = Value::Null), &[TOKENIZER, "model"]),
        ("wordpiece", tokenizer(|v| v["model"]["type"] = json!("WordPiece")), &[TOKENIZER, "WordPiece"]),
        ("duplicate ids", tokenizer(|v| v["model"]["vocab"]["a"] = json!(0)), &[TOKENIZER]),
        (
            "merges of unknown tokens",
            tokenizer(|v| v["model"]["merges"] = json!([["qqqq", "zzzz"]])),
            &[TOKENIZER, "merges"],
        ),
        ("larger than the model", set("vocab_size", json!(200)), &["vocab_size"]),
        (
            "template syntax",
            TinyCheckpoint::dense().edit_json(TEMPLATE, |v| v["chat_template"] = json!("{% for x in %}")),
            &[TEMPLATE],
        ),
        (
            "template is a number",
            TinyCheckpoint::dense().edit_json(TEMPLATE, |v| v["chat_template"] = json!(5)),
            &[TEMPLATE, "chat_template"],
        ),
        ("temperature", generation(|v| v["temperature"] = json!(-1)), &[GENERATION, "temperature"]),
        ("top_p", generation(|v| v["top_p"] = json!(1.5)), &[GENERATION, "top_p"]),
        ("eos", generation(|v| v["eos_token_id"] = json!("x")), &[GENERATION, "eos_token_id"]),
        ("noise", TinyCheckpoint::dense().edit_bytes(GENERATION, |b| *b = b"{".to_vec()), &[GENERATION]),
    ]);
}

#[test]
fn broken_ids_and_models() {
    let model = TinyCheckpoint::dense().build();
    let run = |ids: &str, extra: &[&str]| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), ids).unwrap();
        let mut command = longhaul();
        command.args(["generate", "--model"]).arg(model.path());
        if !extra.contains(&"--max-tokens") {
            command.args(["--max-tokens", "4"]);
        }
        fail(command.arg("--ids-file").arg(file.path()).args(extra))
    };
    for (ids, culprit) in [
        ("", "JSON array"),
        ("[1, -2]", "JSON array"),
        ("[1.5]", "JSON array"),
        ("{\"ids\": [1]}", "JSON array"),
        ("[99999999999]", "JSON array"),
        ("[]", "no tokens"),
        ("[320]", "token id 320"),
    ] {
        let (code, message) = run(ids, &[]);
        assert!(message.contains(culprit), "{ids}: {message}");
        assert_eq!(code, 64, "{ids}: {message}");
    }
    for (extra, culprit) in [
        (&["--temperature", "-1"][..], "temperature"),
        (&["--top-p", "0"][..], "top_p"),
        (&["--top-p", "NaN"][..], "top_p"),
        (&["--min-p", "2"][..], "min_p"),
        (&["--repetition-penalty", "0"][..], "repetition_penalty"),
        (&["--presence-penalty", "3"][..], "presence_penalty"),
        (&["--chunk", "0"][..], "chunk"),
        (&["--stop", ""][..], "stop"),
        (&["--max-model-len", "0"][..], "--max-model-len 0"),
        (&["--max-model-len", "5"][..], "context holds 5"),
        (&["--max-tokens", "18446744073709551615"][..], "18446744073709551615"),
        (&["--long-context", "yarn"][..], "rope_scaling"),
    ] {
        let (_, message) = run("[1, 2, 3]", extra);
        assert!(message.contains(culprit), "{extra:?}: {message}");
    }
    for (name, culprit) in [
        ("/no/such/directory", "no such directory"),
        ("model.gguf", "no such directory"),
        ("qwen9", "qwen2-7b"),
        ("no-such-org/no-such-model", "no-such-org/no-such-model"),
        ("../a/b", "no such directory"),
    ] {
        let mut command = longhaul();
        let cache = tempfile::tempdir().unwrap();
        command.env("HF_HOME", cache.path()).env("HF_HUB_OFFLINE", "1");
        let (_, message) = fail(command.args(["generate", "--prompt", "x", "--model", name]));
        assert!(message.contains(culprit), "{name}: {message}");
    }
}

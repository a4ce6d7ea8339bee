use serde_json::{Value, json};

use super::*;

/// Qwen2-72B-Instruct's `config.json` as published.
fn published() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
        "intermediate_size": 29568, "max_position_embeddings": 32768, "max_window_layers": 80,
        "model_type": "qwen2", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "use_cache": true, "use_sliding_window": false, "vocab_size": 152064
    })
}

fn published_moe() -> Value {
    let mut config = published();
    for (key, value) in [
        ("architectures", json!(["Qwen2MoeForCausalLM"])),
        ("model_type", json!("qwen2_moe")),
        ("hidden_size", json!(3584)),
        ("intermediate_size", json!(18944)),
        ("num_attention_heads", json!(28)),
        ("num_hidden_layers", json!(28)),
        ("num_key_value_heads", json!(4)),
        ("vocab_size", json!(151936)),
        ("max_window_layers", json!(28)),
        ("num_experts", json!(64)),
        ("num_experts_per_tok", json!(8)),
        ("moe_intermediate_size", json!(2560)),
        ("shared_expert_intermediate_size", json!(20480)),
        ("norm_topk_prob", json!(false)),
        ("decoder_sparse_step", json!(1)),
    ] {
        config[key] = value;
    }
    config
}

fn parse(config: &Value) -> Result<ModelSpec> {
    ModelSpec::from_config(config.to_string().as_bytes(), "config.json")
}

fn with(edit: impl FnOnce(&mut Value)) -> Result<ModelSpec> {
    let mut config = published();
    edit(&mut config);
    parse(&config)
}

#[test]
fn published_configs_give_the_published_models() {
    let dense = parse(&published()).unwrap();
    assert_eq!(dense.parameters(), 72_706_203_648);
    assert_eq!((dense.head_dim, dense.rope_theta, dense.rms_norm_eps), (128, 1e6, 1e-6));
    assert_eq!(dense.eos_token_ids, [151645]);
    assert_eq!(dense.sliding_window, None, "use_sliding_window is false");
    let moe = parse(&published_moe()).unwrap();
    assert_eq!(moe.parameters(), 57_408_658_944);
    assert!(moe.moe.unwrap().sparse_layers.iter().all(|s| *s));
}

#[test]
fn both_layouts_mean_the_same() {
    let old = with(|c| {
        c["rope_scaling"] = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768});
    })
    .unwrap();
    let new = with(|c| {
        let map = c.as_object_mut().unwrap();
        map.remove("rope_theta");
        map.remove("torch_dtype");
        map.remove("use_sliding_window");
        c["dtype"] = json!("bfloat16");
        c["layer_types"] = json!(vec!["full_attention"; 80]);
        c["rope_parameters"] = json!({
            "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768
        });
    })
    .unwrap();
    assert_eq!(old, new);
    let yarn = old.yarn.unwrap();
    assert!((yarn.attention_factor - 1.138629436111989).abs() < 1e-12);
    assert_eq!(old.trained_window(), 32768);
    let default =
        with(|c| c["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 1e6})).unwrap();
    assert_eq!(default, parse(&published()).unwrap());
}

#[test]
fn yarn_fields_are_read() {
    let yarn = |scaling: Value| with(|c| c["rope_scaling"] = scaling).unwrap().yarn.unwrap();
    let given = yarn(
        json!({"type": "yarn", "factor": 8.0, "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2,
        "truncate": false}),
    );
    assert_eq!(
        (given.attention_factor, given.beta_fast, given.beta_slow, given.truncate),
        (1.25, 16.0, 2.0, false)
    );
    assert_eq!(given.original_max_position_embeddings, 32768, "max_position_embeddings when not given");
    let pair = yarn(json!({"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}));
    assert_eq!(pair.attention_factor, 1.0);
}

#[test]
fn sparse_layers_follow_step_and_list() {
    let mut config = published_moe();
    config["decoder_sparse_step"] = json!(2);
    config["mlp_only_layers"] = json!([1]);
    let spec = parse(&config).unwrap();
    // (layer + 1) % 2 == 0, except layer 1.
    assert_eq!(
        (0..6).map(|l| spec.is_sparse(l)).collect::<Vec<_>>(),
        [false, false, false, true, false, true]
    );
    config["num_experts"] = json!(0);
    assert!((0..28).all(|l| !parse(&config).unwrap().is_sparse(l)));
}

#[test]
fn a_sliding_window_is_exact_or_refused() {
    let windowed = |window: usize, first: usize| {
        with(|c| {
            c["use_sliding_window"] = json!(true);
            c["sliding_window"] = json!(window);
            c["max_window_layers"] = json!(first);
        })
    };
    assert_eq!(windowed(131_072, 70).unwrap().sliding_window, Some(131_072), "covers the context");
    assert_eq!(windowed(4096, 80).unwrap().sliding_window, None, "no layer uses it");
    let error = windowed(4096, 70).unwrap_err().to_string();
    assert!(
        error.contains("sliding_window") && error.contains("4096") && error.contains("layer 70"),
        "{error}"
    );
    let by_type = with(|c| {
        c["layer_types"] = json!(vec!["sliding_attention"; 80]);
        c["sliding_window"] = json!(4096);
    });
    assert!(by_type.unwrap_err().to_string().contains("sliding_window"));
}

#[test]
fn dual_chunk_config_is_read_with_the_published_defaults() {
    let dual = |value: Value| with(|c| c["dual_chunk_attention_config"] = value).unwrap().dual_chunk.unwrap();
    let given =
        dual(json!({"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}));
    assert_eq!(given.original_max_position_embeddings, Some(262_144));
    let defaults = dual(json!({}));
    assert_eq!((defaults.chunk_size, defaults.local_size), (8192, 1024));
    assert_eq!(dual(json!({"original_max_position_embeddings": 0})).original_max_position_embeddings, None);
}

/// Random edits of a real config: never a panic, and nothing accepted whose arithmetic overflows.
#[test]
fn odd_values_never_panic() {
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(1e308),
        json!(u64::MAX),
        json!("x"),
        json!([]),
        json!({}),
        json!([null]),
        json!(true),
        json!(0.5),
        json!([-1]),
        json!({"rope_type": 3}),
    ];
    for base in [published(), published_moe()] {
        let keys: Vec<String> = base.as_object().unwrap().keys().cloned().collect();
        let extra = [
            "rope_scaling",
            "rope_parameters",
            "layer_types",
            "head_dim",
            "dual_chunk_attention_config",
            "mlp_only_layers",
            "quantization_config",
            "dtype",
            "qkv_bias",
            "attention_bias",
        ];
        for key in keys.iter().map(String::as_str).chain(extra) {
            for value in &values {
                let mut config = base.clone();
                config[key] = value.clone();
                match parse(&config) {
                    Ok(spec) => assert!(spec.parameters() > 0 && !spec.tensors().is_empty()),
                    Err(error) => assert!(error.to_string().contains("config.json"), "{error}"),
                }
            }
        }
    }
}

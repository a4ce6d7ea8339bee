//! Every field is obeyed, or refused by name.

mod common;

use std::sync::Arc;

use common::{Mock, Running, ids};
use longhaul_server::Config;
use serde_json::{Value, json};

fn server() -> (Arc<Mock>, Running) {
    let mock = Arc::new(Mock::saying("ok<|im_end|>"));
    let running = Running::start(&mock, Config::default());
    (mock, running)
}

fn completion(field: &str, value: Value) -> Value {
    let mut body = json!({"prompt": "x", "max_tokens": 4});
    body[field] = value;
    body
}

fn chat(field: &str, value: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 4});
    body[field] = value;
    body
}

#[test]
fn sampling_fields_reach_the_engine() {
    let (mock, server) = server();
    let body = json!({
        "prompt": [5, 6], "max_tokens": 9, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125,
        "presence_penalty": -0.5, "frequency_penalty": 1.5, "repetition_penalty": 1.25, "seed": -1, "n": 3,
        "stop_token_ids": [9, 8], "min_tokens": 2, "ignore_eos": true, "logit_bias": {"9": -100, "3": 1.5},
        "allowed_token_ids": [4, 2, 4], "bad_words": ["river", " é"], "logprobs": 5, "priority": -3, "cache_salt": "s", "user": "u", "metadata": {"a": "b"},
        "use_beam_search": false, "best_of": 1, "response_format": {"type": "text"}, "suffix": null,
    });
    let reply = server.post("/v1/completions", &body);
    assert_eq!(reply.status, 200, "{reply:?}");
    let got = mock.last();
    let params = got.sampling.params;
    assert_eq!((params.temperature, params.top_p, params.top_k, params.min_p), (0.5, 0.25, 7, 0.125));
    assert_eq!(
        (params.presence_penalty, params.frequency_penalty, params.repetition_penalty),
        (-0.5, 1.5, 1.25)
    );
    assert_eq!(params.seed, u64::MAX);
    assert_eq!((got.prompt.as_ref(), got.max_tokens, got.n), (&[5, 6][..], 9, 3));
    assert_eq!(got.sampling.stop_token_ids, [9, 8]);
    assert_eq!((got.sampling.min_tokens, got.sampling.ignore_eos), (2, true));
    assert_eq!(got.sampling.logit_bias, [(3, 1.5), (9, -100.0)]);
    assert_eq!(got.sampling.allowed_token_ids, [2, 4]);
    for word in ["river", "é"] {
        assert!(got.sampling.bad_words.contains(&ids(word)), "{:?}", got.sampling.bad_words);
        // Behind a blank it is another token, if there is one for both.
        let blank = ids(&format!(" {word}"));
        let is_one = blank.len() == ids(word).len() && blank[0] != ids(word)[0];
        assert_eq!(got.sampling.bad_words.contains(&blank), is_one);
    }
    assert_eq!((got.logprobs, got.prompt_logprobs, got.priority), (Some(5), None, -3));
    assert_eq!(got.cache_salt.as_deref(), Some("s"));

    // What a request leaves out comes from the model, and a seed from chance.
    server.post("/v1/completions", &json!({"prompt": "x"}));
    let first = mock.last();
    server.post("/v1/completions", &json!({"prompt": "x"}));
    assert_eq!((first.max_tokens, first.sampling.params.temperature, first.n), (16, 1.0, 1));
    assert_ne!(first.sampling.params.seed, mock.last().sampling.params.seed);
}

#[test]
fn the_output_is_clamped_to_the_room_and_the_prompt_is_not() {
    let (mock, server) = server();
    let prompt = |n: usize| vec![5; n];
    let ask = |n: usize, more: Value| {
        let mut body = json!({"prompt": prompt(n), "max_tokens": 100_000});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body)
    };
    assert_eq!(ask(4000, json!({})).status, 200);
    assert_eq!(mock.last().max_tokens, 96);
    assert_eq!(ask(4095, json!({})).status, 200);
    assert_eq!(mock.last().max_tokens, 1);
    let reply = ask(4096, json!({}));
    assert_eq!(reply.status, 400);
    assert_eq!(reply.json()["error"]["param"], "input_tokens");
    assert_eq!(
        reply.error(),
        "This model's maximum context length is 4096 tokens. However, your prompt contains 4096 input tokens, which exceeds \
         this limit even without any output tokens. Please reduce the length of the input prompt."
    );
    // A whole context may be scored, for which no token is generated.
    assert_eq!(ask(4096, json!({"max_tokens": 0, "echo": true, "logprobs": 0})).status, 200);
    assert_eq!((mock.last().max_tokens, mock.last().prompt_logprobs), (0, Some(0)));
    assert_eq!(ask(5000, json!({"truncate_prompt_tokens": 10})).status, 200);
    assert_eq!(mock.last().prompt.len(), 10);
    assert_eq!(ask(5, json!({"truncate_prompt_tokens": 2})).status, 200);
    assert_eq!(mock.last().prompt.len(), 2);
    assert_eq!(
        server.post("/v1/completions", &completion("truncate_prompt_tokens", json!(4097))).status,
        400
    );
    // A text that cannot fit is refused before it is tokenized.
    let reply = server.post("/v1/completions", &completion("prompt", json!("x".repeat(900_000))));
    assert!(reply.error().contains("at least"), "{reply:?}");
    let chat = server.post("/v1/chat/completions", &chat("max_tokens", Value::Null));
    assert_eq!(chat.status, 200);
    let submitted = mock.last();
    assert_eq!(submitted.max_tokens, 4096 - submitted.prompt.len(), "a chat may use all that is left");
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let (_, server) = server();
    let fields = [
        ("best_of", json!(2)),
        ("use_beam_search", json!(true)),
        ("length_penalty", json!(1.5)),
        ("logprob_token_ids", json!([1])),
        ("kv_transfer_params", json!({"a": 1})),
        ("vllm_xargs", json!({"a": 1})),
        ("repetition_detection", json!({"max_pattern_size": 3})),
        ("truncation_side", json!("right")),
        ("stream_interval", json!(5)),
        ("store", json!(true)),
        ("prompt_embeds", json!("AAAA")),
        ("no_such_field", json!(1)),
        ("bad_words", json!("a")),
    ];
    for (field, value) in fields {
        for (path, body) in [
            ("/v1/completions", completion(field, value.clone())),
            ("/v1/chat/completions", chat(field, value.clone())),
        ] {
            let reply = server.post(path, &body);
            assert_eq!(reply.status, 400, "{path} {field}: {reply:?}");
            let error = reply.json()["error"].clone();
            assert_eq!(
                (&error["param"], &error["type"]),
                (&json!(field), &json!("BadRequestError")),
                "{error}"
            );
            assert!(error["message"].as_str().unwrap().contains(field), "{error}");
        }
    }
    for (field, value) in
        [("suffix", json!("end")), ("messages", json!([])), ("max_tokens", json!(0)), ("tools", json!([]))]
    {
        let reply = server.post("/v1/completions", &completion(field, value));
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(field)), "{reply:?}");
    }
    for (field, value, param) in [
        ("echo", json!(true), "echo"),
        ("reasoning_effort", json!("high"), "reasoning_effort"),
        ("modalities", json!(["audio"]), "modalities"),
        ("prompt", json!("x"), "prompt"),
        ("functions", json!([]), "functions"),
        ("chat_template", json!("{{ 1 }}"), "chat_template"),
        ("chat_template_kwargs", json!({"tokenize": true}), "chat_template_kwargs"),
        ("tool_choice", json!("required"), "tool_choice"),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}}), "tool_choice.function.name"),
        ("tool_choice", json!("sometimes"), "tool_choice"),
        ("top_logprobs", json!(2), "top_logprobs"),
        (
            "tools",
            json!([{"type": "function", "function": {"name": "f", "strict": 1}}]),
            "tools[0].function.strict",
        ),
        ("tools", json!([{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
        ("tools", json!([{"type": "web_search"}]), "tools[0].type"),
        ("messages", json!([]), "messages"),
        ("messages", json!([{"role": "user"}]), "messages[0].content"),
        ("messages", json!([{"content": "x"}]), "messages[0].role"),
        ("messages", json!([{"role": "user", "content": 5}]), "messages[0].content"),
        ("messages", json!([{"role": "user", "content": "x", "audio": {"id": "1"}}]), "messages[0].audio"),
        (
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]),
            "messages[0].content[0].type",
        ),
        (
            "messages",
            json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
            "messages[0].tool_calls[0].function.arguments",
        ),
    ] {
        let reply = server.post("/v1/chat/completions", &chat(field, value));
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{reply:?}");
    }
}

/// Each numeric field with the values that break careless servers: wrong ones are refused, none is a 500.
#[test]
fn the_table_of_hostile_values() {
    let (_, server) = server();
    let ranges: [(&str, f64, f64); 16] = [
        ("temperature", 0.0, 2.0),
        ("top_p", 1e-9, 1.0),
        ("top_k", -1.0, 4e9),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
        ("repetition_penalty", 1e-9, 3e38),
        ("seed", -9e18, 9e18),
        ("n", 1.0, 16.0),
        ("max_tokens", 1.0, 9e18),
        ("min_tokens", 0.0, 4.0),
        ("logprobs", 0.0, 20.0),
        ("prompt_logprobs", 0.0, 20.0),
        ("priority", -2147483648.0, 2147483647.0),
        ("truncate_prompt_tokens", 1.0, 4096.0),
        ("stop_token_ids", f64::NAN, f64::NAN),
    ];
    let values = [
        json!(-1),
        json!(0),
        json!(1),
        json!(16),
        json!(17),
        json!(20),
        json!(21),
        json!(2_147_483_648_u64),
        json!(9_007_199_254_740_993_u64),
        json!(1e308),
        json!("1"),
        json!(1.0),
        json!(0.5),
        json!([]),
        json!({}),
        json!(true),
    ];
    for (field, min, max) in ranges {
        for value in &values {
            let reply = server.post("/v1/completions", &completion(field, value.clone()));
            let whole = ![
                "temperature",
                "top_p",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
            ]
            .contains(&field);
            let fits = match value.as_f64() {
                Some(x) => x >= min && x <= max && (!whole || x.fract() == 0.0),
                None => field == "stop_token_ids" && value.is_array(),
            };
            let fits = fits || (field == "truncate_prompt_tokens" && *value == json!(-1));
            assert_eq!(reply.status, if fits { 200 } else { 400 }, "{field}: {value}: {reply:?}");
            if !fits {
                assert_eq!(reply.json()["error"]["param"], field, "{value}: {reply:?}");
            }
        }
        assert_eq!(
            server.post("/v1/completions", &completion(field, Value::Null)).status,
            200,
            "null is absent: {field}"
        );
    }
    assert_eq!(server.metric("longhaul_panics_total"), 0.0);
    assert_eq!(server.outcomes("engine_error_500"), 0.0);
}

#[test]
fn token_ids_stay_within_the_model() {
    let (_, server) = server();
    let rows = common::model().vocab_size;
    let known = common::tokenizer().vocab_size();
    for (field, value, fits) in [
        ("prompt", json!([rows - 1]), true),
        ("prompt", json!([rows]), false),
        ("prompt", json!([-1]), false),
        ("prompt", json!([[rows - 1], [rows]]), false),
        ("logit_bias", json!({((rows - 1).to_string()): 1}), true),
        ("logit_bias", json!({(rows.to_string()): 1}), false),
        ("logit_bias", json!({"1": 101}), false),
        ("logit_bias", json!({"7": 1, "07": 1}), false),
        ("logit_bias", json!({"x": 1}), false),
        ("stop_token_ids", json!([rows - 1]), true),
        ("stop_token_ids", json!([rows]), false),
        ("allowed_token_ids", json!([known - 1]), true),
        ("allowed_token_ids", json!([known]), false),
        ("allowed_token_ids", json!([]), false),
    ] {
        let reply = server.post("/v1/completions", &completion(field, value.clone()));
        assert_eq!(reply.status == 200, fits, "{field}: {value}: {reply:?}");
    }
    let tokens = json!({"tokens": [rows]});
    assert_eq!(server.post("/detokenize", &tokens).status, 400);
}

#[test]
fn empty_and_odd_prompts_have_defined_answers() {
    let (_, server) = server();
    for (prompt, status) in [
        (json!(""), 400),
        (json!([]), 400),
        (json!([[]]), 400),
        (json!([""]), 400),
        (json!(["x", ""]), 400),
        (json!([1, "x"]), 400),
        (json!([[1], "x"]), 200),
        (json!(" "), 200),
        (json!("\u{feff}"), 200),
        (json!("<|im_end|>"), 200),
        (json!(null), 400),
        (json!({}), 400),
        (json!(vec!["x"; 64]), 200),
        (json!(vec!["x"; 65]), 400),
    ] {
        let reply = server.post("/v1/completions", &completion("prompt", prompt.clone()));
        assert_eq!(reply.status, status, "{prompt}: {reply:?}");
    }
    let many = json!({"prompt": vec!["x"; 33], "n": 2});
    assert_eq!(server.post("/v1/completions", &many).status, 400);
    for (stop, status) in [
        (json!("x"), 200),
        (json!(["a", "b", "c", "d"]), 200),
        (json!(["a", "b", "c", "d", "e"]), 400),
        (json!(""), 400),
        (json!([""]), 400),
        (json!("x".repeat(256)), 200),
        (json!("x".repeat(257)), 400),
        (json!([1]), 400),
    ] {
        let reply = server.post("/v1/completions", &completion("stop", stop.clone()));
        assert_eq!(reply.status, status, "{stop}: {reply:?}");
    }
}

#[test]
fn the_model_is_a_key_and_never_a_path() {
    let mock = Arc::new(Mock::saying("ok"));
    let config = Config { served_model_names: vec!["a".into(), "b".into()], ..Config::default() };
    let server = Running::start(&mock, config);
    for (name, answered) in [(json!("a"), "a"), (json!("b"), "b"), (Value::Null, "a")] {
        let reply = server.post("/v1/completions", &completion("model", name));
        assert_eq!((reply.status, &reply.json()["model"]), (200, &json!(answered)));
    }
    for name in ["mock", "../../etc/passwd", "", "A"] {
        let reply = server.post("/v1/completions", &completion("model", json!(name)));
        assert_eq!((reply.status, reply.error()), (404, format!("The model `{name}` does not exist.")));
        assert_eq!(reply.json()["error"]["type"], "NotFoundError");
    }
    let models = server.get("/v1/models").json();
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(
        (&models["data"][0]["root"], &models["data"][0]["max_model_len"]),
        (&json!("mock"), &json!(4096))
    );
}

#[test]
fn a_model_without_tokenizer_takes_ids_alone() {
    let mock = Arc::new(Mock::saying("ok").with_model(|model| {
        model.tokenizer = None;
        model.template = None;
    }));
    let server = Running::start(&mock, Config::default());
    let ids_only = json!({"prompt": [5, 6], "max_tokens": 1, "return_token_ids": true});
    let reply = server.post("/v1/completions", &ids_only).json();
    assert_eq!(reply["choices"][0]["token_ids"], json!([ids("ok")[0]]));
    assert_eq!(reply["choices"][0]["prompt_token_ids"], json!([5, 6]));
    for (path, body) in [
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/completions", json!({"prompt": [5], "stop": "x"})),
        ("/v1/completions", json!({"prompt": [5], "echo": true})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}]})),
        ("/tokenize", json!({"prompt": "x"})),
        ("/detokenize", json!({"tokens": [5]})),
    ] {
        let reply = server.post(path, &body);
        assert_eq!(reply.status, 400, "{path}: {reply:?}");
    }
}

//! JSON fields at and beyond their bounds.

use longhaul_text::Tokenizer;
use serde_json::{Value, json};

use crate::Status;
use crate::common::repository;
use crate::common::serve::post_to;
use crate::corpus::{Corpus, model_card};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// The demo's end-of-sequence token.
const END_OF_TURN: u32 = 1502;

/// What a field takes, besides null.
enum Takes {
    /// Numbers from one to another.
    Number(f64, f64),
    /// Whole numbers from one to another.
    Integer(i64, i64),
    /// As that, and one number more.
    IntegerOr(i64, i64, i64),
    /// true and false.
    Boolean,
    /// Any text up to a length.
    Text,
    /// An empty list.
    List,
    /// An empty object.
    Object,
    /// An empty list or a text.
    ListOrText,
    /// One number, and nothing else.
    Only(Value),
    /// Nothing.
    Nothing,
}

impl Takes {
    fn fits(&self, value: &Value) -> bool {
        let number = value.as_f64();
        let integer = |min: i64, max: i64| {
            let whole = value
                .as_i64()
                .map(i128::from)
                .or_else(|| number.filter(|x| x.fract() == 0.0 && x.abs() < 9e15).map(|x| x as i128));
            whole.is_some_and(|n| (i128::from(min)..=i128::from(max)).contains(&n))
        };
        match self {
            Takes::Number(min, max) => number.is_some_and(|x| (*min..=*max).contains(&x)),
            Takes::Integer(min, max) => integer(*min, *max),
            Takes::IntegerOr(min, max, more) => integer(*min, *max) || integer(*more, *more),
            Takes::Boolean => value.is_boolean(),
            Takes::Text => value.is_string(),
            Takes::List => value == &json!([]),
            Takes::Object => value == &json!({}),
            Takes::ListOrText => value == &json!([]) || value.is_string(),
            Takes::Only(only) => value == only,
            Takes::Nothing => false,
        }
    }
}

/// A request that is right but for `field`.
fn with(path: &str, field: &str, value: Value) -> Vec<u8> {
    let mut body = match path {
        CHAT => json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        _ => json!({"prompt": "x", "max_tokens": 2}),
    };
    match field {
        // However many may come, the first one ends it.
        "max_tokens" | "max_completion_tokens" => body["allowed_token_ids"] = json!([END_OF_TURN]),
        "top_logprobs" => body["logprobs"] = json!(true),
        "stream_options" => body["stream"] = json!(true),
        "continue_final_message" => body["messages"][0]["role"] = json!("assistant"),
        _ => {}
    }
    body[field] = value;
    post_to(path, &body)
}

/// Each field with 14 values: the answer is known for every one of them.
pub fn boundary_table(corpus: &mut Corpus) {
    let context = model_card(&corpus.server)["max_model_len"].as_i64().unwrap();
    let any = |min| Takes::Integer(min, i64::MAX);
    // The field, the number at its upper bound, what it takes.
    let completions: Vec<(&str, i64, Takes)> = vec![
        ("temperature", 2, Takes::Number(0.0, 2.0)),
        ("top_p", 1, Takes::Number(1e-30, 1.0)),
        ("top_k", u32::MAX.into(), Takes::Integer(-1, u32::MAX.into())),
        ("min_p", 1, Takes::Number(0.0, 1.0)),
        ("presence_penalty", 2, Takes::Number(-2.0, 2.0)),
        ("frequency_penalty", 2, Takes::Number(-2.0, 2.0)),
        ("repetition_penalty", 1 << 40, Takes::Number(1e-30, f32::MAX.into())),
        ("seed", i64::MAX, any(i64::MIN)),
        ("n", 16, Takes::Integer(1, 16)),
        ("max_tokens", context, any(1)),
        ("min_tokens", 2, Takes::Integer(0, 2)),
        ("logprobs", 20, Takes::Integer(0, 20)),
        ("prompt_logprobs", 20, Takes::Integer(0, 20)),
        ("priority", i32::MAX.into(), Takes::Integer(i32::MIN.into(), i32::MAX.into())),
        ("truncate_prompt_tokens", context, Takes::IntegerOr(1, context, -1)),
        ("stop", 4, Takes::ListOrText),
        ("stop_token_ids", 128, Takes::List),
        ("allowed_token_ids", 1, Takes::Nothing),
        ("logit_bias", 100, Takes::Object),
        ("ignore_eos", 1, Takes::Boolean),
        ("include_stop_str_in_output", 1, Takes::Boolean),
        ("skip_special_tokens", 1, Takes::Boolean),
        ("stream", 1, Takes::Boolean),
        ("echo", 1, Takes::Boolean),
        ("return_token_ids", 1, Takes::Boolean),
        ("return_tokens_as_token_ids", 1, Takes::Boolean),
        ("add_special_tokens", 1, Takes::Boolean),
        ("user", 512, Takes::Text),
        ("cache_salt", 512, Takes::Text),
        ("request_id", 128, Takes::Text),
        ("metadata", 16, Takes::Object),
        ("stream_options", 1, Takes::Object),
        ("best_of", 1, Takes::Only(json!(1))),
        ("use_beam_search", 1, Takes::Nothing),
        ("prompt_embeds", 1, Takes::ListOrText),
    ];
    let chat: Vec<(&str, i64, Takes)> = vec![
        ("max_completion_tokens", context, any(1)),
        ("max_tokens", context, any(1)),
        ("top_logprobs", 20, Takes::Integer(0, 20)),
        ("n", 16, Takes::Integer(1, 16)),
        ("parallel_tool_calls", 1, Takes::Boolean),
        ("add_generation_prompt", 1, Takes::Boolean),
        ("tools", 128, Takes::List),
        ("documents", 1024, Takes::List),
        ("chat_template_kwargs", 128, Takes::Object),
        ("chat_template", 1, Takes::Nothing),
        ("temperature", 2, Takes::Number(0.0, 2.0)),
        ("stop", 4, Takes::ListOrText),
    ];
    for (path, table) in [(COMPLETIONS, completions), (CHAT, chat)] {
        for (field, cap, takes) in table {
            let values = [
                json!(-1),
                json!(0),
                json!(1),
                json!(cap),
                cap.checked_add(1).map_or(json!(1_u64 << 63), |above| json!(above)),
                json!(1_i64 << 31),
                json!((1_i64 << 53) + 1),
                json!(1e308),
                json!("NaN"),
                json!("1"),
                json!(1.0),
                Value::Null,
                json!([]),
                json!({}),
            ];
            for value in values {
                // Null is the same as nothing. A list that embeds nothing is nothing, too.
                let text = field == "prompt_embeds" && value.is_string();
                let fits = value.is_null() || takes.fits(&value) && !text || is_empty_embeds(field, &value);
                let expected: Status = if fits { 200 } else { 400 };
                let what = format!("{path} {field}: {value}");
                let answer = corpus.case("fields: bounds", &what, &with(path, field, value), &[expected]);
                if expected == 400 {
                    let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
                    assert!(message.contains(field), "{what}: {message}");
                }
            }
        }
    }
}

fn is_empty_embeds(field: &str, value: &Value) -> bool {
    field == "prompt_embeds" && (value == &json!([]) || value == &json!({}))
}

/// Ids at the ends of the tokenizer and of the embedding.
pub fn token_ids(corpus: &mut Corpus) {
    let demo = repository("assets/demo");
    let known = Tokenizer::from_file(&demo.join("tokenizer.json")).unwrap().vocab_size() as i64;
    let config: Value = serde_json::from_slice(&std::fs::read(demo.join("config.json")).unwrap()).unwrap();
    let rows = config["vocab_size"].as_i64().unwrap();
    assert!(known < rows, "the embedding has rows beyond the tokenizer");
    let ids = [
        0,
        known - 1,
        known,
        rows - 1,
        rows,
        rows + 1,
        i32::MAX.into(),
        1 << 31,
        u32::MAX.into(),
        1 << 32,
        i64::MAX,
        -1,
        i64::MIN,
    ];
    for id in ids {
        let status = |below: i64| -> [Status; 1] { if (0..below).contains(&id) { [200] } else { [400] } };
        for (field, value, below) in [
            ("prompt", json!([id]), rows),
            ("prompt", json!([[1, 2], [3, id]]), rows),
            ("logit_bias", json!({id.to_string(): 1}), rows),
            ("stop_token_ids", json!([id]), rows),
            ("allowed_token_ids", json!([id]), known),
        ] {
            let what = format!("{field}: {value}");
            corpus.case("fields: ids", &what, &with(COMPLETIONS, field, value), &status(below));
        }
        let body = json!({"tokens": [1, id]});
        corpus.case("fields: ids", &format!("{body}"), &post_to("/detokenize", &body), &status(rows));
    }
    for odd in [
        json!(1.5),
        json!("1"),
        json!(null),
        json!(true),
        json!([]),
        json!({}),
        json!(1e300),
        json!(u64::MAX),
    ] {
        for (field, value) in [
            ("prompt", json!([1, odd])),
            ("stop_token_ids", json!([odd])),
            ("allowed_token_ids", json!([odd])),
        ] {
            let what = format!("{field}: {value}");
            corpus.case("fields: ids", &what, &with(COMPLETIONS, field, value), &[400]);
        }
        let body = json!({"tokens": [odd]});
        corpus.case("fields: ids", &format!("{body}"), &post_to("/detokenize", &body), &[400]);
    }
    for key in ["", " 1", "1 ", "+1", "1.0", "0x1", "1e2", "-0", "\u{661}", "true"] {
        let expected = if key == "+1" { [200] } else { [400] };
        let body = with(COMPLETIONS, "logit_bias", json!({key: 1}));
        corpus.case("fields: ids", key, &body, &expected);
    }
    for (bias, status) in [
        (json!(100), 200),
        (json!(-100), 200),
        (json!(100.1), 400),
        (json!(1e308), 400),
        (json!("1"), 400),
        (json!(null), 400),
    ] {
        let body = with(COMPLETIONS, "logit_bias", json!({"1": bias}));
        corpus.case("fields: ids", &format!("{bias}"), &body, &[status]);
    }
}

/// Collections with exactly as many entries as are allowed, and one more.
pub fn counts(corpus: &mut Corpus) {
    let many = |n: usize, item: &dyn Fn(usize) -> Value| Value::Array((0..n).map(item).collect());
    let object = |n: usize, key: &dyn Fn(usize) -> String, value: Value| {
        Value::Object((0..n).map(|i| (key(i), value.clone())).collect())
    };
    let message = |_| json!({"role": "user", "content": "x"});
    let tool = |i| json!({"type": "function", "function": {"name": format!("f{i}")}});
    for (path, field, most, make) in [
        (COMPLETIONS, "prompt", 64, &|n| many(n, &|_| json!("x")) as Value),
        (COMPLETIONS, "stop", 4, &|n| many(n, &|i| json!(format!("s{i}")))),
        (COMPLETIONS, "stop", 256, &|n| json!(["y".repeat(n)])),
        (COMPLETIONS, "stop_token_ids", 128, &|n| many(n, &|i| json!(i))),
        (COMPLETIONS, "logit_bias", 1024, &|n| object(n, &|i| i.to_string(), json!(1))),
        (COMPLETIONS, "metadata", 16, &|n| object(n, &|i| format!("k{i}"), json!("v"))),
        (COMPLETIONS, "user", 512, &|n| json!("u".repeat(n))),
        (COMPLETIONS, "cache_salt", 512, &|n| json!("s".repeat(n))),
        (COMPLETIONS, "request_id", 128, &|n| json!("r".repeat(n))),
        (CHAT, "messages", 1024, &|n| many(n, &message)),
        (CHAT, "tools", 128, &|n| many(n, &tool)),
        (CHAT, "chat_template_kwargs", 128, &|n| object(n, &|i| format!("k{i}"), json!(1))),
        (CHAT, "documents", 1024, &|n| many(n, &|_| json!({}))),
    ] as [(&str, &str, usize, &dyn Fn(usize) -> Value); 13]
    {
        for (count, status) in [(most, 200), (most + 1, 400), (20 * most, 400)] {
            let what = format!("{field}: {count}");
            corpus.case("fields: counts", &what, &with(path, field, make(count)), &[status]);
        }
    }
    // Rules that leave nothing to draw are the client's.
    for (min_tokens, status) in [(0, 200), (1, 400)] {
        for stream in [false, true] {
            let body = json!({
                "prompt": "x", "max_tokens": 2, "min_tokens": min_tokens, "allowed_token_ids": [END_OF_TURN], "stream": stream,
            });
            let expected = if stream { 200 } else { status };
            let answer =
                corpus.case("fields: counts", "nothing to draw", &post_to(COMPLETIONS, &body), &[expected]);
            assert_eq!(answer.body.contains("\"code\":400"), status == 400, "{answer:?}");
        }
    }
    // Together they are bounded, too.
    for (prompts, n, status) in [(4, 16, 200), (5, 16, 400), (64, 1, 200), (64, 2, 400)] {
        let prompt = many(prompts, &|_| json!("x"));
        let body = json!({"prompt": prompt, "n": n, "max_tokens": 1});
        corpus.case("fields: counts", &format!("{prompts} x {n}"), &post_to(COMPLETIONS, &body), &[status]);
    }
    for depth in [31, 33, 100, 120, 130, 10_000] {
        let nested = format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        for field in ["documents", "chat_template_kwargs", "tools", "metadata", "stop", "logit_bias"] {
            let body = format!(
                "{{\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}],\"max_tokens\":1,\"{field}\":{nested}}}"
            );
            let request = format!(
                "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            );
            corpus.case("fields: depth", &format!("{field}: {depth}"), request.as_bytes(), &[400]);
        }
    }
}

/// Messages, parts and tools that a model of text cannot read, or that would make the server fetch something.
pub fn unsupported_content(corpus: &mut Corpus) {
    let url = "http://169.254.169.254/latest/meta-data";
    for part in [
        json!({"type": "image_url", "image_url": {"url": url}}),
        json!({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
        json!({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
        json!({"type": "video_url", "video_url": {"url": url}}),
        json!({"type": "file", "file": {"file_id": "x"}}),
        json!({"type": "text"}),
        json!({"type": "text", "text": 1}),
        json!({"type": "text", "text": "x", "url": url}),
        json!({"text": "x"}),
        json!("x"),
        json!(1),
        json!(null),
        json!([]),
    ] {
        let messages = json!([{"role": "user", "content": [part]}]);
        corpus.case(
            "fields: content",
            &messages.to_string(),
            &with(CHAT, "messages", messages.clone()),
            &[400],
        );
    }
    for message in [
        json!({}),
        json!([]),
        json!(1),
        json!("user: x"),
        json!({"role": "user"}),
        json!({"content": "x"}),
        json!({"role": "", "content": "x"}),
        json!({"role": 1, "content": "x"}),
        json!({"role": "r".repeat(65), "content": "x"}),
        json!({"role": "user", "content": 1}),
        json!({"role": "user", "content": {"text": "x"}}),
        json!({"role": "user", "content": "x", "unheard_of": 1}),
        json!({"role": "user", "content": "x", "audio": {"id": "x"}}),
        json!({"role": "assistant", "tool_calls": [{}]}),
        json!({"role": "assistant", "tool_calls": [{"function": {}}]}),
        json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}),
        json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}),
        json!({"role": "assistant", "tool_calls": [{"type": "shell", "function": {"name": "f"}}]}),
    ] {
        let messages = json!([message]);
        corpus.case(
            "fields: content",
            &messages.to_string(),
            &with(CHAT, "messages", messages.clone()),
            &[400],
        );
    }
    for tool in [
        json!({}),
        json!({"type": "function"}),
        json!({"type": "code_interpreter"}),
        json!({"type": "function", "function": {}}),
        json!({"type": "function", "function": {"name": ""}}),
        json!({"type": "function", "function": {"name": "a b"}}),
        json!({"type": "function", "function": {"name": "f".repeat(65)}}),
        json!({"type": "function", "function": {"name": "f\n<|im_end|>"}}),
        json!({"type": "function", "function": {"name": "f", "parameters": []}}),
        json!({"type": "function", "function": {"name": "f", "url": url}}),
        json!({"type": "function", "function": {"name": "f"}, "x": 1}),
    ] {
        let tools = json!([tool]);
        corpus.case("fields: content", &tools.to_string(), &with(CHAT, "tools", tools.clone()), &[400]);
    }
    for model in [
        "../../etc/passwd",
        "/etc/passwd",
        "demo/../demo",
        "DEMO",
        "demo ",
        "",
        "hf://x",
        "\u{0}",
        "x;touch /pwn",
    ] {
        for path in [COMPLETIONS, CHAT] {
            corpus.case("fields: content", model, &with(path, "model", json!(model)), &[404]);
        }
    }
}

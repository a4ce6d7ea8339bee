//! What answers look like, to the byte.

mod common;

use std::sync::Arc;

use common::{Mock, Running, ids, say};
use longhaul_server::{Config, Event, Failure};
use serde_json::{Value, json};

fn server(text: &str) -> (Arc<Mock>, Running) {
    let mock = Arc::new(Mock::saying(text));
    let running = Running::start(&mock, Config::default());
    (mock, running)
}

/// `created` is the one field that a test cannot know.
fn timeless(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("\"created\":") {
        let digits = at + "\"created\":".len();
        out += &rest[..digits];
        out += "0";
        rest = rest[digits..].trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out + rest
}

fn pieces(text: &str) -> Vec<String> {
    ids(text).iter().map(|id| common::tokenizer().decode(&[*id], false)).collect()
}

#[test]
fn a_streamed_chat_is_what_clients_of_the_rivals_expect() {
    let (_, server) = server("The river<|im_end|>");
    let body = json!({
        "messages": [{"role": "user", "content": "Hi"}], "stream": true, "stream_options": {"include_usage": true},
    });
    let reply =
        server.request("POST", "/v1/chat/completions", &[("X-Request-Id", "r1")], Some(&body.to_string()));
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(reply.header("x-request-id"), None);
    let head = r#"{"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"mock","#;
    let mut expected = format!(
        "data: {head}\"choices\":[{{\"index\":0,\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
    );
    let said = pieces("The river");
    for piece in &said {
        expected += &format!(
            "data: {head}\"choices\":[{{\"index\":0,\"delta\":{{\"content\":{}}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n",
            json!(piece)
        );
    }
    expected += &format!(
        "data: {head}\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"\"}},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}}]}}\n\n"
    );
    let prompt = ids("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n").len();
    let done = said.len() + 1;
    expected += &format!(
        "data: {head}\"choices\":[],\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{},\"completion_tokens\":{done}}}}}\n\n",
        prompt + done
    );
    expected += "data: [DONE]\n\n";
    assert_eq!(timeless(&reply.body), expected);
}

#[test]
fn a_streamed_completion_likewise() {
    let (_, server) = server("The river runs");
    let body = json!({"prompt": "x", "max_tokens": 2, "stream": true});
    let reply = server.request("POST", "/v1/completions", &[("X-Request-Id", "r2")], Some(&body.to_string()));
    let head = r#"{"id":"cmpl-r2","object":"text_completion","created":0,"model":"mock","#;
    let said = pieces("The river runs");
    let expected = format!(
        "data: {head}\"choices\":[{{\"index\":0,\"text\":{},\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null}}]}}\n\n\
         data: {head}\"choices\":[{{\"index\":0,\"text\":{},\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null}}]}}\n\n\
         data: [DONE]\n\n",
        json!(said[0]),
        json!(said[1])
    );
    assert_eq!(timeless(&reply.body), expected);
}

#[test]
fn a_whole_chat_names_every_field() {
    let (_, server) = server("The river<|im_end|>");
    let reply = server.post(
        "/v1/chat/completions",
        &json!({"messages": [{"role": "user", "content": "Hi"}], "request_id": "mine", "n": 2}),
    );
    assert_eq!(reply.status, 200, "{reply:?}");
    let prompt = ids("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n").len();
    let each = pieces("The river").len() + 1;
    let choice = |index: usize| {
        json!({
            "index": index,
            "message": {
                "role": "assistant", "content": "The river", "refusal": null, "annotations": null, "audio": null,
                "function_call": null, "tool_calls": [],
            },
            "logprobs": null, "finish_reason": "stop", "stop_reason": null, "token_ids": null,
        })
    };
    let mut expected = json!({
        "id": "chatcmpl-mine", "object": "chat.completion", "created": 0, "model": "mock",
        "choices": [choice(0), choice(1)],
        "service_tier": null, "system_fingerprint": null,
        "usage": {
            "prompt_tokens": prompt, "total_tokens": prompt + 2 * each, "completion_tokens": 2 * each,
            "prompt_tokens_details": null,
        },
        "prompt_logprobs": null, "prompt_token_ids": null, "kv_transfer_params": null,
    });
    expected["created"] = reply.json()["created"].clone();
    assert_eq!(reply.body, expected.to_string());
}

#[test]
fn logprobs_have_the_shapes_of_the_api() {
    let (_, server) = server("The river<|im_end|>");
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "logprobs": true, "top_logprobs": 2, "max_tokens": 1});
    let first = ids("The river")[0];
    let text = |id: u32| String::from_utf8_lossy(&common::tokenizer().token_bytes(id)).into_owned();
    let bytes = |id: u32| json!(common::tokenizer().token_bytes(id).as_ref());
    assert_eq!(
        server.post("/v1/chat/completions", &chat).json()["choices"][0]["logprobs"],
        json!({"content": [{
            "token": text(first), "logprob": -0.5, "bytes": bytes(first),
            "top_logprobs": [
                {"token": text(first), "logprob": -0.5, "bytes": bytes(first)},
                {"token": text(first + 1), "logprob": -1.5, "bytes": bytes(first + 1)},
            ],
        }]})
    );
    let completion = json!({"prompt": [5, 6], "logprobs": 1, "max_tokens": 2, "echo": true, "return_tokens_as_token_ids": true});
    let reply = server.post("/v1/completions", &completion).json();
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.5, -0.5, -0.5]));
    assert_eq!(logprobs["tokens"][0], "token_id:5");
    assert_eq!(logprobs["text_offset"], json!([0, 10, 20, 20 + format!("token_id:{first}").len()]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1], json!({"token_id:6": -0.5}));
    assert!(
        reply["choices"][0]["text"].as_str().unwrap().ends_with(&(text(first) + &text(ids("The river")[1])))
    );

    let prompt = json!({"prompt": [5, 6], "prompt_logprobs": 1, "max_tokens": 1});
    let reply = server.post("/v1/completions", &prompt).json();
    let scores = &reply["choices"][0]["prompt_logprobs"];
    assert_eq!(scores[0], Value::Null);
    assert_eq!(scores[1]["6"], json!({"logprob": -0.5, "rank": 1, "decoded_token": text(6)}));
}

#[test]
fn several_prompts_and_choices_keep_their_indices() {
    let (mock, server) = server("abc");
    let said = ids("abc").len();
    for stream in [false, true] {
        let body =
            json!({"prompt": ["x", "y", [7, 8]], "n": 2, "max_tokens": said, "stream": stream, "echo": true});
        let reply = server.post("/v1/completions", &body);
        let mut texts = vec![String::new(); 6];
        let mut finished = vec![0; 6];
        let events = if stream { reply.events() } else { vec![reply.json()] };
        for event in &events {
            for choice in event["choices"].as_array().unwrap() {
                let index = choice["index"].as_u64().unwrap() as usize;
                texts[index] += choice["text"].as_str().unwrap();
                finished[index] += usize::from(choice["finish_reason"].is_string());
            }
        }
        let ids = common::tokenizer().decode(&[7, 8], false);
        let expected: Vec<String> = ["x", "x", "y", "y", &ids, &ids].map(|p| format!("{p}abc")).into();
        assert_eq!((texts, finished), (expected, vec![1; 6]), "stream: {stream}");
    }
    assert_eq!(mock.submissions.lock().unwrap().len(), 6);
}

#[test]
fn stop_strings_end_a_choice_and_tell_the_engine() {
    let (mock, server) = server("one two three four<|im_end|>");
    let ask = |more: Value| {
        let mut body = json!({"prompt": "x", "max_tokens": 40, "stop": ["thr", "zzz"]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body)
    };
    let choice = ask(json!({})).json()["choices"][0].clone();
    assert_eq!(
        (&choice["text"], &choice["finish_reason"], &choice["stop_reason"]),
        (&json!("one two "), &json!("stop"), &json!("thr"))
    );
    let choice = ask(json!({"include_stop_str_in_output": true})).json()["choices"][0].clone();
    assert_eq!(choice["text"], "one two thr");
    let streamed: String = ask(json!({"stream": true}))
        .events()
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(streamed, "one two ");
    let whole = ask(json!({"min_tokens": 30})).json()["choices"][0].clone();
    assert_eq!(whole["text"], "one two three four");
    mock.idle_after(4);
}

#[test]
fn a_failure_before_the_first_token_is_a_status_and_after_it_an_event() {
    let failing = |failure: Failure, after: usize| {
        let said = ids("The river runs past");
        let mock = Arc::new(Mock::new(move |_, sink| {
            sink.send(Event::Started { cached_tokens: 0 });
            for id in said.iter().take(after) {
                sink.send(Event::Token { choice: 0, token: common::score(*id, None), finish: None });
            }
            sink.send(Event::Failed(failure.clone()));
        }));
        let server = Running::start(&mock, Config::default());
        (mock, server)
    };
    for (failure, status, outcome) in [
        (Failure::Engine("rank 1 is lost".into()), 500, "engine_error_500"),
        (Failure::Numeric, 500, "numeric_error_500"),
        (Failure::Deadline, 504, "deadline"),
        (Failure::Drained, 503, "drained_503"),
    ] {
        let (_mock, server) = failing(failure.clone(), 2);
        let reply = server.post("/v1/completions", &json!({"prompt": "x"}));
        assert_eq!(reply.status, status, "{reply:?}");
        assert_eq!(reply.json()["error"]["code"], status);
        let events = server.post("/v1/completions", &json!({"prompt": "x", "stream": true})).events();
        assert_eq!(events.len(), 3, "{events:?}");
        assert_eq!(events[2]["error"]["code"], status);
        assert_eq!(server.outcomes(outcome), 2.0);
    }
}

#[test]
fn an_engine_that_vanishes_is_an_error_and_not_a_short_answer() {
    let mock = Arc::new(Mock::new(|_, sink| {
        sink.send(Event::Started { cached_tokens: 0 });
        sink.send(Event::Token { choice: 0, token: common::score(5, None), finish: None });
    }));
    let server = Running::start(&mock, Config::default());
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x"})).status, 500);
    let events = server.post("/v1/completions", &json!({"prompt": "x", "stream": true})).events();
    assert_eq!(events.last().unwrap()["error"]["code"], 500);
}

const CALLS: &str = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\"}\n</tool_call><|im_end|>";

#[test]
fn streamed_tool_calls_are_the_whole_ones() {
    let (mock, server) = server(CALLS);
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"zebra": 1, "apple": 2}}});
    let ask = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/chat/completions", &body)
    };
    let whole = ask(json!({})).json()["choices"][0].clone();
    assert_eq!(
        (&whole["finish_reason"], &whole["message"]["content"]),
        (&json!("tool_calls"), &json!("Let me see."))
    );
    let function = |call: &Value| (call["function"]["name"].clone(), call["function"]["arguments"].clone());
    let calls: Vec<_> = whole["message"]["tool_calls"].as_array().unwrap().iter().map(function).collect();
    assert_eq!(calls, [(json!("f"), json!("{\"x\":1}")), (json!("g"), json!("{}"))]);
    // The schema reached the template in its own order.
    let prompt = common::tokenizer().decode(&mock.last().prompt, false);
    assert!(prompt.contains("{\"zebra\": 1, \"apple\": 2}"), "{prompt}");

    let mut content = String::new();
    let mut streamed = Vec::new();
    for event in ask(json!({"stream": true})).events() {
        let delta = &event["choices"][0]["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            assert_eq!(call["index"], streamed.len());
            assert!(call["id"].as_str().unwrap().starts_with("chatcmpl-tool-"));
            streamed.push(function(call));
        }
    }
    assert_eq!((content.as_str(), streamed), ("Let me see.", calls));

    let one = ask(json!({"parallel_tool_calls": false})).json();
    assert_eq!(one["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
    let none = ask(json!({"tool_choice": "none"})).json();
    assert_eq!(none["choices"][0]["message"]["content"], CALLS.trim_end_matches("<|im_end|>"));
    assert_eq!(none["choices"][0]["finish_reason"], "stop");
}

#[test]
fn past_tool_calls_reach_the_template_as_objects() {
    let (mock, server) = server("ok<|im_end|>");
    let body = json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}},
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "<|im_end|>"},
    ], "chat_template_kwargs": {"mood": "glad"}});
    assert_eq!(server.post("/v1/chat/completions", &body).status, 200);
    let prompt = mock.last().prompt;
    let text = common::tokenizer().decode(&prompt, false);
    assert_eq!(
        text,
        "<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}}</tool_call>\
         <|im_end|>\n<|im_start|>tool\n<|im_end|><|im_end|>\n<|im_start|>assistant\nglad"
    );
    let special = common::tokenizer().special_id("<|im_end|>").unwrap();
    assert_eq!(prompt.iter().filter(|id| **id == special).count(), 3, "text from a message is text");
    let rendered = server.post("/v1/chat/completions/render", &body).json();
    assert_eq!(rendered["prompt"], text);
    assert_eq!(rendered["token_ids"], json!(prompt.as_ref()));
}

#[test]
fn a_final_message_can_be_continued() {
    let (mock, server) = server("ok");
    let mut body = json!({
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is "}],
        "continue_final_message": true, "max_tokens": 1,
    });
    assert_eq!(server.post("/v1/chat/completions", &body).status, 200);
    let text = common::tokenizer().decode(&mock.last().prompt, false);
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nThe answer is ");
    body["add_generation_prompt"] = json!(true);
    assert!(server.post("/v1/chat/completions", &body).error().contains("continue_final_message"));
}

#[test]
fn usage_can_ride_on_every_chunk() {
    let mock = Arc::new(Mock::saying("The river"));
    let config = Config { force_include_usage: true, prompt_tokens_details: true, ..Config::default() };
    let server = Running::start(&mock, config);
    let events =
        server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2, "stream": true})).events();
    let usages: Vec<Value> = events.iter().map(|event| event["usage"]["completion_tokens"].clone()).collect();
    assert_eq!(usages, [json!(1), json!(2), json!(2)]);
    assert_eq!(events[2]["usage"]["prompt_tokens_details"], json!({"cached_tokens": 3}));
}

#[test]
fn a_silent_stream_is_kept_alive() {
    let said = ids("ok");
    let mock = Arc::new(Mock::new(move |submission, sink| {
        std::thread::sleep(std::time::Duration::from_millis(300));
        say(&said, submission, sink);
    }));
    let period = Some(std::time::Duration::from_millis(20));
    let server = Running::start(&mock, Config { sse_keep_alive: period, ..Config::default() });
    let reply = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 1, "stream": true}));
    assert!(reply.body.starts_with(": keep-alive\n\n: keep-alive\n\n"), "{reply:?}");
    assert_eq!(reply.events().len(), 1);
}

#[test]
fn text_and_ids_are_translated() {
    let (_, server) = server("");
    let reply =
        server.post("/tokenize", &json!({"prompt": "The river<|im_end|>", "return_token_strs": true})).json();
    assert_eq!(reply["tokens"], json!(ids("The river<|im_end|>")));
    assert_eq!(reply["count"], ids("The river<|im_end|>").len());
    assert_eq!(reply["max_model_len"], 4096);
    assert_eq!(reply["token_strs"].as_array().unwrap().last().unwrap(), "<|im_end|>");
    let chat = server.post("/tokenize", &json!({"messages": [{"role": "user", "content": "Hi"}]})).json();
    assert_eq!(chat["tokens"], json!(ids("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")));
    let back = server.post("/detokenize", &json!({"tokens": reply["tokens"]})).json();
    assert_eq!(back, json!({"prompt": "The river<|im_end|>"}));
}

//! Answers that have to look like something, from a real model: what it says is its own, what it looks like is not.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Mock, Reply, Running};
use longhaul_engine::{Loader, ModelRef};
use longhaul_server::{BatchOptions, Batchable, Batched, Config, Defaults};
use serde_json::{Value, json};

fn demo() -> Running {
    let engine = Loader::new(ModelRef::Demo).load(&mut |_, _| {}).unwrap();
    let options = BatchOptions { queued_events: 4096, ..BatchOptions::default() };
    let batchable = Batchable::engine(engine, "demo".into(), Defaults::Neutral);
    let batched = Batched::start(batchable, &options, |reason| panic!("{reason:?}")).unwrap();
    Running::serve(Arc::new(batched), Config::default())
}

fn with(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn complete(server: &Running, more: &Value) -> Reply {
    let body = json!({"prompt": "The river", "max_tokens": 600, "seed": 7});
    server.post("/v1/completions", &with(body, more))
}

fn chat(server: &Running, more: &Value) -> Reply {
    let body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 600, "seed": 7});
    server.post("/v1/chat/completions", &with(body, more))
}

/// The text of a completion and why it ended.
fn text(reply: &Reply) -> (String, String) {
    assert_eq!(reply.status, 200, "{reply:?}");
    let choice = &reply.json()["choices"][0];
    let text = choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap_or_default();
    (text.into(), choice["finish_reason"].as_str().unwrap().into())
}

fn error(reply: &Reply) -> (u16, String, String) {
    let error = reply.json()["error"].clone();
    (
        reply.status,
        error["param"].as_str().unwrap_or_default().into(),
        error["message"].as_str().unwrap().into(),
    )
}

/// A schema whose values are all bounded, so that every answer ends.
fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    })
}

fn assert_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    assert!(value["name"].as_str().unwrap().chars().count() <= 8, "{text}");
    assert!((0..=150).contains(&value["age"].as_i64().unwrap()), "{text}");
    let tags = value["tags"].as_array().unwrap();
    assert!(tags.len() <= 2 && tags.iter().all(|tag| tag == "a" || tag == "b"), "{text}");
    assert_eq!(value.as_object().unwrap().len(), 3);
}

#[test]
fn every_way_to_ask_for_a_form_is_obeyed() {
    let server = demo();
    let named = json!({"name": "person", "strict": true, "description": "x", "schema": person()});
    for (request, check) in [
        (
            json!({"response_format": {"type": "json_schema", "json_schema": named}}),
            assert_person as fn(&str),
        ),
        (json!({"structured_outputs": {"json": person(), "disable_any_whitespace": true}}), assert_person),
        (
            json!({"structured_outputs": {"json": person().to_string(), "whitespace_pattern": " ?"}}),
            assert_person,
        ),
        (json!({"guided_json": person()}), assert_person),
        (json!({"structured_outputs": {"regex": "[a-c]{3}-\\d{2}"}}), |text| {
            assert!(text.len() == 6 && text.as_bytes()[3] == b'-', "{text}");
        }),
        (json!({"guided_regex": "^(yes|no)$"}), |text| assert!(["yes", "no"].contains(&text), "{text}")),
        (json!({"structured_outputs": {"choice": ["red", "green"]}}), |text| {
            assert!(["red", "green"].contains(&text), "{text}");
        }),
        (json!({"guided_choice": ["left", "right"]}), |text| {
            assert!(["left", "right"].contains(&text), "{text}")
        }),
        (json!({"structured_outputs": {"grammar": "start: \"(\" N \")\"\nN: /[0-9]{1,3}/"}}), |text| {
            text[1..text.len() - 1].parse::<u16>().unwrap();
        }),
        (json!({"guided_grammar": "root ::= \"<\" [a-z]{2} \">\""}), |text| {
            assert_eq!(text.len(), 4, "{text}")
        }),
    ] {
        for temperature in [0.0, 1.0] {
            let request = with(request.clone(), &json!({"temperature": temperature}));
            for reply in [complete(&server, &request), chat(&server, &request)] {
                let (text, finish) = text(&reply);
                check(&text);
                assert_eq!(finish, "stop", "{reply:?}");
            }
        }
    }
    // An object of any kind may be longer than the answer; as far as it goes, it is one.
    let (object, finish) = text(&chat(&server, &json!({"response_format": {"type": "json_object"}})));
    assert!(object.trim_start().starts_with('{'), "{object}");
    if finish == "stop" {
        assert!(serde_json::from_str::<Value>(&object).unwrap().is_object());
    }
    let (_, finish) = text(&chat(
        &server,
        &json!({"response_format": {"type": "text"}, "max_tokens": 3, "ignore_eos": true}),
    ));
    assert_eq!(finish, "length");
}

#[test]
fn a_form_goes_with_the_other_fields() {
    let server = demo();
    let choice = |more: Value| {
        with(json!({"structured_outputs": {"choice": ["a long choice", "another choice"]}}), &more)
    };
    let whole = ["a long choice", "another choice"];
    // The text ends where it is complete, whatever the rules about ends say.
    for more in [
        json!({"ignore_eos": true}),
        json!({"min_tokens": 100}),
        json!({"min_tokens": 100, "ignore_eos": true}),
    ] {
        let (text, finish) = text(&complete(&server, &choice(more)));
        assert!(whole.contains(&text.as_str()) && finish == "stop", "{text} {finish}");
    }
    // ... and goes on as long as it can.
    let many = json!({"structured_outputs": {"regex": "(ab){1,9}"}, "min_tokens": 150, "temperature": 1});
    assert_eq!(text(&complete(&server, &many)).0, "ab".repeat(9));
    let (cut, finish) = text(&complete(&server, &choice(json!({"max_tokens": 2}))));
    assert!(whole.iter().any(|text| text.starts_with(&cut)) && finish == "length", "{cut} {finish}");
    let (stopped, finish) = text(&complete(&server, &choice(json!({"stop": "choice"}))));
    assert!(["a long ", "another "].contains(&stopped.as_str()) && finish == "stop", "{stopped}");
    // A bias decides among what is allowed, and only there.
    for (at, text_of) in whole.iter().enumerate() {
        let first = common::ids(&text_of[..1]);
        assert_eq!(first.len(), 1);
        let digits = json!({"structured_outputs": {"choice": ["0", "1"]}, "logit_bias": {common::ids(&at.to_string())[0].to_string(): 100}});
        assert_eq!(text(&complete(&server, &digits)).0, at.to_string());
    }
    let impossible = choice(json!({"allowed_token_ids": common::ids("z")}));
    let (status, _, message) = error(&complete(&server, &impossible));
    assert!(status == 400 && message.contains("no token that the grammar allows"), "{message}");
    // Choices of one request are drawn apart, and scored.
    let reply = complete(&server, &choice(json!({"n": 3, "logprobs": 2, "temperature": 1})));
    for choice in reply.json()["choices"].as_array().unwrap() {
        assert!(whole.contains(&choice["text"].as_str().unwrap()), "{choice}");
        let scores = &choice["logprobs"];
        assert_eq!(
            scores["tokens"].as_array().unwrap().len(),
            scores["token_logprobs"].as_array().unwrap().len()
        );
    }
}

#[test]
fn a_stream_is_the_whole_answer() {
    let server = demo();
    for request in [json!({"guided_json": person()}), json!({"guided_regex": "é{3}(x|y)+z"})] {
        let (whole, finish) = text(&complete(&server, &request));
        let events = complete(&server, &with(request, &json!({"stream": true}))).events();
        let streamed: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
        assert_eq!(streamed, whole);
        assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], json!(finish));
    }
}

#[test]
fn what_is_no_form_is_refused_before_it_is_queued() {
    let mock = Arc::new(Mock::saying("ok<|im_end|>"));
    let server = Running::start(&mock, Config::default());
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    let cycle = json!({"$ref": "https://example.com/a"});
    for (request, param, expected) in [
        (
            json!({"response_format": {"type": "structural_tag", "structures": []}}),
            "response_format.type",
            "structural_tag",
        ),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema", "is missing"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
            "response_format.json_schema.schema",
            "is missing",
        ),
        (json!({"response_format": "json"}), "response_format", "must be an object"),
        (
            json!({"response_format": {"type": "json_object", "schema": {}}}),
            "response_format.schema",
            "not supported",
        ),
        (schema(json!({"type": 3})), "response_format.json_schema.schema", "type must be"),
        (schema(cycle.clone()), "response_format.json_schema.schema", "https://example.com/a"),
        (schema(json!({"uniqueItems": true})), "response_format.json_schema.schema", "uniqueItems"),
        (json!({"guided_json": cycle}), "guided_json", "https://example.com/a"),
        (json!({"guided_json": "{"}), "guided_json", "not valid JSON"),
        (json!({"guided_json": 5}), "guided_json", "must be a JSON schema"),
        (json!({"guided_regex": "(a"}), "guided_regex", "unclosed group"),
        (json!({"guided_regex": "(a{3000}){3000}"}), "guided_regex", "repetitions"),
        (json!({"guided_regex": "(?=a)b"}), "guided_regex", "look-around"),
        (json!({"guided_choice": []}), "guided_choice", "is empty"),
        (json!({"guided_choice": ["a", 1]}), "guided_choice[1]", "must be a string"),
        (json!({"guided_grammar": "root ::= a"}), "guided_grammar", "`a` is used and not defined"),
        (
            json!({"structured_outputs": {"structural_tag": "{}"}}),
            "structured_outputs.structural_tag",
            "not supported",
        ),
        (
            json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
            "structured_outputs.choice",
            "structured_outputs.regex",
        ),
        (
            json!({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}),
            "structured_outputs",
            "need json",
        ),
        (
            json!({"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": true}}),
            "structured_outputs.whitespace_pattern",
            "disable_any_whitespace",
        ),
        (json!({"structured_outputs": {"backend": "x"}}), "structured_outputs.backend", "not supported"),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice", "guided_regex"),
        (
            json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
            "structured_outputs.regex",
            "response_format",
        ),
    ] {
        for reply in [complete(&server, &request), chat(&server, &request)] {
            let (status, field, message) = error(&reply);
            assert_eq!((status, field.as_str()), (400, param), "{request}: {message}");
            assert!(message.contains(expected), "{request}: {message}");
        }
    }
    assert_eq!(mock.submissions.lock().unwrap().len(), 0);
    // What asks for nothing is no constraint.
    for request in [
        json!({"structured_outputs": {}}),
        json!({"structured_outputs": {"json_object": false}}),
        json!({"response_format": null}),
    ] {
        assert_eq!(complete(&server, &request).status, 200);
        assert!(mock.last().grammar.is_none());
    }
}

fn tools() -> Value {
    let weather = json!({"name": "weather", "strict": true, "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["city", "days"], "additionalProperties": false}});
    let now = json!({"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": false}});
    json!([{"type": "function", "function": weather}, {"type": "function", "function": now}])
}

fn calls(choice: &Value) -> Vec<(String, String)> {
    let call = |call: &Value| {
        assert_eq!(call["type"], "function");
        assert!(call["id"].is_string() && call.get("index").is_none());
        let text = |field: &str| call["function"][field].as_str().unwrap().to_owned();
        (text("name"), text("arguments"))
    };
    choice["message"]["tool_calls"].as_array().unwrap().iter().map(call).collect()
}

#[test]
fn forced_tools_are_called() {
    let server = demo();
    let ask = |choice: Value, more: Value| {
        let request = with(json!({"tools": tools(), "tool_choice": choice, "temperature": 1}), &more);
        let reply = chat(&server, &request);
        assert_eq!(reply.status, 200, "{reply:?}");
        let whole = reply.json()["choices"][0].clone();
        // Streamed, the same calls, while they are made.
        let (mut streamed, mut content): (Vec<(String, String)>, String) = Default::default();
        let (mut finish, mut parts) = (Value::Null, 0);
        for event in chat(&server, &with(request, &json!({"stream": true}))).events() {
            let choice = &event["choices"][0];
            content += choice["delta"]["content"].as_str().unwrap_or_default();
            for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
                let index = call["index"].as_u64().unwrap() as usize;
                if index == streamed.len() {
                    assert!(call["id"].is_string());
                    streamed.push((call["function"]["name"].as_str().unwrap().into(), String::new()));
                } else {
                    assert!(call.get("id").is_none() && call["function"].get("name").is_none(), "{call}");
                }
                streamed[index].1 += call["function"]["arguments"].as_str().unwrap_or_default();
                parts += 1;
            }
            finish = choice["finish_reason"].clone();
        }
        assert_eq!(streamed, calls(&whole));
        let at_once = streamed.iter().all(|(name, _)| name == "now");
        assert!(at_once || parts > streamed.len(), "{parts} parts of {} calls", streamed.len());
        assert_eq!(content, whole["message"]["content"].as_str().unwrap_or_default());
        assert_eq!(finish, whole["finish_reason"]);
        whole
    };
    for seed in 0..4 {
        // A model that has not learned to stop calls until it is cut.
        let required = ask(json!("required"), json!({"seed": seed}));
        let mut made = calls(&required);
        match required["finish_reason"].as_str().unwrap() {
            "tool_calls" => assert_eq!(required["message"]["content"], Value::Null),
            "length" => drop(made.pop()),
            other => panic!("{other}"),
        }
        assert!(!made.is_empty());
        for (name, arguments) in made {
            let arguments: Value = serde_json::from_str(&arguments).unwrap();
            match name.as_str() {
                "now" => assert_eq!(arguments, json!({})),
                _ => assert!(
                    ["Rome", "Bern"].contains(&arguments["city"].as_str().unwrap())
                        && arguments["days"].is_u64()
                ),
            }
        }
        let one = ask(json!("required"), json!({"parallel_tool_calls": false, "seed": seed}));
        assert_eq!((calls(&one).len(), &one["finish_reason"]), (1, &json!("tool_calls")));
        assert_eq!(one["message"]["content"], Value::Null);
        let named = ask(json!({"type": "function", "function": {"name": "now"}}), json!({"seed": seed}));
        assert_eq!(
            (calls(&named), &named["finish_reason"]),
            (vec![("now".into(), "{}".into())], &json!("stop"))
        );
    }
    // Cut within its arguments, a call has those that were made.
    let cut = ask(json!({"type": "function", "function": {"name": "weather"}}), json!({"max_tokens": 60}));
    let whole = ask(json!({"type": "function", "function": {"name": "weather"}}), json!({}));
    assert_eq!(cut["finish_reason"], "length");
    let (cut, whole) = (calls(&cut), calls(&whole));
    assert!(
        cut.len() <= 1 && cut.iter().zip(&whole).all(|(cut, whole)| whole.1.starts_with(&cut.1)),
        "{cut:?} {whole:?}"
    );
    for (request, param) in [
        (
            json!({"tools": tools(), "tool_choice": "required", "response_format": {"type": "json_object"}}),
            "tools",
        ),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "other"}}}),
            "tool_choice.function.name",
        ),
        (json!({"tools": tools(), "tool_choice": {"type": "custom"}}), "tool_choice.type"),
        (json!({"tools": tools(), "tool_choice": "sometimes"}), "tool_choice"),
        (json!({"tool_choice": "required"}), "tool_choice"),
    ] {
        assert_eq!(error(&chat(&server, &request)).1, param);
    }
}

#[test]
fn together_they_say_what_they_say_alone() {
    let server = demo();
    let requests: Vec<Value> = (0..24)
        .map(|n| {
            let form = match n % 4 {
                0 => json!({"guided_json": person()}),
                1 => json!({"guided_regex": format!("[a-f]{{{}}}(x|yz)*!", n + 1)}),
                2 => json!({"guided_choice": ["one", "two", "three", "three hundred"]}),
                _ => json!({"ignore_eos": true, "max_tokens": 30}),
            };
            let prompt = "The river runs past the old town. ".repeat(n % 5 + 1);
            with(
                form,
                &json!({"prompt": prompt, "seed": n, "temperature": if n % 3 == 0 { 0.0 } else { 1.0 }}),
            )
        })
        .collect();
    let alone: Vec<_> = requests.iter().map(|request| text(&complete(&server, request))).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let server = &server;
        let start = |request| scope.spawn(move || text(&complete(server, request)));
        let running: Vec<_> = requests.iter().map(start).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn a_form_that_takes_long_keeps_nobody_else_waiting() {
    let engine = Loader::new(ModelRef::Demo).load(&mut |_, _| {}).unwrap();
    let batchable = Batchable::engine(engine, "demo".into(), Defaults::Neutral);
    let batched = Batched::start(batchable, &BatchOptions::default(), |reason| panic!("{reason:?}")).unwrap();
    let mut config = Config::default();
    config.limits.compiling = 1;
    let server = Running::serve(Arc::new(batched), config);
    // Seconds each, one behind the other.
    let slow = |last: usize| {
        let doubling: Vec<String> = (0..40).map(|i| format!("T{i}: T{} T{}", i + 1, i + 1)).collect();
        json!({"guided_grammar": format!("start: T0\n{}\nT40: \"{last}\"", doubling.join("\n"))})
    };
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for last in 0..4 {
            let (server, done) = (&server, &done);
            scope.spawn(move || {
                let (status, param, _) = error(&complete(server, &slow(last)));
                assert_eq!((status, param.as_str()), (400, "guided_grammar"));
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        for _ in 0..3 {
            let (_, finish) = text(&complete(&server, &json!({"max_tokens": 3, "ignore_eos": true})));
            assert_eq!(finish, "length");
        }
        assert!(done.load(Ordering::SeqCst) < 4);
    });
}

#[test]
fn a_form_that_takes_too_long_is_refused() {
    let mock = Arc::new(Mock::saying("ok<|im_end|>"));
    let mut config = Config::default();
    config.limits.compile_time = std::time::Duration::ZERO;
    let server = Running::start(&mock, config);
    let (status, param, message) = error(&complete(&server, &json!({"guided_regex": "a"})));
    assert_eq!((status, param.as_str()), (400, "guided_regex"));
    assert!(message.contains("to compile; simplify it"), "{message}");
    assert_eq!(mock.submissions.lock().unwrap().len(), 0);
}

//! Whatever is drawn through the masks satisfies an independent judge of the same source.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::World;
use longhaul_grammar::{CallCount, Limits, Source, Tool, Whitespace};
use serde_json::{Value, json};

const SEEDS: u64 = 8;

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}, "required": ["name", "age"], "additionalProperties": false}),
        json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"const": "x\"y\\é"}}, "required": ["c"], "additionalProperties": false}),
        json!({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}),
        json!({"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["a", 1, null]}], "items": false, "minItems": 2}),
        json!({"enum": ["red", "green", "ünïcode", 7, true, null, ["x"], {"k": "v"}]}),
        json!({"type": "string", "minLength": 3, "maxLength": 5}),
        json!({"type": "string", "pattern": "^[a-z]{2,4}-\\d{3}$"}),
        json!({"type": "string", "pattern": "^(\\w+)@(\\w+)\\.com$", "maxLength": 24}),
        json!({"type": "string", "format": "date"}),
        json!({"type": "string", "format": "time"}),
        json!({"type": "string", "format": "uuid"}),
        json!({"type": "string", "format": "ipv4"}),
        json!({"type": "integer", "minimum": -17, "exclusiveMaximum": 123}),
        json!({"type": "number", "minimum": 0.5, "maximum": 2.25}),
        json!({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700}),
        json!({"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "string", "enum": ["many", "few"]}]}),
        json!({"oneOf": [{"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["kind", "lives"], "additionalProperties": false}, {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"], "additionalProperties": false}]}),
        json!({"allOf": [{"type": "integer", "minimum": 5, "maximum": 99}, {"maximum": 20}]}),
        json!({"type": "object", "properties": {"point": {"$ref": "#/$defs/point"}}, "required": ["point"], "additionalProperties": false, "$defs": {"point": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 2}}}),
        json!({"$ref": "#/definitions/tree", "definitions": {"tree": {"type": "object", "properties": {"value": {"type": "boolean"}, "children": {"type": "array", "items": {"$ref": "#/definitions/tree"}, "maxItems": 2}}, "required": ["value", "children"], "additionalProperties": false}}}),
        json!({"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}, "maxProperties": 3}),
        json!({"type": "object", "patternProperties": {"^x-[a-z]$": {"type": "boolean"}}, "additionalProperties": false, "minProperties": 1, "maxProperties": 2}),
        json!({"type": ["string", "null"], "maxLength": 4}),
        json!({"type": "object", "properties": {"deep": {"type": "object", "properties": {"deeper": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "maxItems": 2}}, "required": ["deeper"], "additionalProperties": false}}, "required": ["deep"], "additionalProperties": false}),
        json!({"title": "Annotated", "description": "says nothing", "type": "boolean", "default": true, "examples": [false]}),
        json!({"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b", "c"]}, "maxItems": 3}, "score": {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0, "maximum": 1}]}}, "required": ["tags", "score"], "additionalProperties": false}),
        json!({"const": {"a": [1, 2.5, "three", null, {"b": false}]}}),
        json!({"type": "object"}),
        json!({"type": "array"}),
        json!(true),
    ]
}

fn validator(schema: &Value) -> jsonschema::Validator {
    jsonschema::options().should_validate_formats(true).build(schema).unwrap()
}

#[test]
fn every_json_text_satisfies_its_schema() {
    let world = World::new(Limits::default());
    let mut ended = 0;
    let schemas = schemas();
    for (index, schema) in schemas.iter().enumerate() {
        let validator = validator(schema);
        for whitespace in [Whitespace::Flexible, Whitespace::Fixed, Whitespace::Pattern(" {1,3}".into())] {
            let source = Source::JsonSchema(schema.clone(), whitespace);
            for seed in 0..SEEDS {
                let walk = world.walk(&source, seed * 1000 + index as u64, 300, |text| {
                    let value: Value = match serde_json::from_str(text) {
                        Ok(value) => value,
                        // JSON's numbers have no bounds; the judge's have.
                        Err(e) if e.to_string().contains("number out of range") => return,
                        Err(e) => panic!("{schema}: {text:?}: {e}"),
                    };
                    assert!(validator.is_valid(&value), "{schema}: {text:?}");
                });
                ended += u64::from(walk.ended);
            }
        }
    }
    // The others were drawn into values without bounds.
    let all = schemas.len() as u64 * 3 * SEEDS;
    assert!(ended * 10 >= all * 9, "{ended} of {all} texts ended");
}

#[test]
fn fixed_whitespace_is_that_of_json_dumps() {
    let world = World::new(Limits::default());
    let schema = json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}, "b": {"type": "null"}}, "required": ["a", "b"], "additionalProperties": false});
    let source = Source::JsonSchema(schema.clone(), Whitespace::Fixed);
    assert!(world.accepts(&source, r#"{"a": [true, false], "b": null}"#));
    assert!(!world.accepts(&source, r#"{"a":[true,false],"b":null}"#));
    assert!(!world.accepts(&source, r#"{"a": [true, false],  "b": null}"#));
    let source = Source::JsonSchema(schema, Whitespace::Flexible);
    for text in [
        r#"{"a":[true,false],"b":null}"#,
        "{\n    \"a\": [\n        true,\n        false\n    ],\n    \"b\": null\n}",
    ] {
        assert!(world.accepts(&source, text), "{text}");
    }
    for blanks in ["  ", "\n\n", "\t", &" ".repeat(100)] {
        assert!(
            !world.accepts(&source, &format!("{{{blanks}\"a\": [true, false], \"b\": null}}")),
            "{blanks:?}"
        );
    }
}

#[test]
fn json_objects_are_objects() {
    let world = World::new(Limits::default());
    let source = Source::JsonObject(Whitespace::Flexible);
    for text in ["{}", "{\"a\": [1, {\"b\": null}], \"c\": \"\\u00e9\\n\"}", "{ }"] {
        assert!(world.accepts(&source, text), "{text}");
    }
    for text in ["[]", "1", "", "{\"a\"}", "{\"a\": 01}", "{} x"] {
        assert!(!world.accepts(&source, text), "{text}");
    }
}

#[test]
fn every_text_matches_its_regular_expression() {
    let world = World::new(Limits::default());
    for pattern in [
        "[a-z]+",
        "a|bc|d{2,5}",
        "^\\d{3}-\\d{4}$",
        "(yes|no)( really)?",
        "a*",
        "(ab*)*",
        ".{0,10}",
        "[^\\n]{1,8}\\n",
        "\\w+@\\w+\\.(com|org)",
        "é{2}|\\x41|\\u00df",
        "/[/\\\\]/",
        "\"[^\"]*\"",
        "\\p{Lu}{1,3}",
        "(?i)hello",
        "([0-9a-f]{2}:){5}[0-9a-f]{2}",
        "\\[\\d+(,\\d+){0,3}\\]",
    ] {
        let judge = regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
        let source = Source::Regex(pattern.into());
        for seed in 0..SEEDS {
            let walk =
                world.walk(&source, seed, 80, |text| assert!(judge.is_match(text), "{pattern}: {text:?}"));
            assert!(!walk.ended || judge.is_match(&walk.text), "{pattern}: {:?}", walk.text);
        }
    }
    let phone = Source::Regex("\\d{3}-\\d{4}".into());
    assert!(world.accepts(&phone, "555-1234"));
    assert!(!world.accepts(&phone, "555-123") && !world.accepts(&phone, "٥٥٥-1234"));
}

#[test]
fn choices_are_chosen_whole() {
    let world = World::new(Limits::default());
    let choices = ["yes", "no", "no way", "\"quoted\" \\ text\n", "ünï", "<|im_end|>"];
    let source = Source::Choice(choices.iter().map(|text| (*text).to_owned()).collect());
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let walk = world.walk(&source, seed, 100, |text| assert!(choices.contains(&text), "{text:?}"));
        assert!(walk.ended);
        seen.insert(walk.text);
    }
    assert_eq!(seen.len(), choices.len(), "{seen:?}");
    let with_empty = Source::Choice(vec![String::new(), "a".into()]);
    assert!(
        world.accepts(&with_empty, "") && world.accepts(&with_empty, "a") && !world.accepts(&with_empty, "b")
    );
    assert!(world.accepts(&Source::Choice(vec![String::new()]), ""));
}

#[test]
fn grammars_in_both_notations() {
    let world = World::new(Limits::default());
    let lark = Source::Grammar(
        "start: expr\nexpr: term ((\"+\" | \"-\") term)*\nterm: NUMBER | \"(\" expr \")\"\nNUMBER: /[0-9]{1,3}/\n".into(),
    );
    let ebnf = Source::Grammar(
        "root ::= expr # an expression\nexpr ::= term ((\"+\" | \"-\") term)*\nterm ::= number | \"(\" expr \")\"\nnumber ::= [0-9]{1,3}\n".into(),
    );
    for source in [&lark, &ebnf] {
        for text in ["1", "12+3-(4-5)", "((7))"] {
            assert!(world.accepts(source, text), "{source:?} {text}");
        }
        for text in ["", "1+", "(1", "1000", "1 + 2", "a"] {
            assert!(!world.accepts(source, text), "{source:?} {text}");
        }
        for seed in 0..SEEDS {
            world.walk(source, seed, 60, |text| {
                assert_eq!(text.matches('(').count(), text.matches(')').count(), "{text}");
                assert!(text.ends_with(|c: char| c.is_ascii_digit() || c == ')'), "{text}");
            });
        }
    }
    let sql = Source::Grammar(
        "root ::= \"SELECT \" column \" from \" table\ncolumn ::= \"col_1\" | \"col_2\"\ntable ::= \"t\" [0-9]+ ws\nws ::= [ \\t]*".into(),
    );
    assert!(world.accepts(&sql, "SELECT col_2 from t17  ") && !world.accepts(&sql, "SELECT col_3 from t1"));
}

#[test]
fn forced_calls_are_calls_with_arguments_that_fit() {
    let world = World::new(Limits::default());
    let weather = json!({"type": "object", "properties": {"city": {"type": "string", "maxLength": 10}, "days": {"type": "integer", "minimum": 1, "maximum": 14}}, "required": ["city"], "additionalProperties": false});
    let move_to =
        json!({"properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": false});
    let tools = vec![
        Tool { name: "weather".into(), parameters: weather.clone() },
        Tool { name: "move.to-2".into(), parameters: move_to.clone() },
        Tool { name: "now".into(), parameters: Value::Null },
    ];
    let call = |text: &str| -> (String, Value) {
        let inner = text.strip_prefix("<tool_call>\n").and_then(|t| t.strip_suffix("\n</tool_call>"));
        let call: Value = serde_json::from_str(inner.unwrap_or_else(|| panic!("{text:?}"))).unwrap();
        assert_eq!(call.as_object().unwrap().len(), 2);
        (call["name"].as_str().unwrap().to_owned(), call["arguments"].clone())
    };
    let check = |text: &str| {
        let (name, arguments) = call(text);
        match name.as_str() {
            "weather" => assert!(validator(&weather).is_valid(&arguments), "{text}"),
            "move.to-2" => {
                assert!(validator(&move_to).is_valid(&arguments) && arguments.is_object(), "{text}")
            }
            "now" => assert!(arguments.is_object(), "{text}"),
            other => panic!("{other}"),
        }
    };
    for count in [CallCount::One, CallCount::Some] {
        let source = Source::ToolCalls(tools.clone(), count);
        let mut most = 0;
        for seed in 0..30 {
            let walk = world.walk(&source, seed, 400, |text| {
                let calls: Vec<&str> = text.split("\n<tool_call>").collect();
                most = most.max(calls.len());
                for (at, text) in calls.iter().enumerate() {
                    if at == 0 { check(text) } else { check(&format!("<tool_call>{text}")) }
                }
            });
            assert!(walk.ended || walk.text.contains("\"now\""), "{}", walk.text);
        }
        assert_eq!(most > 1, count == CallCount::Some);
    }
    let source = Source::ToolCalls(tools, CallCount::One);
    assert!(world.accepts(
        &source,
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\", \"days\": 3}}\n</tool_call>"
    ));
    assert!(!world.accepts(&source, "<tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>"));
}

#[test]
fn calls_amid_text_are_held_to_their_schemas() {
    let world = World::new(Limits::default());
    let tools = vec![
        Tool {
            name: "set".into(),
            parameters: json!({"properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": false}),
        },
        Tool { name: "free".into(), parameters: Value::Null },
    ];
    let any = Source::ToolCalls(tools.clone(), CallCount::Any);
    let one = Source::ToolCalls(tools, CallCount::AtMostOne);
    let set = "<tool_call>\n{\"name\": \"set\", \"arguments\": {\"on\": true}}\n</tool_call>";
    let free = "<tool_call>\n{\"name\": \"free\", \"arguments\": {\"x\": [1]}}\n</tool_call>";
    for text in [
        "",
        "Just text, with <b>tags</b> and {\"json\": 1}\n",
        "<tool_cal",
        set,
        &format!("Let me see.\n{set}"),
        &format!("{free}\nDone. é"),
    ] {
        assert!(world.accepts(&any, text) && world.accepts(&one, text), "{text}");
    }
    let two = format!("First\n{set}\n{free}");
    assert!(world.accepts(&any, &two) && !world.accepts(&one, &two));
    for text in [
        "<tool_call>",
        "a <tool_call>\n{\"name\": \"set\", \"arguments\": {\"on\": 1}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>",
    ] {
        assert!(!world.accepts(&any, text) && !world.accepts(&one, text), "{text}");
    }
}

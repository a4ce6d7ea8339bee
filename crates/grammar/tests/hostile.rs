//! Sources that break parsers, exhaust memory or never end: each is refused with a reason, or is a grammar that works.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{Random, World};
use longhaul_grammar::{CallCount, GrammarError, Limits, Source, Tool, Whitespace};
use serde_json::{Value, json};

fn schema(schema: Value) -> Source {
    Source::JsonSchema(schema, Whitespace::Flexible)
}

fn nested(levels: usize, inner: Value, wrap: impl Fn(Value) -> Value) -> Value {
    (0..levels).fold(inner, |schema, _| wrap(schema))
}

fn hostile_schemas() -> Vec<Value> {
    let mut all = Vec::new();
    // Depth, of every keyword that nests.
    for levels in [10, 20, 45, 47, 60, 100] {
        for wrap in [
            |s: Value| json!({"items": s}),
            |s: Value| json!({"type": "array", "items": s, "minItems": 1}),
            |s: Value| json!({"type": "object", "properties": {"a": s}, "required": ["a"], "additionalProperties": false}),
            |s: Value| json!({"anyOf": [s, {"type": "null"}]}),
            |s: Value| json!({"oneOf": [s, {"type": "null"}]}),
            |s: Value| json!({"allOf": [s]}),
            |s: Value| json!({"allOf": [s.clone(), {"type": ["object", "string"]}]}),
            |s: Value| json!({"additionalProperties": s}),
            |s: Value| json!({"patternProperties": {"^a": s}}),
            |s: Value| json!({"prefixItems": [s], "items": false}),
            |s: Value| json!({"not": s}),
        ] {
            all.push(nested(levels, json!({"type": "string"}), wrap));
        }
    }
    // References in circles, to nowhere, and abroad.
    for reference in [
        "#",
        "#/",
        "#/$defs/a",
        "#/$defs/missing",
        "#a",
        "a",
        "",
        "https://example.com/schema.json",
        "file:///etc/passwd",
        "http://127.0.0.1:1/",
        "#/$defs/a/",
        "#/$defs/~0~1",
        "#/allOf/0",
        "#/allOf/99999999999999999999",
        "#/%24defs/a",
        "//a",
        "../x",
        "#/definitions",
        "#/$defs/a/properties/b",
    ] {
        all.push(json!({"$ref": reference, "$defs": {"a": {"$ref": "#/$defs/a"}}}));
        all.push(json!({"allOf": [{"$ref": reference}, {"$ref": "#"}], "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}));
        all.push(json!({"type": "object", "properties": {"x": {"$ref": reference}}, "required": ["x"]}));
        all.push(json!({"anyOf": [{"$ref": reference}, {"type": "null"}]}));
    }
    let chain: serde_json::Map<String, Value> = (0..5000)
        .map(|i| {
            (
                format!("d{i}"),
                json!({"type": "object", "properties": {"n": {"$ref": format!("#/$defs/d{}", i + 1)}}}),
            )
        })
        .collect();
    all.push(json!({"$ref": "#/$defs/d0", "$defs": chain}));
    let doubling: serde_json::Map<String, Value> = (0..40)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (
                format!("d{i}"),
                if i == 39 { json!({"type": "null"}) } else { json!({"allOf": [next.clone(), next]}) },
            )
        })
        .collect();
    all.push(json!({"$ref": "#/$defs/d0", "$defs": doubling}));
    let fan: serde_json::Map<String, Value> = (0..30)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (
                format!("d{i}"),
                if i == 29 { json!({"type": "null"}) } else { json!({"anyOf": [next.clone(), next]}) },
            )
        })
        .collect();
    all.push(json!({"$ref": "#/$defs/d0", "$defs": fan}));
    // Sheer size.
    all.push(json!({"enum": (0..20_000).collect::<Vec<_>>()}));
    all.push(json!({"enum": (0..20_000).map(|i| format!("v{i:05}")).collect::<Vec<_>>()}));
    all.push(json!({"enum": (0..60_000).collect::<Vec<_>>()}));
    all.push(json!({"const": "x".repeat(100_000)}));
    all.push(json!({"const": "é".repeat(300_000)}));
    let properties: serde_json::Map<String, Value> =
        (0..2000).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
    all.push(json!({"type": "object", "properties": properties.clone()}));
    all.push(json!({"type": "object", "properties": properties, "additionalProperties": false}));
    all.push(json!({"anyOf": (0..3000).map(|i| json!({"type": "object", "properties": {format!("k{i}"): {"const": i}}})).collect::<Vec<_>>()}));
    all.push(json!({"oneOf": (0..300).map(|i| json!({"const": i})).collect::<Vec<_>>()}));
    all.push(json!({"allOf": (0..1000).map(|i| json!({"anyOf": [{"minimum": i}, {"maximum": i}]})).collect::<Vec<_>>()}));
    all.push(json!({"allOf": (0..24).map(|i| json!({"anyOf": [{"properties": {format!("a{i}"): {"type": "string"}}}, {"properties": {format!("b{i}"): {"type": "null"}}}]})).collect::<Vec<_>>()}));
    // Numbers that are no sizes, and sizes that are no numbers.
    for bad in [
        json!(-1),
        json!(1.5),
        json!(1e30),
        json!(u64::MAX),
        json!("3"),
        json!(null),
        json!([]),
        json!({}),
        json!(4_000_000_000_u64),
    ] {
        for key in [
            "minLength",
            "maxLength",
            "minItems",
            "maxItems",
            "minProperties",
            "maxProperties",
            "multipleOf",
            "minimum",
            "exclusiveMaximum",
        ] {
            all.push(json!({key: bad}));
        }
    }
    for (low, high) in [(5, 3), (1_000_000, 1_000_000), (0, 1_000_000), (100_000, 100_001)] {
        all.push(json!({"type": "string", "minLength": low, "maxLength": high}));
        all.push(json!({"type": "array", "items": {"type": "integer"}, "minItems": low, "maxItems": high}));
        all.push(json!({"type": "object", "minProperties": low, "maxProperties": high}));
        all.push(json!({"type": "integer", "minimum": low, "maximum": high}));
    }
    all.push(json!({"type": "number", "minimum": 1e308, "maximum": 1.1e308}));
    all.push(json!({"type": "integer", "multipleOf": 0}));
    all.push(json!({"type": "number", "multipleOf": 1e-300}));
    all.push(json!({"type": "integer", "multipleOf": 999_999_937}));
    all.push(json!({"allOf": [{"multipleOf": 999_999_937}, {"multipleOf": 999_999_893}], "type": "integer"}));
    // Keywords of the wrong type, unknown ones, unsupported ones.
    for (key, value) in [
        ("type", json!(7)),
        ("type", json!("thing")),
        ("type", json!([])),
        ("type", json!(["string", 3])),
        ("properties", json!([])),
        ("properties", json!({"a": 3})),
        ("required", json!("a")),
        ("required", json!([1])),
        ("enum", json!("a")),
        ("enum", json!([])),
        ("anyOf", json!([])),
        ("anyOf", json!({})),
        ("oneOf", json!([])),
        ("allOf", json!(1)),
        ("items", json!("x")),
        ("pattern", json!(3)),
        ("format", json!("no-such-format")),
        ("format", json!(1)),
        ("$ref", json!(1)),
        ("not", json!({})),
        ("if", json!({})),
        ("uniqueItems", json!(true)),
        ("contains", json!({})),
        ("dependentRequired", json!({"a": ["b"]})),
        ("propertyNames", json!({})),
        ("unevaluatedProperties", json!(false)),
        ("$dynamicRef", json!("#a")),
        ("x-guidance", json!({"lenient": true})),
        ("patternProperties", json!({"(": true})),
        ("patternProperties", json!({"a": true, "a*": true})),
        ("const", json!("é".repeat(99) + "x")),
        ("enum", json!([{"é": "é".repeat(200)}])),
        ("additionalProperties", json!("é".repeat(120))),
    ] {
        all.push(json!({key: value}));
        all.push(json!({"type": "object", key: value}));
    }
    for pattern in hostile_patterns() {
        all.push(json!({"type": "string", "pattern": pattern}));
    }
    all.extend([json!(false), json!(3), json!("object"), json!([]), json!(null)]);
    all
}

fn hostile_patterns() -> Vec<String> {
    let mut all: Vec<String> = [
        "(a{1000}){1000}",
        "((a{100}){100}){100}",
        "(((a{30}){30}){30}){30}",
        "a{1000000}",
        "a{99999999999}",
        "(a|b){0,50000}c",
        "(a*)*",
        "(a+)+b",
        "((a*)*)*b",
        "(a|a)*b",
        "(a|aa)+$",
        "(.*a){20}",
        "(.*)(.*)(.*)(.*)x",
        ".{0,10000}x",
        "[^x]{0,10000}x.{0,10000}",
        "(?=a)b",
        "(?!a)b",
        "(?<=a)b",
        "(?<!a)b",
        "(a)\\1",
        "\\k<n>",
        "(?P<n>a)(?P=n)",
        "(?R)",
        "(?1)",
        "(?(1)a|b)",
        "a**",
        "*",
        "+",
        "?",
        "a{2,1}",
        "a{,",
        "{",
        "}",
        "(",
        ")",
        "()",
        "(|)",
        "[",
        "]",
        "[]",
        "[^]",
        "[a-",
        "[z-a]",
        "[[:alpha:]]",
        "[[:nope:]]",
        "\\",
        "\\x",
        "\\x{110000}",
        "\\u{d800}",
        "\\p{Greek}+",
        "\\p{Nope}",
        "\\P{L}{3}",
        "\\w{200}",
        "\\W{50}",
        "(?u)\\w{100}\\d{100}",
        "\\pL{500}",
        "[\\p{L}&&\\p{Greek}]{3}",
        "(?i)ſ{3}K",
        "(?s).{100}",
        "(?x) a b # c",
        "(?-u)\\xff",
        "(?-u).",
        "\\bword\\b",
        "^$",
        "$^",
        "a$b",
        "^^a",
        "\\A\\z",
        "a\\Zb",
        "(?:)",
        "",
        " ",
        "\n",
        "\0",
        "\u{10ffff}",
        "a|",
        "|a",
        "||",
        "(a|)",
        "x{0}",
        "x{0,0}",
        "\\d{4}-\\d{2}-\\d{2}T\\d{2}:\\d{2}:\\d{2}(\\.\\d+)?Z",
        "(([a-z])+.)+[A-Z]([a-z])+$",
        "^(([a-z0-9])+\\.?)*@x$",
        "(x+x+)+y",
        "[\\s\\S]*[^a][\\s\\S]{400}",
        "(ab|cd|ef){300}gh",
        "/",
        "\\/",
        "//",
        "\"",
        "\\\"",
        "%json {}",
        "a\nstart: b",
        "/\nstart: /x",
        "(?<a>.)(?<a>.)",
    ]
    .map(str::to_owned)
    .into();
    for count in [10, 47, 49, 250, 1000] {
        all.push(format!("{}a{}", "(".repeat(count), ")".repeat(count)));
        all.push(format!("{}a{}", "(".repeat(count), ")*".repeat(count)));
        all.push("(a?".repeat(count) + &")".repeat(count));
        all.push("a?".repeat(count) + &"a".repeat(count));
        all.push("[a-z]*".repeat(count));
        all.push((0..count).map(|i| format!("word{i}")).collect::<Vec<_>>().join("|"));
    }
    all.push("[".repeat(1000));
    all.push("x".repeat(16_000));
    all.push("x".repeat(17_000));
    all.push(".*x".repeat(500));
    all
}

fn hostile_grammars() -> Vec<String> {
    let mut all: Vec<String> = [
        "",
        " ",
        "start:",
        "start: start",
        "start: \"a\" start",
        "start: start \"a\" | \"a\"",
        "start: a\na: b\nb: a",
        "start: a b\na: \nb: ",
        "a: \"x\"",
        "start: missing",
        "start: MISSING",
        "start: \"a\nb\"",
        "start: (\"a\"",
        "start: /(/",
        "start: /a{1000000}/",
        "start: /(a{1000}){1000}/",
        "start: A\nA: B\nB: A",
        "start: \"a\"{1000000}",
        "start: (\"a\"{1000}){1000}",
        "start: ((\"a\"?){1000}){1000}",
        "start: \"a\"~1000000",
        "start: \"a\"~5..2",
        "start: \"a\"{-1}",
        "start: \"a\"* \"a\"* \"a\"* \"a\"* \"a\"*",
        "start: (\"\")*",
        "start: (\"\"*)*",
        "start: a*\na: \"\"",
        "%import common.NOPE",
        "%import python.file",
        "%import /etc/passwd",
        "%declare X\nstart: X",
        "%ignore /(/\nstart: \"a\"",
        "%ignore start\nstart: \"a\"",
        "%override start: \"a\"",
        "start: %json {",
        "start: %json {}",
        "start: %json {\"type\": 3}",
        "start: %json {\"$ref\": \"http://x\"}",
        "start: %regex {\"substring_chars\": \"abc\"}",
        "start: %regex {}",
        "start: %lark { start: %lark { start: \"a\" } }",
        "start: @other",
        "start: @1",
        "start: <nope>",
        "start: <[99999999]>",
        "start: <[1-2",
        "start: <[^*]>",
        "start: <|im_start|> \"a\"",
        "start[temperature=2]: \"a\"",
        "start[max_tokens=0]: /a*/",
        "start[max_tokens=3]: /a*/",
        "start[nope]: \"a\"",
        "start[capture=\"x\"]: \"a\"",
        "start[stop=\"b\"]: /.*/",
        "start[suffix=\"b\"]: /.*/",
        "start[lazy]: /.*b/",
        "start: a\na[lazy]: /.*/",
        "start: ~\"a\"",
        "start: ~(~\"a\")",
        "start: A & B\nA: \"a\"\nB: \"b\"",
        "start: A\nA: /a/ & /b/",
        "start: A\nA: ~/(.|\\n)*/",
        "%llguidance {\"allow_invalid_utf8\": true}\nstart: /./",
        "%llguidance {\"nope\": true}\nstart: \"a\"",
        "%llguidance {",
        "start: \"\\x00\\xff\"",
        "start: \"\\ud800\"",
        "start: \"\u{10ffff}\"",
        "start: \"a\"..\"z\"",
        "start: \"z\"..\"a\"",
        "start: \"ab\"..\"z\"",
        "start::x: \"a\"",
        "start: a::1\na::_: \"x\"",
        "start{x}: x",
        "start: t{\"a\"}\nt{x}: x",
        "start.1: \"a\"",
        "?start: \"a\"",
        "!start: \"a\"",
        "start: \"a\" -> b",
        "START: \"a\"",
        "start: \"a\"\nstart: \"b\"",
        "root ::= root",
        "root ::= root \"a\" | \"a\"",
        "root ::= \"a\"{65535}",
        "root ::= (((((\"a\"{100}){100}){100}){100}){100})",
        "root ::= a\na ::= b\nb ::= a",
        "root ::= [^\\x00-\\U0010FFFF]",
        "root ::= [z-a]",
        "root ::= \"\"",
        "root ::= (\"\")*",
        "root ::= .*",
        "root ::= . . . .",
        "root ::= \"a\"**",
        "root ::= \"a\"+++++++++++++++++++++++++++++++++",
        "{\"grammars\": []}",
        "start: /\\p{L}{1000}/",
        "start: /(?=a)b/",
        "start: /\\1/",
    ]
    .map(str::to_owned)
    .into();
    let chain = |count: usize, last: &str| {
        let rules: Vec<String> = (0..count).map(|i| format!("r{i}: \"a\" r{}", i + 1)).collect();
        format!("start: r0\n{}\nr{count}: {last}", rules.join("\n"))
    };
    all.push(chain(100, "\"b\""));
    all.push(chain(5000, "\"b\""));
    all.push(chain(5000, "r0 | \"b\""));
    let terminals: Vec<String> = (0..3000).map(|i| format!("T{i}: \"a\" T{}", i + 1)).collect();
    all.push(format!("start: T0\n{}\nT3000: \"b\"", terminals.join("\n")));
    let doubling: Vec<String> = (0..40).map(|i| format!("T{i}: T{} T{}", i + 1, i + 1)).collect();
    all.push(format!("start: T0\n{}\nT40: \"b\"", doubling.join("\n")));
    all.push(
        format!("start: T0\n{}\nT40: \"b\"", doubling.join("\n").replace('T', "r"))
            .replace("start: T0", "start: r0")
            .replace("T40", "r40"),
    );
    let ebnf: Vec<String> = (0..5000).map(|i| format!("r{i} ::= \"a\" r{}", i + 1)).collect();
    all.push(format!("root ::= r0\n{}\nr5000 ::= \"b\"", ebnf.join("\n")));
    for count in [20, 29, 40, 500, 20_000] {
        all.push(format!("start: {}\"a\"{}", "(".repeat(count), ")".repeat(count)));
        all.push(format!("root ::= {}\"a\"{}", "(".repeat(count), ")".repeat(count)));
        all.push(format!("start: {}\"a\"{}", "[".repeat(count), "]".repeat(count)));
        all.push(format!("start: %json {}1{}", "[".repeat(count), "]".repeat(count)));
        all.push(format!("start: {}", "~".repeat(count) + "\"a\""));
        all.push(format!("start: {}", vec!["\"a\""; count].join(" | ")));
        all.push(format!("start: /{}a{}/", "(".repeat(count), ")".repeat(count)));
        all.push(format!("start: {}\"a\"{}", "%lark { start: ".repeat(count), " }".repeat(count)));
    }
    all.push(format!("start: \"{}\"", "x".repeat(200_000)));
    all.push(format!("start: \"{}\"", "x".repeat(300_000)));
    all
}

fn corpus() -> Vec<Source> {
    let mut all: Vec<Source> = hostile_schemas().into_iter().map(schema).collect();
    all.extend(hostile_patterns().into_iter().map(Source::Regex));
    all.extend(hostile_patterns().into_iter().map(|p| Source::JsonObject(Whitespace::Pattern(p))));
    all.extend(hostile_grammars().into_iter().map(Source::Grammar));
    let many: Vec<String> = (0..9000).map(|i| format!("choice number {i}")).collect();
    all.push(Source::Choice(many.clone()));
    all.push(Source::Choice([many.clone(), many].concat()));
    all.push(Source::Choice(vec![]));
    all.push(Source::Choice(vec!["\0".into(), "\u{7f}".into(), "\u{2028}".into(), "\\".into()]));
    all.push(Source::Choice(vec!["a".repeat(200_000)]));
    all.push(Source::Choice(vec!["a".repeat(300_000)]));
    for schema in hostile_schemas().into_iter().step_by(9) {
        all.push(Source::ToolCalls(vec![Tool { name: "f".into(), parameters: schema }], CallCount::Some));
    }
    all.push(Source::ToolCalls(vec![], CallCount::One));
    all.push(Source::ToolCalls(
        vec![Tool { name: "\"\\\n</tool_call>".into(), parameters: Value::Null }],
        CallCount::One,
    ));
    all
}

/// A few tokens of a text, as the step loop would draw them: on a thread with an ordinary stack. A matcher may fail; it
/// must say so.
fn follow(world: &World, source: &Source, seed: u64) -> Result<(), String> {
    let grammar = world.compiler.compile(source).map_err(|e| {
        assert!(!matches!(e, GrammarError::Vocabulary(_)), "{e}");
        e.to_string()
    })?;
    let mut matcher = grammar.matcher();
    let mut random = Random::new(seed);
    for _ in 0..24 {
        let ids = match matcher.allowed() {
            Ok(mask) => (0..mask.len() as u32 * 32)
                .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
                .collect::<Vec<_>>(),
            Err(reason) => return Err(reason),
        };
        assert!(!ids.is_empty());
        let id = ids[random.below(ids.len())];
        if id == world.end {
            break;
        }
        matcher.accept(id)?;
    }
    Ok(())
}

#[test]
fn hostile_sources_are_refused_or_work() {
    let world = World::new(Limits::default());
    let corpus = corpus();
    assert!(corpus.len() >= 500, "{}", corpus.len());
    let (mut good, mut bad) = (0, 0);
    let mut slow = Vec::new();
    for (index, source) in corpus.iter().enumerate() {
        let began = std::time::Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| follow(&world, source, index as u64)));
        let shown = || format!("{source:?}").chars().take(200).collect::<String>();
        match result.unwrap_or_else(|_| panic!("{} panicked", shown())) {
            Ok(()) => good += 1,
            Err(reason) => {
                bad += 1;
                assert!(
                    !reason.is_empty() && reason.chars().count() < 500 && !reason.contains('\n'),
                    "{}: {reason}",
                    shown()
                );
                assert!(!reason.contains(".rs") && !reason.contains("backtrace"), "{}: {reason}", shown());
            }
        }
        slow.push((began.elapsed(), index, shown()));
    }
    slow.sort();
    for (time, index, source) in slow.iter().rev().take(12) {
        println!("{time:?} {index} {source}");
    }
    println!("{good} grammars, {bad} refused");
    assert!(good >= 150 && bad >= 150, "{good} grammars, {bad} refused");
    // The compiler has survived.
    assert!(world.accepts(&Source::Choice(vec!["fine".into()]), "fine"));
}

#[test]
fn refusals_say_why() {
    let world = World::new(Limits::default());
    for (source, expected) in [
        (schema(json!({"$ref": "https://example.com/x"})), "https://example.com/x"),
        (schema(json!({"uniqueItems": true})), "uniqueItems"),
        (schema(json!({"enum": vec![0; 60_000]})), "values and keys, at most"),
        (schema(json!({"type": "object", "x-guidance": {"lenient": true}})), "whitespace_pattern"),
        (schema(json!(false)), "no value satisfies"),
        (schema(nested(60, json!({}), |s| json!({"items": s}))), "levels, at most 48"),
        (Source::Regex("(a{2000}){2000}".into()), "repetitions in a regular expression"),
        (Source::Regex("x".repeat(20_000)), "bytes in a regular expression"),
        (Source::Regex("(?=a)b".into()), "look-around"),
        (Source::Regex("(a)\\1".into()), "backreference"),
        (Source::Regex(String::new()), "is empty"),
        (Source::Choice(vec![]), "list of choices is empty"),
        (Source::Grammar("start[temperature=0.5]: \"a\"".into()), "temperature"),
        (Source::Grammar("a: \"b\"".into()), "no start rule"),
        (Source::Grammar("root ::= a".into()), "`a` is used and not defined"),
        (Source::ToolCalls(vec![], CallCount::One), "no tool"),
    ] {
        let error = world.compiler.compile(&source).map(drop).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn ten_thousand_sources_stay_within_the_cache() {
    let limits = Limits { cache_entries: 100, cache_bytes: 4 << 20, ..Limits::default() };
    let world = World::new(limits);
    for number in 0..10_000 {
        let source = Source::Regex(format!("a{number}"));
        world.compiler.compile(&source).unwrap();
        if number % 1000 == 999 {
            let stats = world.compiler.cache();
            assert!(stats.entries <= 100 && stats.bytes <= 4 << 20 && stats.entries > 10, "{stats:?}");
        }
    }
    let before = world.compiler.cache();
    assert_eq!((before.hits, before.misses), (0, 10_000));
    world.compiler.compile(&Source::Regex("a9999".into())).unwrap();
    world.compiler.compile(&Source::Regex("a0".into())).unwrap();
    let after = world.compiler.cache();
    assert_eq!((after.hits, after.misses), (1, 10_001));
}

#[test]
fn texts_share_a_lexer_until_it_is_full() {
    // Every count up to 400 is a state of its own.
    let limits = Limits { lexer_states: 600, ..Limits::default() };
    let world = World::new(limits);
    let source = Source::Regex("(ab?c?){0,400}".into());
    let grammar = world.compiler.compile(&source).unwrap();
    let text = "abcaacab".repeat(12);
    for _ in 0..40 {
        let mut matcher = grammar.matcher();
        for id in world.tokenizer.encode(&text, longhaul_text::SpecialTokens::AsText).unwrap() {
            matcher.allowed().unwrap();
            matcher.accept(id).unwrap();
        }
    }
}

#[test]
fn a_failed_text_fails_alone() {
    let world = World::new(Limits::default());
    let source = Source::Choice(vec!["yes".into(), "no".into()]);
    let grammar = world.compiler.compile(&source).unwrap();
    let (mut good, mut bad) = (grammar.matcher(), grammar.matcher());
    let wrong = world.tokenizer.encode("x", longhaul_text::SpecialTokens::AsText).unwrap()[0];
    assert!(bad.accept(wrong).is_err());
    assert!(bad.allowed().is_err());
    for id in world.tokenizer.encode("yes", longhaul_text::SpecialTokens::AsText).unwrap() {
        assert!(world.ids(good.allowed().unwrap()).contains(&id));
        good.accept(id).unwrap();
    }
    assert_eq!(world.ids(good.allowed().unwrap()), [world.end]);
    assert!(world.accepts(&source, "no"));
}

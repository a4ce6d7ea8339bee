//! Chat templates that try to exhaust time, memory or stack, or to crash: each must end in an error.

use longhaul_text::{ChatTemplate, Message, TextError};

fn render(source: &str) -> Result<String, TextError> {
    let messages = [Message::new("user", "Hi, is 1 < 2?"), Message::new("assistant", "Yes.")];
    ChatTemplate::new(source, None, Some("<|im_end|>"), "model/tokenizer_config.json")?
        .render(&messages, true)
}

/// Peak resident memory of this process in KiB; 0 where the system does not tell.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn corpus() -> Vec<(&'static str, String)> {
    let s = str::to_owned;
    let nest = |n: usize, open: &str, middle: &str, close: &str| open.repeat(n) + middle + &close.repeat(n);
    vec![
        ("nested loops", nest(4, "{% for i in range(90000) %}", "x", "{% endfor %}")),
        (
            "string doubling in a namespace",
            s(
                "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            ),
        ),
        (
            "string doubling with ~",
            s(
                "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            ),
        ),
        (
            "string doubling in a straight line",
            s("{% set a = 'x' * 1000 %}") + &"{% set a = a + a %}".repeat(40),
        ),
        ("string repetition", s("{{ 'x' * 100000000 }}")),
        ("list repetition", s("{% for x in [0] * 100000000 %}{% endfor %}")),
        ("large range", s("{{ range(100000000) | list | length }}")),
        ("one output too long", s("{% for i in range(3000) %}{{ 'x' * 1000 }}{% endfor %}")),
        ("recursive macro", s("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")),
        (
            "two macros that call each other",
            s("{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}"),
        ),
        (
            "macro that branches",
            s("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"),
        ),
        ("recursive loop", s("{% for m in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}")),
        ("deep parentheses", s("{{ ") + &nest(30_000, "(", "1", ")") + " }}"),
        ("deep list", s("{{ ") + &nest(30_000, "[", "1", "]") + " }}"),
        ("deep ifs", nest(3_000, "{% if 1 %}", "x", "{% endif %}")),
        ("deep not", s("{{ ") + &"not ".repeat(15_000) + "1 }}"),
        ("long chain of attributes", s("{{ x") + &".a".repeat(31_000) + " }}"),
        ("long chain of filters", s("{{ 1") + &"|e".repeat(31_000) + "|nosuch }}"),
        ("long chain of sums", s("{{ ''") + &"+x".repeat(31_000) + " }}"),
        ("long chain of ~", s("{{ ''") + &"~x".repeat(31_000) + "|nosuch }}"),
        ("long chain of and", s("{{ 1") + &" and x".repeat(10_000) + "|nosuch }}"),
        ("long chain of or", s("{{ 0") + &" or x".repeat(10_000) + "|nosuch }}"),
        ("long chain of comparisons", s("{{ 1") + &"<x".repeat(31_000) + " }}"),
        ("long chain of powers", s("{{ x") + &"**x".repeat(20_000) + " }}"),
        ("long chain of calls", s("{{ x") + &"()".repeat(31_000) + " }}"),
        (
            "long chain of elif",
            s("{% if x %}") + &"{% elif x %}".repeat(5_000) + "{% else %}{{ nosuch() }}{% endif %}",
        ),
        ("long chain of conditionals", s("{{ 1") + &" if x else 1".repeat(5_000) + "|nosuch }}"),
        ("chain of attributes in a tag of the allowed length", s("{{ x") + &".a".repeat(1_300) + " }}"),
        ("chain of ~ in a tag of the allowed length", s("{{ ''") + &"~x".repeat(1_300) + "|nosuch }}"),
        ("chain of calls in a tag of the allowed length", s("{{ x") + &"()".repeat(1_300) + " }}"),
        ("chain of minus in a tag of the allowed length", s("{{ ") + &"-".repeat(4_000) + "x }}"),
        ("deep minus", s("{{ ") + &"-".repeat(60_000) + "1 }}"),
        (
            "shared lists printed",
            s(
                "{% set ns = namespace(v=[1]) %}{% for i in range(60) %}{% set ns.v = [ns.v, ns.v] %}{% endfor %}{{ ns.v }}",
            ),
        ),
        (
            "shared lists as JSON",
            s(
                "{% set ns = namespace(v=[1]) %}{% for i in range(60) %}{% set ns.v = [ns.v, ns.v] %}{% endfor %}{{ ns.v | tojson }}",
            ),
        ),
        (
            "shared maps as string",
            s(
                "{% set ns = namespace(v={}) %}{% for i in range(60) %}{% set ns.v = {'a': ns.v, 'b': ns.v} %}{% endfor %}{{ ns.v | string | length }}",
            ),
        ),
        (
            "shared lists joined",
            s("{% set a = [1] %}") + &"{% set a = [a, a] %}".repeat(40) + "{{ a | join(',') }}",
        ),
        (
            "shared lists joined by a method",
            s("{% set a = [1] %}") + &"{% set a = [a, a] %}".repeat(40) + "{{ ','.join(a) }}",
        ),
        (
            "deep value",
            s(
                "{% set ns = namespace(v=[1]) %}{% for i in range(20000) %}{% set ns.v = [ns.v] %}{% endfor %}{{ ns.v }}",
            ),
        ),
        ("namespace that holds itself", s("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}")),
        (
            "namespace that holds itself as JSON",
            s("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns | tojson }}"),
        ),
        ("replace that grows", s("{% set a = 'x' * 100000 %}{{ a.replace('x', a) }}")),
        ("replace of nothing that grows", s("{% set a = 'x' * 100000 %}{{ a.replace('', a) }}")),
        ("replace filter that grows", s("{% set a = 'x' * 100000 %}{{ a | replace('x', a) }}")),
        ("join that grows", s("{% set a = 'x' * 100000 %}{{ a.join(range(50000)) }}")),
        ("join filter that grows", s("{% set a = 'x' * 100000 %}{{ range(50000) | join(a) }}")),
        ("split into single characters", s("{{ ('x' * 9000000).split('x') | length }}")),
        ("indent that grows", s("{{ ('x\n' * 10000) | indent(1000000) }}")),
        ("wide tojson", s("{{ [[1]] | tojson(indent=100000000000) }}")),
        ("format method", s("{{ '{:>1000000000}'.format('x') }}")),
        ("format filter", s("{{ '%1000000000d' | format(1) }}")),
        ("wide power", s("{{ 2 ** 100000000 }}")),
        ("include", s("{% include '/etc/passwd' %}")),
        ("import", s("{% import 'os' as os %}")),
        ("extends", s("{% extends 'base' %}")),
        ("attributes of the engine", s("{{ ''.__class__.__mro__[1].__subclasses__() }}")),
        ("attributes of a function", s("{{ raise_exception.__globals__['os'].system('id') }}")),
        ("exception of its own", s("{{ raise_exception('no system messages') }}")),
        ("unclosed block", s("{% for m in messages %}")),
        ("unclosed string", s("{{ 'abc }}")),
        ("unknown filter", s("{{ 'a' | nosuchfilter }}")),
        ("unknown function", s("{{ nosuchfunction() }}")),
        ("unknown block tag", s("{% generation %}x{% endgeneration %}")),
        ("null bytes", s("{{ '\0' \0 }}")),
        ("large source", "x".repeat(300_000)),
        ("large source of blocks", "{% if 1 %}{% endif %}".repeat(1_300) + "{{ x }"),
    ]
}

#[test]
fn every_hostile_template_ends_in_an_error_that_names_the_file() {
    let corpus = corpus();
    assert!(corpus.len() >= 40);
    for (name, source) in corpus {
        let before = peak_kib();
        let result = render(&source);
        let grown = peak_kib().saturating_sub(before);
        let error = result.map(|text| text.len()).expect_err(name);
        assert!(error.to_string().starts_with("model/tokenizer_config.json"), "{name}: {error}");
        // The compiler's own chains have no cost to be stopped by, only a size; a slow machine may need the clock.
        let stopped_by_clock = matches!(error, TextError::TemplateTimeout { .. });
        assert!(
            !stopped_by_clock || name.starts_with("chain"),
            "{name} must be stopped by its cost: {error}"
        );
        assert!(!error.to_string().contains("panicked"), "{name}: {error}");
        assert!(grown < 64 << 10, "{name} took {grown} KiB");
    }
}

//! The command line of `vllm serve`, as far as it is not ours: spellings, a file of settings, and flags that have no effect
//! or no place here. What is neither ours nor in [`FLAGS`] is an error of the parser.

mod flags;

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::exit::UsageError;
use flags::{FLAGS, Fate, Flag, Takes};

/// Short names, of several letters each.
const SHORT: &[(&str, &str)] = &[
    ("-tp", "--tp"),
    ("-pp", "--pipeline-parallel-size"),
    ("-dp", "--data-parallel-size"),
    ("-dpl", "--data-parallel-size-local"),
    ("-dpr", "--data-parallel-rank"),
    ("-dpa", "--data-parallel-address"),
    ("-dpp", "--data-parallel-rpc-port"),
    ("-ep", "--expert-parallel"),
    ("-q", "--quantization"),
    ("-n", "--nnodes"),
    ("-r", "--node-rank"),
    ("-asc", "--api-server-count"),
    ("-cc", "--compilation-config"),
    ("-O", "--compilation-config"),
];

/// Our names of vLLM's flags.
const SPELLINGS: &[(&str, &str)] = &[
    ("--tensor-parallel-size", "--tp"),
    ("--enable-expert-parallel", "--expert-parallel"),
    ("--no-async-scheduling", "--async-scheduling=off"),
];

/// Settings of a file whose `false` says something: they are on unless it does.
const ON_BY_DEFAULT: &[&str] = &["enable-prefix-caching", "enable-chunked-prefill", "async-scheduling"];

/// What is left for the parser, and what has to be said.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// Arguments of ours.
    pub arguments: Vec<String>,
    /// Flags without effect, and why.
    pub warnings: Vec<String>,
}

/// Turns the arguments after `serve` into ours.
///
/// # Errors
/// A flag that asks for what we do not do; a file of settings that cannot be used.
pub fn translate(arguments: Vec<String>) -> Result<Translated, UsageError> {
    let mut arguments: Vec<String> = arguments.into_iter().map(spelled).collect();
    if let Some((path, rest)) = config_file(&arguments)? {
        let given: BTreeSet<String> = rest.iter().filter_map(|word| name(word)).map(str::to_owned).collect();
        let positional = rest.first().is_some_and(|word| !word.starts_with('-'));
        // What the command line says goes before what the file says.
        let mut settings = settings(&path)?;
        settings.retain(|(key, _)| {
            let key = name(&spelled(format!("--{key}"))).map(str::to_owned).unwrap_or_default();
            !(given.contains(&key) || key == "model" && positional)
        });
        arguments = rest;
        arguments.extend(settings.into_iter().flat_map(|(_, words)| words).map(spelled));
    }
    let mut translated = Translated::default();
    let mut words = arguments.into_iter().peekable();
    while let Some(word) = words.next() {
        let Some((flag, denied)) = name(&word).and_then(known) else {
            translated.arguments.push(word);
            continue;
        };
        let mut values: Vec<String> =
            word.split_once('=').map(|(_, value)| value.to_owned()).into_iter().collect();
        let most = match flag.takes {
            Takes::Nothing => 0,
            Takes::One => 1,
            Takes::Many => usize::MAX,
        };
        while values.len() < most && words.peek().is_some_and(|next| !next.starts_with("--")) {
            values.extend(words.next());
        }
        if flag.takes == Takes::One && values.is_empty() {
            return Err(UsageError(format!("--{}: a value is missing", flag.name)));
        }
        // What is denied is what holds anyway, unless it is something that is always on.
        if denied && !ON_BY_DEFAULT.contains(&flag.name) {
            continue;
        }
        match flag.fate {
            Fate::Ignored(why) if denied => return Err(refusal(flag, why)),
            Fate::Ignored(why) => translated.warnings.push(format!("--{} has no effect: {why}", flag.name)),
            Fate::Only(fine, why) => {
                if !values.iter().all(|value| fine.contains(&value.as_str())) {
                    return Err(refusal(flag, why));
                }
            }
            Fate::Refused(why) => return Err(refusal(flag, why)),
        }
    }
    Ok(translated)
}

fn refusal(flag: &Flag, why: &str) -> UsageError {
    // Never the value: it may be a secret.
    UsageError(format!("--{}: {why}", flag.name))
}

/// The name of `--name` or `--name=value`.
fn name(word: &str) -> Option<&str> {
    let word = word.strip_prefix("--")?;
    Some(word.split_once('=').map_or(word, |(name, _)| name)).filter(|name| !name.is_empty())
}

/// The flag of that name, or that `no-…` denies.
fn known(name: &str) -> Option<(&'static Flag, bool)> {
    let find = |name: &str| FLAGS.iter().find(|flag| flag.name == name);
    if let Some(flag) = find(name) {
        return Some((flag, false));
    }
    let flag = find(name.strip_prefix("no-")?)?;
    (flag.takes == Takes::Nothing).then_some((flag, true))
}

/// A flag as we spell it; other words as they are.
fn spelled(word: String) -> String {
    let (head, value) = match word.split_once('=') {
        Some((head, value)) => (head, Some(value)),
        None => (word.as_str(), None),
    };
    let long = if head.starts_with("--") {
        head.replace('_', "-")
    } else if let Some((_, long)) = SHORT.iter().find(|(short, _)| *short == head) {
        (*long).to_owned()
    } else if let Some(level) = head.strip_prefix("-O") {
        format!("--compilation-config={level}")
    } else {
        return word;
    };
    let long =
        SPELLINGS.iter().find(|(theirs, _)| *theirs == long).map_or(long, |(_, ours)| (*ours).to_owned());
    match value {
        Some(value) => format!("{long}={value}"),
        None => long,
    }
}

/// The file of `--config`, and the arguments without it.
fn config_file(arguments: &[String]) -> Result<Option<(String, Vec<String>)>, UsageError> {
    let Some(at) = arguments.iter().position(|word| name(word) == Some("config")) else { return Ok(None) };
    let mut rest = arguments.to_vec();
    let word = rest.remove(at);
    let path = match word.split_once('=') {
        Some((_, path)) => path.to_owned(),
        None if at < rest.len() => rest.remove(at),
        None => return Err(UsageError("--config: a file is missing".into())),
    };
    Ok(Some((path, rest)))
}

/// The settings of a YAML file, each with the words that say the same.
fn settings(path: &str) -> Result<Vec<(String, Vec<String>)>, UsageError> {
    let unusable = |reason: String| UsageError(format!("--config {path}: {reason}"));
    let text = std::fs::read_to_string(Path::new(path)).map_err(|e| unusable(e.to_string()))?;
    let map: Map<String, Value> = serde_saphyr::from_str(&text)
        .map_err(|e| unusable(format!("a YAML file with a setting a line is expected: {e}")))?;
    let mut settings = Vec::with_capacity(map.len());
    for (key, value) in map {
        let key = key.replace('_', "-");
        let flag = format!("--{key}");
        let scalar = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(value) => Some(value.to_string()),
            _ => None,
        };
        let words = match &value {
            Value::Null => vec![],
            Value::Bool(true) => vec![flag],
            Value::Bool(false) if ON_BY_DEFAULT.contains(&key.as_str()) => vec![format!("--no-{key}")],
            Value::Bool(false) => vec![],
            Value::Array(items) => {
                let items: Option<Vec<String>> = items.iter().map(scalar).collect();
                let items =
                    items.ok_or_else(|| unusable(format!("{key}: a list of plain values is expected")))?;
                std::iter::once(flag).chain(items).collect()
            }
            Value::Object(_) => vec![format!("{flag}={value}")],
            plain => vec![format!("{flag}={}", scalar(plain).unwrap_or_default())],
        };
        settings.push((key, words));
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn ours(line: &str) -> String {
        translate(words(line)).unwrap_or_else(|e| panic!("{line}: {e}")).arguments.join(" ")
    }

    fn refused(line: &str) -> String {
        translate(words(line)).map(|t| t.arguments).expect_err(line).to_string()
    }

    #[test]
    fn spellings_are_ours() {
        for (theirs, wanted) in [
            ("-tp 2 --max_model_len 4096", "--tp 2 --max-model-len 4096"),
            ("--tensor-parallel-size=4", "--tp=4"),
            ("--tensor_parallel_size 4", "--tp 4"),
            ("--enable-expert-parallel", "--expert-parallel"),
            ("--no-async-scheduling", "--async-scheduling=off"),
            ("--async-scheduling", "--async-scheduling"),
            // What is ours, and what nobody knows, is the parser's affair.
            ("demo --port 8000 --nonsense x", "demo --port 8000 --nonsense x"),
            // Values are never spelled anew.
            ("--served-model-name my_model --uds /run/a_b", "--served-model-name my_model --uds /run/a_b"),
        ] {
            assert_eq!(ours(theirs), wanted, "{theirs}");
        }
    }

    #[test]
    fn flags_without_effect_are_named_and_gone() {
        let line = "demo --swap-space 4 --distributed-executor-backend=ray -O3 --enable-chunked-prefill \
             --compilation-config {\"level\":3} --cuda-graph-sizes 1 2 4 --trust-remote-code --port 1";
        let translated = translate(words(line)).unwrap();
        assert_eq!(translated.arguments, words("demo --port 1"));
        let warned: Vec<&str> = translated.warnings.iter().map(|w| w.split(' ').next().unwrap()).collect();
        assert_eq!(
            warned,
            [
                "--swap-space",
                "--distributed-executor-backend",
                "--compilation-config",
                "--enable-chunked-prefill",
                "--compilation-config",
                "--cuda-graph-sizes",
                "--trust-remote-code"
            ]
        );
        // What they deny holds anyway.
        assert_eq!(
            translate(words("--no-enable-lora --no-trust-remote-code")).unwrap(),
            Translated::default()
        );
    }

    #[test]
    fn what_we_do_not_do_is_refused_with_the_reason() {
        assert_eq!(ours("-pp 1 --data-parallel-size=1 --quantization none --kv-events-config {}"), "");
        for (line, flag, reason) in [
            ("-pp 2", "--pipeline-parallel-size", "--tp"),
            ("--data-parallel-size=8", "--data-parallel-size", "load balancer"),
            ("-q awq", "--quantization", "quantised"),
            ("--enable-lora", "--enable-lora", "merged"),
            ("--lora-modules a=b c=d", "--lora-modules", "merged"),
            ("--no-enable-chunked-prefill", "--enable-chunked-prefill", "always"),
            ("--swap-space", "--swap-space", "value is missing"),
        ] {
            let message = refused(line);
            assert!(message.starts_with(flag) && message.contains(reason), "{message}");
        }
        // A secret is not repeated.
        for line in ["--api-key canary", "--api-key=canary", "--hf-token canary"] {
            let message = refused(line);
            assert!(!message.contains("canary") && message.contains("use "), "{message}");
        }
    }

    #[test]
    fn a_file_of_settings_says_what_the_command_line_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = dir.path().join("settings.yaml");
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let path = file(
            "model: a/b\nport: 9000\nmax_model_len: 4096\nserved-model-name: [one, two]\nenable-prefix-caching: false\n\
             enable-log-requests: true\nenable-log-outputs: false\ntensor-parallel-size: 2\nseed: null\nswap-space: 4\n\
             speculative-config: {method: ngram, num_speculative_tokens: 5}\n",
        );
        let translated = translate(words(&format!("--config {path} --port 1 -tp 4"))).unwrap();
        assert_eq!(
            translated.arguments.join(" "),
            "--port 1 --tp 4 --model=a/b --max-model-len=4096 --served-model-name one two --no-enable-prefix-caching \
             --enable-log-requests --speculative-config={\"method\":\"ngram\",\"num_speculative_tokens\":5}"
        );
        assert!(translated.warnings[0].starts_with("--swap-space has no effect"));
        // A model in front goes before the file's.
        assert!(!ours(&format!("c/d --config={path}")).contains("a/b"));
        let path = file("pipeline-parallel-size: 2\n");
        assert!(refused(&format!("--config {path}")).contains("--pipeline-parallel-size"));
        for (text, reason) in
            [("- a\n", "YAML"), ("a: [", "YAML"), ("served-model-name: [[x]]\n", "served-model-name")]
        {
            let path = file(text);
            let message = refused(&format!("--config {path}"));
            assert!(message.contains(&path) && message.contains(reason), "{message}");
        }
        assert!(refused("--config /no/such/file").contains("/no/such/file"));
        assert!(refused("--config").contains("missing"));
    }

    #[test]
    fn the_table_in_the_documents_is_this_one() {
        let document = include_str!("../../../docs/vllm-flags.md");
        let mut names = BTreeSet::new();
        for Flag { name, fate, .. } in FLAGS {
            assert!(names.insert(*name), "--{name} is there twice");
            let row = |reason: &str| {
                let of = |line: &&str| line.starts_with(&format!("| `--{name}` |")) && line.contains(reason);
                assert_eq!(
                    document.lines().filter(of).count(),
                    1,
                    "--{name} in docs/vllm-flags.md: {reason}"
                );
            };
            match fate {
                Fate::Ignored(why) | Fate::Only(_, why) | Fate::Refused(why) => row(why),
            }
        }
    }
}

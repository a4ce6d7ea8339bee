use llguidance::api::TopLevelGrammar;
use llguidance::{JsonCompileOptions, regex_to_lark};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::ebnf;
use crate::error::GrammarError;
use crate::limits::Limits;
use crate::tools::{self, CallCount, Tool};

/// White space between two tokens of JSON, as printers put it: a blank, or a line's end and the next line's indentation.
/// Without a bound, a model that has lost the thread writes blanks until its budget is used up.
const BLANKS: &str = r" |\r?\n[ \t]{0,40}";

/// What a text has to look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// Any JSON object.
    JsonObject(Whitespace),
    /// JSON that satisfies a JSON schema.
    JsonSchema(Value, Whitespace),
    /// Text that a regular expression matches as a whole. `\d`, `\w` and `\s` are ASCII.
    Regex(String),
    /// Text of a context-free grammar, in Lark's notation or, with rules `name ::= …`, in EBNF as GBNF has it.
    Grammar(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Calls of tools in the Hermes format.
    ToolCalls(Vec<Tool>, CallCount),
}

/// White space between the tokens of JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Whitespace {
    /// A blank, or a new line with its indentation, where the model likes.
    #[default]
    Flexible,
    /// One blank behind commas and colons, none elsewhere.
    Fixed,
    /// What a regular expression matches, or none.
    Pattern(String),
}

impl Source {
    /// A name for what the cache keeps: equal for equal sources, different for others.
    pub(crate) fn digest(&self) -> [u8; 32] {
        // The derived format spells every part out, with its kind, and quotes all strings.
        Sha256::digest(format!("{self:?}").as_bytes()).into()
    }

    /// Bytes of the source.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::JsonObject(whitespace) => whitespace.bytes(),
            Self::JsonSchema(schema, whitespace) => schema_bytes(schema) + whitespace.bytes(),
            Self::Regex(text) | Self::Grammar(text) => text.len(),
            Self::Choice(choices) => choices.iter().map(String::len).sum(),
            Self::ToolCalls(tools, _) => {
                tools.iter().map(|tool| tool.name.len() + schema_bytes(&tool.parameters)).sum()
            }
        }
    }

    /// The grammar as the library takes it, once the source is within `limits`.
    ///
    /// # Errors
    /// What is too large, and what can be seen to be wrong without compiling it.
    pub(crate) fn grammar(&self, limits: &Limits) -> Result<TopLevelGrammar, GrammarError> {
        match self {
            Self::JsonObject(whitespace) => {
                Ok(TopLevelGrammar::from_json_schema(whitespace.schema(&json!({"type": "object"}), limits)?))
            }
            Self::JsonSchema(schema, whitespace) => {
                Ok(TopLevelGrammar::from_json_schema(whitespace.schema(schema, limits)?))
            }
            Self::Regex(pattern) => {
                limits.check_regex(pattern)?;
                let pattern = whole(pattern);
                if pattern.is_empty() {
                    return Err(GrammarError::invalid("the regular expression is empty"));
                }
                Ok(TopLevelGrammar::from_lark(format!("start: /{}/", regex_to_lark(pattern, "dws"))))
            }
            Self::Grammar(text) => {
                Limits::check("bytes", text.len(), limits.bytes)?;
                if ebnf::is_ebnf(text) {
                    return Ok(TopLevelGrammar::from_lark(ebnf::to_lark(text)?));
                }
                check_lark(text)?;
                Ok(TopLevelGrammar::from_lark(text.clone()))
            }
            Self::Choice(choices) => {
                Limits::check("choices", choices.len(), limits.choices)?;
                Limits::check("bytes", self.bytes(), limits.bytes)?;
                if choices.is_empty() {
                    return Err(GrammarError::invalid("the list of choices is empty"));
                }
                let empty = if choices.iter().any(String::is_empty) { " | \"\"" } else { "" };
                let texts: Vec<String> =
                    choices.iter().filter(|text| !text.is_empty()).map(|text| literal(text)).collect();
                Ok(TopLevelGrammar::from_lark(match texts.as_slice() {
                    [] => "start: \"\"".into(),
                    texts => format!("start: CHOICE{empty}\nCHOICE: {}", texts.join(" | ")),
                }))
            }
            Self::ToolCalls(tools, count) => tools::grammar(tools, *count, limits),
        }
    }
}

impl Whitespace {
    fn bytes(&self) -> usize {
        match self {
            Self::Pattern(pattern) => pattern.len(),
            Self::Flexible | Self::Fixed => 0,
        }
    }

    /// `schema` with the options of the library in it.
    ///
    /// # Errors
    /// A schema or pattern outside of `limits`, and a schema with options of its own.
    pub(crate) fn schema(&self, schema: &Value, limits: &Limits) -> Result<Value, GrammarError> {
        limits.check_schema(schema)?;
        let mut schema = match schema {
            Value::Bool(true) => json!({}),
            Value::Bool(false) => return Err(GrammarError::invalid("no value satisfies the schema `false`")),
            Value::Object(map) if map.contains_key("x-guidance") => {
                return Err(GrammarError::invalid(
                    "x-guidance is not supported in a schema; use disable_any_whitespace or whitespace_pattern",
                ));
            }
            Value::Object(_) => schema.clone(),
            _ => return Err(GrammarError::invalid("a JSON schema must be an object or a boolean")),
        };
        let mut options =
            JsonCompileOptions { json_allow_general_unicode_escapes: true, ..Default::default() };
        match self {
            Self::Flexible => options.whitespace_pattern = Some(BLANKS.into()),
            Self::Fixed => {
                options.whitespace_flexible = false;
                options.item_separator = ", ".into();
                options.key_separator = ": ".into();
            }
            Self::Pattern(pattern) => {
                limits.check_regex(pattern)?;
                options.whitespace_pattern = Some(whole(pattern).to_owned());
            }
        }
        options.apply_to(&mut schema);
        Ok(schema)
    }
}

/// A text in the notation of the library's grammars.
pub(crate) fn literal(text: &str) -> String {
    // JSON's escapes are among them, but a control character is no part of a string there.
    let quoted = Value::String(text.to_owned()).to_string();
    quoted.replace('\u{7f}', "\\u007f")
}

/// A pattern without the anchors around it: it is to match the whole text anyway. Where they belong to one alternative
/// only, they stay, and the library refuses them.
fn whole(pattern: &str) -> &str {
    let Some(inner) = pattern.strip_prefix('^') else { return pattern };
    let Some(inner) = inner.strip_suffix('$') else { return pattern };
    let escapes = inner.bytes().rev().take_while(|byte| *byte == b'\\').count();
    if escapes % 2 == 1 || has_alternatives(inner) { pattern } else { inner }
}

/// Whether a pattern is an alternation at its top.
fn has_alternatives(pattern: &str) -> bool {
    let (mut depth, mut in_class) = (0_usize, false);
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => {
                characters.next();
            }
            '[' => in_class = true,
            ']' => in_class = false,
            '(' if !in_class => depth += 1,
            ')' if !in_class => depth = depth.saturating_sub(1),
            '|' if !in_class && depth == 0 => return true,
            _ => {}
        }
    }
    false
}

/// # Errors
/// Attributes of rules that ask for something else than a form of the text.
fn check_lark(text: &str) -> Result<(), GrammarError> {
    for line in text.lines() {
        let head = line.split(':').next().unwrap_or_default();
        let attributes = head.split_once('[').map(|(_, attributes)| attributes).unwrap_or_default();
        if attributes.contains("temperature") {
            return Err(GrammarError::invalid(
                "the temperature of a rule is not supported; set the request's temperature",
            ));
        }
    }
    Ok(())
}

fn schema_bytes(schema: &Value) -> usize {
    match schema {
        Value::String(text) => text.len() + 2,
        Value::Array(items) => items.iter().map(schema_bytes).sum::<usize>() + 2,
        Value::Object(map) => {
            map.iter().map(|(key, value)| key.len() + 3 + schema_bytes(value)).sum::<usize>() + 2
        }
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_around_a_whole_pattern_go() {
        for (pattern, expected) in [
            ("^a$", "a"),
            ("a", "a"),
            ("^(a|b)$", "(a|b)"),
            ("^[|]$", "[|]"),
            ("^a|b$", "^a|b$"),
            ("^a\\$", "^a\\$"),
            ("^a\\\\$", "a\\\\"),
            ("^a", "^a"),
        ] {
            assert_eq!(whole(pattern), expected);
        }
    }

    #[test]
    fn equal_sources_have_equal_names() {
        let regex = |text: &str| Source::Regex(text.into()).digest();
        assert_eq!(regex("a"), regex("a"));
        assert_ne!(regex("a"), regex("b"));
        assert_ne!(regex("a"), Source::Grammar("a".into()).digest());
        let choice = |texts: &[&str]| Source::Choice(texts.iter().map(|t| (*t).into()).collect()).digest();
        assert_ne!(choice(&["a", "b"]), choice(&["a\", \"b"]));
    }
}

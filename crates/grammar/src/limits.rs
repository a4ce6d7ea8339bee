//! What is refused before the library sees it.

use llguidance::api::ParserLimits;
use serde_json::Value;

use crate::error::GrammarError;

/// Bounds of sources, of the library's work on them, and of what is kept. The defaults are above what applications send
/// (the largest published schemas have a few hundred kilobytes) and below what hurts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a source.
    pub bytes: usize,
    /// Bytes of a regular expression.
    pub regex_bytes: usize,
    /// Levels of a JSON schema, and of groups in a regular expression.
    pub depth: usize,
    /// Values and keys of a JSON schema.
    pub nodes: usize,
    /// Entries of a list of choices.
    pub choices: usize,
    /// Repetitions that a regular expression may ask for, nested ones multiplied.
    pub repetitions: usize,
    /// Symbols of a compiled grammar.
    pub grammar_size: usize,
    /// Work units of the library for building a lexer, tens of thousands of which take a millisecond.
    pub lexer_fuel: u64,
    /// Work units for a mask.
    pub mask_fuel: u64,
    /// Parser items for a mask.
    pub mask_items: usize,
    /// States of a lexer, of one or two kilobytes each.
    pub lexer_states: usize,
    /// Bytes of compiled grammars that are kept for the next request that asks for them.
    pub cache_bytes: usize,
    /// Compiled grammars that are kept.
    pub cache_entries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 256 << 10,
            regex_bytes: 16 << 10,
            depth: 48,
            nodes: 50_000,
            choices: 10_000,
            repetitions: 1 << 20,
            grammar_size: 200_000,
            lexer_fuel: 1_000_000,
            mask_fuel: 200_000,
            mask_items: 50_000,
            lexer_states: 20_000,
            cache_bytes: 128 << 20,
            cache_entries: 128,
        }
    }
}

impl Limits {
    pub(crate) fn parser(&self) -> ParserLimits {
        ParserLimits {
            initial_lexer_fuel: self.lexer_fuel,
            step_lexer_fuel: self.mask_fuel,
            step_max_items: self.mask_items,
            max_lexer_states: self.lexer_states,
            max_grammar_size: self.grammar_size,
            verbose_errors: false,
            ..ParserLimits::default()
        }
    }

    pub(crate) fn check(what: &'static str, actual: usize, limit: usize) -> Result<(), GrammarError> {
        if actual > limit { Err(GrammarError::TooLarge { what, actual, limit }) } else { Ok(()) }
    }

    /// # Errors
    /// A schema with too many levels or values, and regular expressions in it that are too large.
    pub(crate) fn check_schema(&self, schema: &Value) -> Result<(), GrammarError> {
        // By hand, so that a hostile depth needs no stack.
        let mut todo = vec![(schema, 1)];
        let (mut nodes, mut bytes) = (0, 0);
        while let Some((value, depth)) = todo.pop() {
            nodes += 1;
            Self::check("levels", depth, self.depth)?;
            match value {
                Value::Array(items) => todo.extend(items.iter().map(|item| (item, depth + 1))),
                Value::Object(map) => {
                    nodes += map.len();
                    bytes += map.keys().map(String::len).sum::<usize>();
                    if let Some(Value::String(pattern)) = map.get("pattern") {
                        self.check_regex(pattern)?;
                    }
                    if let Some(Value::Object(patterns)) = map.get("patternProperties") {
                        patterns.keys().try_for_each(|pattern| self.check_regex(pattern))?;
                    }
                    todo.extend(map.values().map(|value| (value, depth + 1)));
                }
                Value::String(text) => bytes += text.len(),
                _ => bytes += 4,
            }
            Self::check("values and keys", nodes, self.nodes)?;
            Self::check("bytes", bytes, self.bytes)?;
        }
        Ok(())
    }

    /// # Errors
    /// A pattern that is too long, nested too deeply, or repeats too often.
    pub(crate) fn check_regex(&self, pattern: &str) -> Result<(), GrammarError> {
        Self::check("bytes in a regular expression", pattern.len(), self.regex_bytes)?;
        // The product of nested counts, innermost last; each entry belongs to an open group.
        let mut groups: Vec<usize> = Vec::new();
        let (mut item, mut most_in_group) = (1_usize, 1_usize);
        let mut characters = pattern.chars().peekable();
        let mut in_class = false;
        while let Some(character) = characters.next() {
            match character {
                '\\' => {
                    characters.next();
                    item = 1;
                }
                '[' if !in_class => (in_class, item) = (true, 1),
                ']' if in_class => in_class = false,
                _ if in_class => {}
                '(' => {
                    Self::check("levels in a regular expression", groups.len() + 1, self.depth)?;
                    groups.push(most_in_group);
                    (item, most_in_group) = (1, 1);
                }
                ')' => {
                    item = most_in_group;
                    most_in_group = groups.pop().unwrap_or(1).max(item);
                }
                '{' => {
                    let mut inside = String::new();
                    while let Some(next) = characters.next_if(|c| *c != '}') {
                        inside.push(next);
                    }
                    characters.next();
                    let counts = inside.split(',').filter_map(|part| part.trim().parse::<usize>().ok());
                    item = item.saturating_mul(counts.max().unwrap_or(1).max(1));
                    Self::check("repetitions in a regular expression", item, self.repetitions)?;
                    most_in_group = most_in_group.max(item);
                }
                '*' | '+' | '?' => {}
                _ => item = 1,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn what(result: Result<(), GrammarError>) -> &'static str {
        match result {
            Err(GrammarError::TooLarge { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn schemas_are_counted() {
        let limits = Limits { depth: 6, nodes: 20, bytes: 1000, ..Limits::default() };
        limits.check_schema(&json!({"properties": {"a": {"items": {"type": "string"}}}})).unwrap();
        let deep = json!({"items": {"items": {"items": {"items": {"items": {"items": true}}}}}});
        assert_eq!(what(limits.check_schema(&deep)), "levels");
        assert_eq!(
            what(limits.check_schema(&json!({"enum": (0..30).collect::<Vec<_>>()}))),
            "values and keys"
        );
        assert_eq!(what(limits.check_schema(&json!({"const": "x".repeat(1001)}))), "bytes");
        let pattern = json!({"pattern": "(a{2000}){2000}"});
        assert_eq!(what(limits.check_schema(&pattern)), "repetitions in a regular expression");
        let patterns = json!({"patternProperties": {"(a{2000}){2000}": true}});
        assert_eq!(what(limits.check_schema(&patterns)), "repetitions in a regular expression");
    }

    #[test]
    fn nested_repetitions_multiply() {
        let limits = Limits { repetitions: 100, ..Limits::default() };
        for good in
            ["a{100}", "(a{10}){10}", "a{50}b{60}", "(a{10}|b{20})c{90}", "[{]{9}", "\\{999\\}", "a{,100}"]
        {
            assert_eq!(limits.check_regex(good), Ok(()), "{good}");
        }
        for bad in [
            "a{101}",
            "(a{11}){10}",
            "((a{5}){5}){5}",
            "(x|(a{50}b){3})",
            "a{0,101}",
            "a{20}{6}",
            "(b(a{11})){10}",
        ] {
            assert_eq!(what(limits.check_regex(bad)), "repetitions in a regular expression", "{bad}");
        }
        assert_eq!(what(limits.check_regex(&"(".repeat(49))), "levels in a regular expression");
    }
}

use std::fmt;

/// Longest reason of the library that is passed on: it likes to quote the grammar.
const MAX_REASON_CHARACTERS: usize = 400;

/// Why a source is no grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It has more of something than is taken.
    #[error("has {actual} {what}, at most {limit} are taken; make it smaller")]
    TooLarge {
        /// What was counted.
        what: &'static str,
        /// How many there are, as far as they were counted.
        actual: usize,
        /// How many may be.
        limit: usize,
    },
    /// It is malformed, contradicts itself, or needs what is not supported.
    #[error("{0}")]
    Invalid(String),
    /// The model cannot be constrained, whatever the source.
    #[error("this model cannot follow a grammar: {0}")]
    Vocabulary(String),
}

impl GrammarError {
    pub(crate) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid(reason.into())
    }

    /// An error of the library, in one short line.
    pub(crate) fn library(error: &impl fmt::Display) -> Self {
        Self::Invalid(reason(error))
    }
}

/// What the library says, without the state and the backtrace that it appends.
pub(crate) fn reason(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    if text.starts_with("panic: ") {
        return "the grammar library gave up on it; simplify it".into();
    }
    let text = text.split("\n<").next().unwrap_or_default();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if line.chars().count() + word.chars().count() >= MAX_REASON_CHARACTERS {
            line.push('…');
            break;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_short_and_of_one_line() {
        assert_eq!(reason(&"a\n  b\n<state>\nTokens: 1\n</state>"), "a b");
        assert_eq!(reason(&"lexer error\n<non-verbose/>"), "lexer error");
        assert!(!reason(&"panic: at /home/x.rs\n<backtrace>\n0: f").contains("x.rs"));
        let long = reason(&"word ".repeat(1000));
        assert!(long.chars().count() <= MAX_REASON_CHARACTERS + 1 && long.ends_with('…'), "{long}");
    }
}

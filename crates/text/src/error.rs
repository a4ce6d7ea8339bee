//! What this crate can fail with. Messages name the file, the field, what was found and what was expected.

use std::path::PathBuf;
use std::time::Duration;

/// An error of a tokenizer, chat template, generation config or stop-string list.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file is larger than anything of its kind that is published.
    #[error("{origin}: {bytes} bytes are more than the limit of {limit} bytes for this kind of file")]
    TooLarge {
        /// The file or its stand-in.
        origin: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The bytes are not JSON at all, usually because a download stopped half-way.
    #[error("{origin}: not valid JSON ({source}); the file is damaged or incomplete, fetch it again")]
    Json {
        /// The file or its stand-in.
        origin: String,
        /// What the JSON parser saw, with line and column.
        source: serde_json::Error,
    },
    /// A field is missing, of the wrong type, out of range, or asks for something that is not supported.
    #[error("{origin}: {field}: found {found}, expected {expected}")]
    Field {
        /// The file or its stand-in.
        origin: String,
        /// Path of the field, for example `model.merges[3]`.
        field: String,
        /// What is there.
        found: String,
        /// What must be there.
        expected: String,
    },
    /// A part that passed the checks of this crate was refused by the `tokenizers` library.
    #[error("{origin}: {field}: {message}")]
    Component {
        /// The file or its stand-in.
        origin: String,
        /// Path of the field.
        field: String,
        /// The library's message.
        message: String,
    },
    /// Text could not be encoded.
    #[error("{origin}: text of {bytes} bytes could not be encoded: {message}")]
    Encode {
        /// Where the tokenizer came from.
        origin: String,
        /// Length of the text.
        bytes: usize,
        /// The library's message.
        message: String,
    },
    /// A chat template does not parse, fails while it renders, or raised an exception of its own.
    #[error("{origin}{}: chat template: {message}", at_line(*line))]
    Template {
        /// Where the template came from.
        origin: String,
        /// Line in the template, from 1.
        line: Option<usize>,
        /// What went wrong.
        message: String,
    },
    /// A chat template did more work than any real one needs.
    #[error("{origin}{}: chat template: {message}; a template from a trusted checkpoint never reaches this limit", at_line(*line))]
    TemplateLimit {
        /// Where the template came from.
        origin: String,
        /// Line in the template, from 1.
        line: Option<usize>,
        /// Which limit, in words.
        message: String,
    },
    /// A chat template was still running at its wall-clock limit.
    #[error("{origin}: chat template: still rendering after {} ms and was abandoned", limit.as_millis())]
    TemplateTimeout {
        /// Where the template came from.
        origin: String,
        /// The limit.
        limit: Duration,
    },
    /// A list of stop strings is not usable.
    #[error("stop{}: {message}", at_index(*index))]
    Stop {
        /// Which stop string, from 0; none when the list as a whole is meant.
        index: Option<usize>,
        /// What is wrong with it.
        message: String,
    },
}

fn at_line(line: Option<usize>) -> String {
    line.map(|line| format!(":{line}")).unwrap_or_default()
}

fn at_index(index: Option<usize>) -> String {
    index.map(|index| format!("[{index}]")).unwrap_or_default()
}

impl TextError {
    /// A [`TextError::Field`] in words.
    pub(crate) fn field(
        origin: &str,
        field: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        TextError::Field {
            origin: origin.to_owned(),
            field: field.into(),
            found: found.into(),
            expected: expected.into(),
        }
    }
}

/// A JSON value in a few words, for the `found` part of a message: short values verbatim, long ones by their kind.
pub(crate) fn describe(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => format!("the string {}", quote(s)),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(map) => match map.get("type").and_then(Value::as_str) {
            Some(kind) => format!("an object of type {}", quote(kind)),
            None => format!("an object with {} keys", map.len()),
        },
    }
}

/// A string in quotes, escaped and cut to 40 characters, so that hostile content cannot garble a terminal.
pub(crate) fn quote(text: &str) -> String {
    let mut short: String = text.chars().take(40).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}

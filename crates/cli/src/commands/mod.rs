//! One module a command.

pub mod ask;
pub mod bench;
pub mod chat;
pub mod generate;
pub mod logits;
pub mod models;
pub mod needle;
pub mod plan;
pub mod serve;
pub mod tokenize;
pub mod worker;

use std::path::Path;

use anyhow::{Context, Result};

/// A JSON array of token ids from a file.
fn read_ids(path: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_ids(&text, &path.display().to_string())
}

fn parse_ids(text: &[u8], origin: &str) -> Result<Vec<u32>> {
    serde_json::from_slice(text).map_err(|e| {
        crate::exit::UsageError(format!(
            "{origin}: expected a JSON array of token ids such as [1, 2, 3]: {e}"
        ))
        .into()
    })
}

/// Text that must be UTF-8; `origin` names it in the error.
fn utf8(bytes: Vec<u8>, origin: &str) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        crate::exit::UsageError(format!("{origin} is not UTF-8 text: {}", e.utf8_error())).into()
    })
}

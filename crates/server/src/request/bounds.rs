//! Bounds and values of fields that do not depend on an operator's choice, for the parsers and for `/openapi.json`.

use serde_json::{Value, json};

/// Longest stop string.
pub(crate) const STOP_BYTES: usize = 256;

/// Most `stop_token_ids`.
pub(crate) const STOP_TOKEN_IDS: usize = 128;

/// Longest `cache_salt` and label.
pub(crate) const LABEL_BYTES: usize = 512;

/// Most choices of an answer.
pub(crate) const CHOICES: usize = 10_000;

/// Longest name and description of a schema.
pub(crate) const SCHEMA_NAME_BYTES: usize = 256;
pub(crate) const SCHEMA_DESCRIPTION_BYTES: usize = 64 << 10;

/// Most entries of `metadata`.
pub(crate) const METADATA: usize = 16;

/// Most entries of `chat_template_kwargs`, and of a message's `tool_calls`.
pub(crate) const ENTRIES: usize = 128;

/// Longest role of a message.
pub(crate) const ROLE_BYTES: usize = 64;

/// Fields of messages that other servers answer with, and that may come back when they are empty.
pub(crate) const EMPTY_IN_MESSAGES: [&str; 6] =
    ["refusal", "function_call", "audio", "annotations", "reasoning_content", "reasoning"];

/// Known fields that are not supported, with the values that ask for nothing.
pub(crate) fn neutral() -> impl Iterator<Item = (&'static str, Vec<Value>)> {
    let one = [
        ("use_beam_search", vec![json!(false)]),
        ("best_of", vec![json!(1)]),
        ("length_penalty", vec![json!(1), json!(1.0)]),
        ("spaces_between_special_tokens", vec![json!(true)]),
        ("stream_interval", vec![json!(1)]),
        ("service_tier", vec![json!("auto"), json!("default")]),
        ("store", vec![json!(false)]),
    ];
    let empty = [
        "logprob_token_ids",
        "kv_transfer_params",
        "vllm_xargs",
        "repetition_detection",
        "session_id",
        "thinking_token_budget",
        "prompt_embeds",
    ];
    one.into_iter().chain(empty.map(|field| (field, vec![json!([]), json!({})])))
}

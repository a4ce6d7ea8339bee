//! Calls of tools in the Hermes format: `<tool_call>\n{"name": …, "arguments": …}\n</tool_call>`.

use std::fmt::Write;

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use crate::error::GrammarError;
use crate::limits::Limits;
use crate::source::{Whitespace, literal};

/// A tool that may be called.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments, which are an object.
    pub parameters: Value,
}

/// How many calls there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallCount {
    /// One, and no other text.
    One,
    /// At least one, and no other text.
    Some,
    /// One or none, within any text.
    AtMostOne,
    /// Any number, within any text.
    Any,
}

/// The terminals of text around calls. The lazy one ends with the first tag, where the other one cannot go on.
const TEXT: &str = "open[lazy]: /(.|\\n)*<tool_call>/\n\
                    TEXT: /(.|\\n)+/ & ~/(.|\\n)*<tool_call>(.|\\n)*/\n";

/// # Errors
/// No tool, and schemas outside of `limits`.
pub(crate) fn grammar(
    tools: &[Tool],
    count: CallCount,
    limits: &Limits,
) -> Result<TopLevelGrammar, GrammarError> {
    if tools.is_empty() {
        return Err(GrammarError::invalid("there is no tool to call"));
    }
    let mut text = String::from(match count {
        CallCount::One => "start: call\n",
        CallCount::Some => "start: call (\"\\n\" call)*\n",
        CallCount::AtMostOne => "start: call? TEXT?\n",
        CallCount::Any => "start: call* TEXT?\n",
    });
    let is_amid_text = matches!(count, CallCount::AtMostOne | CallCount::Any);
    if is_amid_text {
        text.push_str(TEXT);
    }
    let names: Vec<String> = (0..tools.len()).map(|index| format!("call{index}")).collect();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "call: {}", names.join(" | "));
    let mut bytes = 0;
    for (index, tool) in tools.iter().enumerate() {
        let name = format!("\n{{\"name\": {}, \"arguments\": ", json!(tool.name));
        let open = if is_amid_text {
            format!("open {}", literal(&name))
        } else {
            literal(&format!("<tool_call>{name}"))
        };
        let schema = Whitespace::Fixed.schema(&arguments(&tool.parameters), limits)?.to_string();
        bytes += schema.len();
        Limits::check("bytes", bytes, limits.bytes)?;
        let _ = writeln!(text, "call{index}: {open} arguments{index} {}", literal("}\n</tool_call>"));
        let _ = writeln!(text, "arguments{index}: %json {schema}");
    }
    Ok(TopLevelGrammar::from_lark(text))
}

/// A schema that only objects satisfy. Without one, a tool takes any object.
fn arguments(parameters: &Value) -> Value {
    match parameters {
        Value::Object(map) if !map.contains_key("type") => {
            let mut map = map.clone();
            map.insert("type".into(), json!("object"));
            Value::Object(map)
        }
        Value::Null => json!({"type": "object"}),
        other => other.clone(),
    }
}

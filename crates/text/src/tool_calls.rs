//! Tool calls in a model's output, in the Hermes format that the templates of Qwen2.5 ask for:
//! `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
//!
//! One parser serves whole texts and streams, so what a stream adds up to is what the whole text gives. A call is reported
//! when it is complete: half a JSON value is nothing that a client could use, and patching it together is where
//! stream parsers go wrong.

use serde_json::Value;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A call that the model made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// Its arguments, a JSON object as text.
    pub arguments: String,
}

/// A piece of parsed output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolPiece {
    /// Text that belongs to no call.
    Text(String),
    /// A call.
    Call(ToolCall),
}

/// Separates calls from text, in time linear in the text.
///
/// A block that is not a call (no JSON, no name, arguments that are no object) stays text, tags included: nothing the model
/// said is lost. A last block without its closing tag counts as a call if it is one. White space before a call, between
/// calls and behind them is dropped.
#[derive(Debug, Clone, Default)]
pub struct ToolCallParser {
    inside: bool,
    /// Inside: the block so far, without its opening tag. Outside: text that may yet turn out to be white space before a call,
    /// or the beginning of a tag.
    held: String,
    /// White space before the block that is being read; it counts if the block turns out to be no call.
    gap: String,
    called: bool,
}

impl ToolCallParser {
    /// Takes the next piece of output.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        let mut pieces = Vec::new();
        let mut searched = self.held.len();
        self.held.push_str(text);
        loop {
            let tag = if self.inside { CLOSE } else { OPEN };
            // A tag that began before this piece ends in it.
            let from = floor_char_boundary(&self.held, searched.saturating_sub(tag.len()));
            let Some(at) = self.held.get(from..).and_then(|rest| rest.find(tag)).map(|at| from + at) else {
                break;
            };
            let rest = self.held.split_off(at + tag.len());
            self.held.truncate(at);
            let before = std::mem::replace(&mut self.held, rest);
            if self.inside {
                self.block(&before, true, &mut pieces);
            } else {
                let text = before.trim_end();
                self.emit(text, &mut pieces);
                self.gap = before.get(text.len()..).unwrap_or_default().to_owned();
            }
            self.inside = !self.inside;
            searched = 0;
        }
        if !self.inside {
            let certain = self.held.len() - self.uncertain();
            let rest = self.held.split_off(certain);
            let text = std::mem::replace(&mut self.held, rest);
            self.emit(&text, &mut pieces);
        }
        pieces
    }

    /// Ends the output.
    pub fn finish(&mut self) -> Vec<ToolPiece> {
        let mut pieces = Vec::new();
        let held = std::mem::take(&mut self.held);
        if std::mem::take(&mut self.inside) {
            self.block(&held, false, &mut pieces);
        } else {
            self.emit(&held, &mut pieces);
        }
        pieces
    }

    /// Bytes at the end of the outside text that must wait: white space, and what may be the start of a tag.
    fn uncertain(&self) -> usize {
        let partial = (1..OPEN.len())
            .rev()
            .find(|&n| OPEN.get(..n).is_some_and(|head| self.held.ends_with(head)))
            .unwrap_or(0);
        let before = self.held.get(..self.held.len() - partial).unwrap_or_default();
        partial + (before.len() - before.trim_end().len())
    }

    /// Text outside of calls. Behind a call, white space at its start belongs to nothing.
    fn emit(&mut self, text: &str, pieces: &mut Vec<ToolPiece>) {
        let text = if self.called { text.trim_start() } else { text };
        if !text.is_empty() {
            self.called = false;
            append(pieces, text);
        }
    }

    fn block(&mut self, block: &str, closed: bool, pieces: &mut Vec<ToolPiece>) {
        let gap = std::mem::take(&mut self.gap);
        match call(block) {
            Some(call) => {
                self.called = true;
                pieces.push(ToolPiece::Call(call));
            }
            None => {
                append(pieces, if self.called { "" } else { &gap });
                self.called = false;
                append(pieces, OPEN);
                append(pieces, block);
                append(pieces, if closed { CLOSE } else { "" });
            }
        }
    }
}

fn append(pieces: &mut Vec<ToolPiece>, text: &str) {
    match pieces.last_mut() {
        Some(ToolPiece::Text(last)) => last.push_str(text),
        _ if text.is_empty() => {}
        _ => pieces.push(ToolPiece::Text(text.to_owned())),
    }
}

/// The call in a block, if it is one.
fn call(block: &str) -> Option<ToolCall> {
    let value: Value = serde_json::from_str(block.trim()).ok()?;
    let name = value.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let arguments = match value.get("arguments") {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(arguments @ Value::Object(_)) => arguments.to_string(),
        Some(_) => return None,
    };
    Some(ToolCall { name: name.to_owned(), arguments })
}

/// The last character boundary at or before `at`.
fn floor_char_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(pieces: &[&str]) -> (String, Vec<ToolCall>) {
        let mut parser = ToolCallParser::default();
        let mut out: Vec<ToolPiece> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
        out.extend(parser.finish());
        let (mut text, mut calls) = (String::new(), Vec::new());
        for piece in out {
            match piece {
                ToolPiece::Text(piece) => text.push_str(&piece),
                ToolPiece::Call(call) => calls.push(call),
            }
        }
        (text, calls)
    }

    fn made(name: &str, arguments: &str) -> ToolCall {
        ToolCall { name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn calls_leave_the_text() {
        let output = "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>\n\
                      <tool_call>\n{\"name\": \"now\"}\n</tool_call>\n";
        let calls = vec![made("weather", "{\"city\":\"Köln\"}"), made("now", "{}")];
        assert_eq!(parse(&[output]), ("Let me see.".into(), calls));
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "plain text  \n",
            "a <tool_call",
            "<tool_call>no json</tool_call>",
            "a \n <tool_call>no json</tool_call> b",
            "<tool_call>{\"arguments\": {}}</tool_call>",
            "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call> and more",
            "<tool_call>{\"name\": \"\"}</tool_call>",
            "x</tool_call>",
        ] {
            assert_eq!(parse(&[text]), (text.into(), vec![]), "{text}");
        }
        // The closing tag may fall to the token limit; half a call may not.
        assert_eq!(parse(&["<tool_call>{\"name\": \"f\"}"]), (String::new(), vec![made("f", "{}")]));
        let half = "<tool_call>{\"name\": \"f\", \"argum";
        assert_eq!(parse(&[half]), (half.into(), vec![]));
    }

    #[test]
    fn a_megabyte_of_tags_is_read_in_linear_work() {
        // Quadratic work would take minutes, not seconds.
        let tags = "<tool_call>".repeat(90_000);
        let mut parser = ToolCallParser::default();
        let mut bytes = 0;
        for piece in tags.as_bytes().chunks(7) {
            for piece in parser.push(std::str::from_utf8(piece).unwrap()) {
                let ToolPiece::Text(text) = piece else { panic!("no call") };
                bytes += text.len();
            }
        }
        for piece in parser.finish() {
            let ToolPiece::Text(text) = piece else { panic!("no call") };
            bytes += text.len();
        }
        assert_eq!(bytes, tags.len());
    }

    fn output() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            Just("<tool_call>".to_owned()),
            Just("</tool_call>".to_owned()),
            Just("{\"name\": \"f\", \"arguments\": {\"x\": \"</tool\"}}".to_owned()),
            Just("<tool".to_owned()),
            "[ \n]{0,3}",
            "[a-zé<>/_{}\"]{0,6}",
        ];
        prop::collection::vec(piece, 0..14).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn a_stream_adds_up_to_the_whole(
            output in output(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
        ) {
            let mut at: Vec<usize> =
                cuts.iter().map(|cut| floor_char_boundary(&output, cut.index(output.len() + 1))).collect();
            at.sort_unstable();
            let mut pieces = Vec::new();
            let mut from = 0;
            for cut in at {
                pieces.push(&output[from..cut]);
                from = cut;
            }
            pieces.push(&output[from..]);
            prop_assert_eq!(parse(&pieces), parse(&[&output]));
        }
    }
}

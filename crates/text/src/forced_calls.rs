//! Tool calls in an output that a grammar holds to the Hermes format, and to nothing else.

const HEAD: &str = "<tool_call>\n{\"name\": \"";
const ARGUMENTS: &str = "\", \"arguments\": ";
const CLOSE: &str = "</tool_call>";

/// What goes on with the calls of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallPiece {
    /// A call begins; this is its tool.
    Name(String),
    /// The arguments of the last call go on, as the model writes them.
    Arguments(String),
    /// Text that is no call: what is left of a call that was cut before its arguments.
    Text(String),
}

/// Reads calls while they are made, in time linear in the text. There is no need to wait for the end of one to know that it is
/// a call, so its arguments are reported as they grow.
#[derive(Debug, Clone, Default)]
pub struct ForcedCallParser {
    state: State,
    /// Text that has no meaning yet: the head of a call, or what lies behind one.
    held: String,
}

#[derive(Debug, Clone, Copy, Default)]
enum State {
    #[default]
    Head,
    /// Within the arguments: open brackets, and whether the last character was inside of a string, and behind a backslash.
    Arguments {
        depth: usize,
        in_string: bool,
        escaped: bool,
    },
    Tail,
}

impl ForcedCallParser {
    /// Takes the next piece of output.
    pub fn push(&mut self, text: &str) -> Vec<CallPiece> {
        let mut pieces = Vec::new();
        let mut arguments = String::new();
        for character in text.chars() {
            match &mut self.state {
                State::Head => {
                    self.held.push(character);
                    let name =
                        self.held.trim_start().strip_prefix(HEAD).and_then(|n| n.strip_suffix(ARGUMENTS));
                    if let Some(name) = name {
                        pieces.push(CallPiece::Name(name.to_owned()));
                        self.held.clear();
                        self.state = State::Arguments { depth: 0, in_string: false, escaped: false };
                    }
                }
                State::Arguments { depth, in_string, escaped } => {
                    arguments.push(character);
                    match character {
                        _ if *escaped => *escaped = false,
                        '\\' => *escaped = *in_string,
                        '"' => *in_string = !*in_string,
                        '{' | '[' if !*in_string => *depth += 1,
                        '}' | ']' if !*in_string => {
                            *depth = depth.saturating_sub(1);
                            if *depth == 0 {
                                pieces.push(CallPiece::Arguments(std::mem::take(&mut arguments)));
                                self.state = State::Tail;
                            }
                        }
                        _ => {}
                    }
                }
                State::Tail => {
                    self.held.push(character);
                    if self.held.ends_with(CLOSE) {
                        self.held.clear();
                        self.state = State::Head;
                    }
                }
            }
        }
        if !arguments.is_empty() {
            pieces.push(CallPiece::Arguments(arguments));
        }
        pieces
    }

    /// Ends the output.
    pub fn finish(&mut self) -> Vec<CallPiece> {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Head if !held.trim().is_empty() => vec![CallPiece::Text(held)],
            State::Head | State::Arguments { .. } | State::Tail => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The calls and the text of an output that comes in `pieces`.
    fn parse<'a>(pieces: impl IntoIterator<Item = &'a str>) -> (Vec<(String, String)>, String) {
        let mut parser = ForcedCallParser::default();
        let mut out: Vec<CallPiece> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
        out.extend(parser.finish());
        let (mut calls, mut rest): (Vec<(String, String)>, String) = Default::default();
        for piece in out {
            match piece {
                CallPiece::Name(name) => calls.push((name, String::new())),
                CallPiece::Arguments(text) => calls.last_mut().unwrap().1.push_str(&text),
                CallPiece::Text(text) => rest.push_str(&text),
            }
        }
        (calls, rest)
    }

    const OUTPUT: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"]{\", \"b\": [{}, \"é\"]}}\n</tool_call>\n\
                          <tool_call>\n{\"name\": \"g.h-2\", \"arguments\": {}}\n</tool_call>";

    #[test]
    fn calls_are_the_same_however_they_are_cut() {
        let calls = vec![
            ("f".to_owned(), "{\"a\": \"}\\\"]{\", \"b\": [{}, \"é\"]}".to_owned()),
            ("g.h-2".to_owned(), "{}".to_owned()),
        ];
        assert_eq!(parse([OUTPUT]), (calls.clone(), String::new()));
        for size in 1..20 {
            let characters: Vec<char> = OUTPUT.chars().collect();
            let pieces: Vec<String> = characters.chunks(size).map(|chunk| chunk.iter().collect()).collect();
            assert_eq!(parse(pieces.iter().map(String::as_str)), (calls.clone(), String::new()));
        }
    }

    #[test]
    fn a_call_that_is_cut_has_the_arguments_so_far() {
        let cut = |bytes: usize| parse([&OUTPUT[..bytes]]);
        let head = OUTPUT.find("{\"a\"").unwrap();
        assert_eq!(cut(head - 1), (vec![], OUTPUT[..head - 1].to_owned()));
        assert_eq!(cut(head), (vec![("f".into(), String::new())], String::new()));
        assert_eq!(cut(head + 6), (vec![("f".into(), "{\"a\": ".into())], String::new()));
        let first = OUTPUT.find("\n</tool_call>").unwrap();
        for bytes in [first, first + 3, first + "\n</tool_call>\n".len()] {
            let (calls, rest) = cut(bytes);
            assert!(
                calls.len() == 1
                    && serde_json::from_str::<serde_json::Value>(&calls[0].1).is_ok()
                    && rest.is_empty()
            );
        }
    }
}

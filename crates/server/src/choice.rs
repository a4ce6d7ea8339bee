//! The text of one choice: detokenizer, stop strings, tool calls.

use longhaul_text::{
    CallPiece, Detokenizer, ForcedCallParser, StopMatcher, Tokenizer, ToolCallParser, ToolPiece,
};
use serde_json::{Value, json};

use crate::error::{ApiError, ApiResult};
use crate::ledger::Outcome;
use crate::serving::Finish;

/// Whether there are tool calls in a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Calls {
    /// What looks like one is text.
    #[default]
    None,
    /// The model decides; a call is one when it is complete.
    Among,
    /// The text is calls, and nothing else.
    Only,
}

/// A call, or the next part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CallPart {
    /// Among the choice's calls.
    pub(crate) index: usize,
    /// Of the first part.
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
}

/// How a request wants its text.
#[derive(Debug, Clone)]
pub(crate) struct TextOptions {
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    /// Stop strings within the first tokens do not count.
    pub(crate) min_tokens: usize,
    pub(crate) calls: Calls,
    pub(crate) parallel_tool_calls: bool,
    /// Why a choice with calls ended, unless it was cut.
    pub(crate) calls_finish: &'static str,
}

/// Why a choice ended, as the API says it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ended {
    pub(crate) finish_reason: &'static str,
    /// The stop string or stop token, if one of the request's own ended it.
    pub(crate) stop_reason: Value,
}

impl Ended {
    pub(crate) fn outcome(&self) -> Outcome {
        match self.finish_reason {
            "length" => Outcome::Length,
            "tool_calls" => Outcome::ToolCalls,
            _ => Outcome::Stop,
        }
    }
}

/// What a token led to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) calls: Vec<CallPart>,
    pub(crate) ended: Option<Ended>,
}

enum Parser {
    /// With the number of calls that are wanted yet; others are dropped.
    Among(ToolCallParser, usize),
    Only(ForcedCallParser),
}

impl Parser {
    /// Takes the next piece of output, the last one if it `ended`.
    fn push(&mut self, text: &str, ended: bool) -> Vec<CallPiece> {
        match self {
            Self::Only(parser) => {
                let mut pieces = parser.push(text);
                if ended {
                    pieces.extend(parser.finish());
                }
                pieces
            }
            Self::Among(parser, wanted) => {
                let mut parts = parser.push(text);
                if ended {
                    parts.extend(parser.finish());
                }
                let mut pieces = Vec::with_capacity(parts.len());
                for piece in parts {
                    match piece {
                        ToolPiece::Text(text) => pieces.push(CallPiece::Text(text)),
                        ToolPiece::Call(call) if *wanted > 0 => {
                            *wanted -= 1;
                            pieces.extend([CallPiece::Name(call.name), CallPiece::Arguments(call.arguments)]);
                        }
                        ToolPiece::Call(_) => {}
                    }
                }
                pieces
            }
        }
    }
}

/// One choice on its way from ids to text.
pub(crate) struct Choice {
    options: TextOptions,
    detokenizer: Option<Detokenizer>,
    stops: StopMatcher,
    parser: Option<Parser>,
    calls: usize,
    tokens: usize,
    ended: bool,
}

impl Choice {
    /// # Errors
    /// Stop strings without a tokenizer, or such that the matcher does not take.
    pub(crate) fn new(options: &TextOptions) -> ApiResult<Self> {
        if options.tokenizer.is_none() && !options.stop.is_empty() {
            return Err(ApiError::field(
                "stop",
                "needs a tokenizer, which this model has not; use stop_token_ids",
            ));
        }
        Ok(Self {
            detokenizer: options.tokenizer.clone().map(|t| Detokenizer::new(t, options.skip_special)),
            stops: StopMatcher::new(options.stop.clone()).map_err(crate::prompt::text_error)?,
            parser: match options.calls {
                Calls::None => None,
                Calls::Among => {
                    let wanted = if options.parallel_tool_calls { usize::MAX } else { 1 };
                    Some(Parser::Among(ToolCallParser::default(), wanted))
                }
                Calls::Only => Some(Parser::Only(ForcedCallParser::default())),
            },
            options: options.clone(),
            calls: 0,
            tokens: 0,
            ended: false,
        })
    }

    /// Tokens that count: up to the one that ended the choice.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether the choice has ended. Later tokens are those that the engine had under way.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Takes a token.
    pub(crate) fn push(&mut self, id: u32, finish: Option<Finish>) -> Piece {
        self.tokens += 1;
        let ending = matches!(finish, Some(Finish::EndOfSequence | Finish::StopToken(_)));
        let text = match &mut self.detokenizer {
            Some(detokenizer) if !ending || self.options.include_stop => detokenizer.push(id),
            _ => String::new(),
        };
        self.text(&text, finish)
    }

    /// Ends the choice without a token.
    pub(crate) fn finish(&mut self, finish: Finish) -> Piece {
        self.text("", Some(finish))
    }

    fn text(&mut self, text: &str, finish: Option<Finish>) -> Piece {
        let mut out = String::new();
        let mut stopped = self.advance(text, &mut out);
        if finish.is_some() && stopped.is_none() {
            let rest = self.detokenizer.as_mut().map(Detokenizer::finish).unwrap_or_default();
            stopped = self.advance(&rest, &mut out);
            if stopped.is_none() {
                out.push_str(&self.stops.finish());
            }
        }
        let ended = match (stopped.and_then(|index| self.options.stop.get(index)), finish) {
            (Some(stop), _) => {
                if self.options.include_stop {
                    out.push_str(stop);
                }
                Some(Ended { finish_reason: "stop", stop_reason: json!(stop) })
            }
            (None, Some(Finish::EndOfSequence)) => {
                Some(Ended { finish_reason: "stop", stop_reason: Value::Null })
            }
            (None, Some(Finish::StopToken(id))) => {
                Some(Ended { finish_reason: "stop", stop_reason: json!(id) })
            }
            (None, Some(Finish::Length)) => Some(Ended { finish_reason: "length", stop_reason: Value::Null }),
            (None, None) => None,
        };
        self.ended = ended.is_some();
        self.tools(Piece { text: out, calls: Vec::new(), ended })
    }

    /// Appends what is certain of `text` to `out`; the stop string that ended it, if one did.
    fn advance(&mut self, text: &str, out: &mut String) -> Option<usize> {
        if self.tokens <= self.options.min_tokens {
            out.push_str(text);
            return None;
        }
        let outcome = self.stops.push(text);
        out.push_str(&outcome.text);
        outcome.stopped
    }

    fn tools(&mut self, mut piece: Piece) -> Piece {
        let Some(parser) = &mut self.parser else { return piece };
        let text = std::mem::take(&mut piece.text);
        for part in parser.push(&text, piece.ended.is_some()) {
            match part {
                CallPiece::Text(text) => piece.text.push_str(&text),
                CallPiece::Name(name) => {
                    let (index, name) = (self.calls, Some(name));
                    piece.calls.push(CallPart { index, name, arguments: String::new() });
                    self.calls += 1;
                }
                CallPiece::Arguments(arguments) => {
                    let index = self.calls.saturating_sub(1);
                    match piece.calls.last_mut() {
                        Some(call) if call.index == index => call.arguments.push_str(&arguments),
                        _ => piece.calls.push(CallPart { index, name: None, arguments }),
                    }
                }
            }
        }
        if let Some(ended) = &mut piece.ended
            && self.calls > 0
            && ended.finish_reason == "stop"
        {
            ended.finish_reason = self.options.calls_finish;
        }
        piece
    }
}

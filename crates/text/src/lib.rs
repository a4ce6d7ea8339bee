//! Text in and out of a language model: tokenizer, chat template, incremental detokenizer, stop strings and the
//! checkpoint's sampling defaults.
//!
//! Every file read here comes with a checkpoint and is untrusted: it is bounded in size, checked field by field, and
//! refused with a message that names the file and the culprit. Text from users is data: unless a caller asks for
//! [`SpecialTokens::Parse`], no string in it becomes a control token.
#![forbid(unsafe_code)]

mod byte_level;
mod calendar;
mod chat;
mod conversation;
mod detokenizer;
mod error;
mod forced_calls;
mod generation_config;
mod json_dumps;
mod stop;
mod template;
mod template_env;
mod tokenizer;
mod tokenizer_json;
mod tool_calls;

pub use calendar::civil_date;
pub use chat::{ChatTemplate, Message};
pub use conversation::{Conversation, RESERVED_VARIABLES};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use forced_calls::{CallPiece, ForcedCallParser};
pub use generation_config::GenerationConfig;
pub use stop::{MAX_STOP_BYTES, MAX_STOPS, StopMatcher, StopOutcome};
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use tool_calls::{ToolCall, ToolCallParser, ToolPiece};

//! Request bodies, field by field.

pub(crate) mod bounds;
mod chat;
mod completion;
mod fields;
mod sampling;
mod structured;
mod tokenize;

pub(crate) use chat::{ChatRequest, ToolChoice};
pub(crate) use completion::{CompletionRequest, Prompt};
pub(crate) use fields::{Fields, check_content_type};
pub(crate) use sampling::{Common, StreamOptions, is_request_id};
pub(crate) use structured::Constraint;
pub(crate) use tokenize::{DetokenizeRequest, TokenizeRequest, TokenizeSource};

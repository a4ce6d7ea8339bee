//! Asking documents a question: the prompt, the fit into the context, the answer and the passage it rests on.

mod passage;

use longhaul_engine::{FinishReason, Generate, Observer, Request, SamplingParams, Timings};
use longhaul_text::{Message, SpecialTokens};
use serde::Serialize;

pub use passage::{MIN_SUPPORT, Passage, find_passage};

use crate::error::DoesNotFit;
use crate::{Document, DocumentTokens, LongdocError, Result};

/// How a question is answered.
#[derive(Debug, Clone)]
pub struct AskOptions {
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// How tokens are drawn; greedy by default, so the same documents give the same answer.
    pub sampling: SamplingParams,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// System message in front of the documents.
    pub system: Option<String>,
    /// Tokens of a prefill chunk; `None` = the engine's default.
    pub chunk: Option<usize>,
}

impl Default for AskOptions {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            sampling: SamplingParams::greedy(),
            stop: Vec::new(),
            system: None,
            chunk: None,
        }
    }
}

/// An answer and what it rests on.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// The model's answer, without white space around it.
    pub answer: String,
    /// The passage that supports it best; `None` when nothing in the documents does, which is a sign that the model made
    /// it up (or answered in words of its own).
    pub passage: Option<Passage>,
    /// Tokens of the whole prompt.
    pub prompt_tokens: usize,
    /// What each document took of it.
    pub documents: Vec<DocumentTokens>,
    /// Why the answer ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timings: Timings,
}

/// The user message: documents, an empty line, the question. One document stands alone; of several, each follows a
/// heading line `# NAME`.
pub fn prompt(documents: &[Document], question: &str) -> String {
    let mut text = String::with_capacity(documents.iter().map(|d| d.text.len() + d.name.len() + 8).sum());
    match documents {
        [only] => text.push_str(&only.text),
        several => {
            for (i, document) in several.iter().enumerate() {
                if i > 0 {
                    text.push_str("\n\n");
                }
                text.push_str("# ");
                // A file name may hold any character; a heading is one line.
                text.extend(document.name.chars().map(|c| if c.is_control() { ' ' } else { c }));
                text.push_str("\n\n");
                text.push_str(&document.text);
            }
        }
    }
    text.push_str("\n\n");
    text.push_str(question);
    text
}

/// Answers `question` from `documents` and finds the passage that the answer rests on.
///
/// # Errors
/// No documents, an empty question, documents that do not fit the context (with the numbers), and the model's own.
pub fn ask(
    model: &mut dyn Generate,
    documents: &[Document],
    question: &str,
    options: &AskOptions,
    observer: &mut dyn Observer,
) -> Result<Answer> {
    if documents.is_empty() {
        return Err(LongdocError::NoDocuments);
    }
    if let Some(empty) = documents.iter().find(|d| d.text.trim().is_empty()) {
        return Err(LongdocError::Empty { name: empty.name.clone() });
    }
    let question = question.trim();
    if question.is_empty() {
        return Err(LongdocError::EmptyQuestion);
    }
    let mut messages = Vec::with_capacity(2);
    if let Some(system) = &options.system {
        messages.push(Message { role: "system".into(), content: system.clone() });
    }
    messages.push(Message { role: "user".into(), content: prompt(documents, question) });
    let ids = model.chat_ids(&messages)?;
    let tokenizer = model.tokenizer()?;
    let mut sizes = Vec::with_capacity(documents.len());
    for document in documents {
        sizes.push(DocumentTokens {
            name: document.name.clone(),
            tokens: tokenizer.encode(&document.text, SpecialTokens::AsText)?.len(),
            bytes: document.text.len(),
        });
    }
    let prompt_tokens = ids.len();
    if prompt_tokens.saturating_add(options.max_tokens) > model.max_model_len() {
        return Err(LongdocError::TooLong(Box::new(DoesNotFit {
            documents: sizes,
            prompt_tokens,
            max_tokens: options.max_tokens,
            max_model_len: model.max_model_len(),
            long_context: model.long_context(),
        })));
    }
    let request = Request {
        prompt: ids,
        sampling: options.sampling,
        max_tokens: options.max_tokens,
        stop: options.stop.clone(),
        ignore_eos: false,
        chunk: options.chunk,
    };
    let completion = model.generate(&request, observer)?;
    let answer = completion.text.trim().to_owned();
    Ok(Answer {
        passage: find_passage(documents, &answer, question),
        answer,
        prompt_tokens,
        documents: sizes,
        finish_reason: completion.finish_reason,
        timings: completion.timings,
    })
}

#[cfg(test)]
mod tests;

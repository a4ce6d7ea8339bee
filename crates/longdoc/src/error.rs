//! Why a document could not be read, a question not be answered, or a needle run not be carried out.

use std::fmt;
use std::path::PathBuf;

use longhaul_engine::{EngineError, LongContext};
use longhaul_text::TextError;
use serde::Serialize;

/// How much of the context one document takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DocumentTokens {
    /// Name of the document.
    pub name: String,
    /// Its tokens, encoded on its own.
    pub tokens: usize,
    /// Bytes of its text.
    pub bytes: usize,
}

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum LongdocError {
    /// The document does not exist.
    #[error("{path}: no such file", path = .path.display())]
    NotFound {
        /// As given.
        path: PathBuf,
    },
    /// The path is a directory.
    #[error("{path}: is a directory; name the files in it", path = .path.display())]
    IsDirectory {
        /// As given.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{path}: {action}: {source}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried ("cannot read", ...).
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Text in another encoding than UTF-8.
    #[error("{name}: not UTF-8: byte {offset} (line {line}) is 0x{byte:02x}; {hint}")]
    NotUtf8 {
        /// Name of the document.
        name: String,
        /// Offset of the first byte that is not UTF-8, from 0.
        offset: usize,
        /// Its line, from 1.
        line: usize,
        /// The byte.
        byte: u8,
        /// The remedy.
        hint: &'static str,
    },
    /// Not text and not a PDF.
    #[error("{name}: a binary file ({what}), not text, Markdown or PDF; convert it to one of these")]
    Binary {
        /// Name of the document.
        name: String,
        /// What it seems to be.
        what: String,
    },
    /// Nothing but white space.
    #[error("{name}: the document is empty")]
    Empty {
        /// Name of the document.
        name: String,
    },
    /// A PDF whose pages hold pictures only.
    #[error(
        "{name}: none of the {pages} page(s) of this PDF has a text layer (a scan?); run it through OCR, for example \
         `ocrmypdf`, first"
    )]
    PdfWithoutText {
        /// Name of the document.
        name: String,
        /// Pages of the PDF.
        pages: usize,
    },
    /// An encrypted PDF.
    #[error("{name}: the PDF needs a password; decrypt it first, for example with `qpdf --decrypt`")]
    PdfEncrypted {
        /// Name of the document.
        name: String,
    },
    /// A PDF that cannot be read.
    #[error("{name}: the PDF cannot be read{page}: {message}; convert it to text, for example with `pdftotext`", page = .page.map(|p| format!(" at page {p}")).unwrap_or_default())]
    Pdf {
        /// Name of the document.
        name: String,
        /// Page that failed, from 1, when that is known.
        page: Option<u32>,
        /// What failed.
        message: String,
    },
    /// A file or text beyond the limits.
    #[error("{name}: more than {limit} bytes of {what}, the most that one document may have; split it")]
    TooLarge {
        /// Name of the document.
        name: String,
        /// "file" or "text".
        what: &'static str,
        /// Bytes allowed.
        limit: u64,
    },
    /// No documents to ask.
    #[error("no documents; name at least one")]
    NoDocuments,
    /// An empty question.
    #[error("the question is empty")]
    EmptyQuestion,
    /// Documents and question do not fit the context.
    #[error("{0}")]
    TooLong(Box<DoesNotFit>),
    /// A setting of a needle run.
    #[error("{field}: {message}")]
    Setting {
        /// The field of [`crate::needle::NeedleConfig`].
        field: &'static str,
        /// What was found, what is expected.
        message: String,
    },
    /// A length that the model cannot read.
    #[error(
        "lengths: a prompt of {length} tokens and up to {max_tokens} of answer do not fit --long-context {mode}, whose \
         context holds {max_model_len}; drop the length or raise --max-model-len"
    )]
    LengthBeyondContext {
        /// Mode in force.
        mode: LongContext,
        /// Tokens of the prompt.
        length: usize,
        /// Tokens of answer.
        max_tokens: usize,
        /// Tokens that fit.
        max_model_len: usize,
    },
    /// The folder holds results of another run.
    #[error(
        "{path}: holds results of a run with other settings ({differences}); pass --overwrite to replace them, or \
         another --out", path = .path.display()
    )]
    OtherSettings {
        /// The results file.
        path: PathBuf,
        /// Setting, there and here.
        differences: String,
    },
    /// A results file that cannot be understood.
    #[error("{path}:{line}: {message}; pass --overwrite to start again, or another --out", path = .path.display())]
    Results {
        /// The results file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// Another process writes the folder.
    #[error("{path}: another run is writing here; wait for it, or pass another --out", path = .path.display())]
    Locked {
        /// The results file.
        path: PathBuf,
    },
    /// The model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Tokenizer or template failed.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// Numbers of a prompt that does not fit, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoesNotFit {
    /// What each document takes.
    pub documents: Vec<DocumentTokens>,
    /// Tokens of the whole prompt: template, documents, question.
    pub prompt_tokens: usize,
    /// Tokens reserved for the answer.
    pub max_tokens: usize,
    /// Tokens that fit.
    pub max_model_len: usize,
    /// Mode in force.
    pub long_context: LongContext,
}

impl DoesNotFit {
    /// Tokens beyond the context.
    pub fn over(&self) -> usize {
        self.prompt_tokens.saturating_add(self.max_tokens).saturating_sub(self.max_model_len)
    }
}

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the prompt has {} tokens and up to {} are for the answer, but the context holds {}: {} too many (",
            self.prompt_tokens,
            self.max_tokens,
            self.max_model_len,
            self.over()
        )?;
        for (i, document) in self.documents.iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            write!(f, "{separator}{}: {} tokens", document.name, document.tokens)?;
        }
        let fewer =
            if self.documents.len() > 1 { "fewer or shorter documents" } else { "a shorter document" };
        // Only where it can help: at least one token of the answer must stay.
        let shorter_answer = if self.over() < self.max_tokens { "lower --max-tokens, " } else { "" };
        write!(f, "); give {fewer}, {shorter_answer}raise --max-model-len")?;
        match self.long_context {
            LongContext::Dca => Ok(()),
            mode => write!(f, ", or read further with --long-context dca instead of {mode}"),
        }
    }
}

/// Result with this crate's [`LongdocError`].
pub type Result<T> = std::result::Result<T, LongdocError>;

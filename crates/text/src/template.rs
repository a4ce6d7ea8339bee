//! Rendering a chat template within bounds.
//!
//! A template comes with the checkpoint and is code: it gets fuel, an output limit, a wall-clock limit and a stack of
//! its own. Fuel bounds instructions and the strings they make; the clock is for the few operations that fuel cannot
//! see (comparing or concatenating values with exponentially shared parts).

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc;
use std::time::Duration;

use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::Value as Json;

use crate::conversation::Conversation;
use crate::template_env::environment;
use crate::{TextError, error::quote};

/// Largest template source. The longest published ones have about 30 KB. The engine recurses over chains of operators,
/// so this also bounds its stack.
const MAX_SOURCE_BYTES: usize = 64 << 10;

/// Longest code of one tag, string literals not counted. The engine's compiler takes quadratic time over a chain of
/// operators; conditions of published templates stay below 1 KB.
const MAX_TAG_BYTES: usize = 4 << 10;

/// Fuel for a conversation without content: 200,000 instructions, or 12.8 MB of strings.
const BASE_FUEL: u64 = 200_000;

/// Fuel for each message.
const FUEL_PER_MESSAGE: u64 = 2_000;

/// Output allowed beyond four times the content.
const BASE_OUTPUT_BYTES: usize = 1 << 20;

/// Wall-clock limit of a rendering with little content; each MiB of content adds a second.
const BASE_TIME: Duration = Duration::from_secs(2);

/// Stack of the threads that compile and render, reserved but only touched as far as it is used. The engine recurses
/// without a limit over operator chains of the source, and when it drops values nested as deep as the fuel allows.
const STACK_BYTES: usize = 256 << 20;

/// Name of the only template in the environment.
const NAME: &str = "chat_template";

/// A compiled template with its special tokens.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    env: Environment<'static>,
    source: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    origin: String,
}

impl Template {
    /// `bos_token` and `eos_token`.
    pub(crate) fn special_tokens(&self) -> (Option<&str>, Option<&str>) {
        (self.bos_token.as_deref(), self.eos_token.as_deref())
    }

    /// Compiles `source`.
    pub(crate) fn new(
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
        origin: &str,
    ) -> Result<Self, TextError> {
        if source.len() > MAX_SOURCE_BYTES {
            let (bytes, limit) = (source.len() as u64, MAX_SOURCE_BYTES as u64);
            return Err(TextError::TooLarge { origin: format!("{origin}: chat template"), bytes, limit });
        }
        if let Some(line) = overlong_tag(source) {
            let message = format!("a tag holds more than {MAX_TAG_BYTES} bytes of code");
            return Err(TextError::TemplateLimit { origin: origin.to_owned(), line: Some(line), message });
        }
        let text = source.to_owned();
        let compile = move || -> Result<Environment<'static>, Error> {
            let mut env = environment()?;
            env.add_template_owned(NAME, text)?;
            Ok(env)
        };
        Ok(Self {
            env: on_own_stack(compile, BASE_TIME, origin)?,
            source: source.to_owned(),
            bos_token: bos_token.map(str::to_owned),
            eos_token: eos_token.map(str::to_owned),
            origin: origin.to_owned(),
        })
    }

    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// The file, for messages.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    /// Renders `conversation` as Hugging Face's `apply_chat_template(tokenize=False)` does.
    pub(crate) fn render(&self, conversation: &Conversation) -> Result<String, TextError> {
        let content = conversation.bytes();
        let fuel = BASE_FUEL
            .saturating_add(FUEL_PER_MESSAGE.saturating_mul(conversation.entries() as u64))
            .saturating_add(content as u64);
        let output = BASE_OUTPUT_BYTES.saturating_add(content.saturating_mul(4));
        let limit = BASE_TIME + Duration::from_secs((content >> 20) as u64);

        let mut env = self.env.clone();
        env.set_fuel(Some(fuel));
        let context = self.context(conversation);
        on_own_stack(move || run(&env, context, output), limit, &self.origin)
    }

    /// The variables of a template. `tools` and `documents` are none when there are none, as in Python; special tokens that
    /// the checkpoint does not name are undefined. The caller's variables come first, so that they replace nothing.
    fn context(&self, conversation: &Conversation) -> Value {
        let list = |items: &[Json]| Value::from(items.iter().map(value).collect::<Vec<_>>());
        let optional = |items: &Option<Vec<Json>>| items.as_deref().map_or(Value::from(()), list);
        let mut variables: BTreeMap<&str, Value> =
            conversation.variables.iter().map(|(name, json)| (name.as_str(), value(json))).collect();
        variables.extend([
            ("messages", list(&conversation.messages)),
            ("add_generation_prompt", Value::from(conversation.add_generation_prompt)),
            ("tools", optional(&conversation.tools)),
            ("documents", optional(&conversation.documents)),
        ]);
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            if let Some(token) = token {
                variables.insert(name, Value::from(token.as_str()));
            }
        }
        Value::from_pairs(variables)
    }
}

/// JSON as a value of the engine.
fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_u64(), n.as_i64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(value).collect::<Vec<_>>()),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, json)| (key.as_str(), value(json)))),
    }
}

/// Line of the first tag with more than [`MAX_TAG_BYTES`] of code outside string literals. Comments and raw blocks are
/// not told apart from tags; whatever is misjudged by that is left to the clock.
fn overlong_tag(source: &str) -> Option<usize> {
    let (mut inside, mut start_line, mut length, mut line) = (false, 1, 0, 1);
    let mut quote: Option<u8> = None;
    let mut previous = 0;
    for &byte in source.as_bytes() {
        line += usize::from(byte == b'\n');
        if let Some(open) = quote {
            if byte == open && previous != b'\\' {
                quote = None;
            }
            // Two backslashes are one character and escape nothing.
            previous = if previous == b'\\' { 0 } else { byte };
            continue;
        }
        match (inside, previous, byte) {
            (false, b'{', b'{' | b'%') => (inside, start_line, length) = (true, line, 0),
            (true, b'}', b'}') | (true, b'%', b'}') => inside = false,
            (true, _, b'"' | b'\'') => quote = Some(byte),
            _ => {}
        }
        length += usize::from(inside);
        if length > MAX_TAG_BYTES {
            return Some(start_line);
        }
        previous = byte;
    }
    None
}

/// Runs `work` on a thread with a large stack and waits for it until `limit`.
fn on_own_stack<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    limit: Duration,
    origin: &str,
) -> Result<T, TextError> {
    let failed = |message: String| TextError::Template { origin: origin.to_owned(), line: None, message };
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("chat-template".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            // The receiver is gone when the clock ran out; nobody wants the result then.
            let _ = sender.send(work());
        })
        .map_err(|error| failed(format!("cannot start a thread for it: {error}")))?;
    match receiver.recv_timeout(limit) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(describe(&error, origin)),
        Err(mpsc::RecvTimeoutError::Timeout) => {
            Err(TextError::TemplateTimeout { origin: origin.to_owned(), limit })
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(failed("the template engine panicked".to_owned())),
    }
}

fn run(env: &Environment<'_>, context: Value, limit: usize) -> Result<String, Error> {
    let mut output = Bounded { bytes: Vec::new(), limit };
    env.get_template(NAME)?.render_captured_to(context, &mut output)?;
    String::from_utf8(output.bytes)
        .map_err(|_| Error::new(ErrorKind::WriteFailure, "the rendering is not valid UTF-8"))
}

/// Collects output up to a limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len().saturating_add(bytes.len()) > self.limit {
            let message = format!("the rendering is longer than {} bytes", self.limit);
            return Err(io::Error::new(io::ErrorKind::StorageFull, message));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The engine's error with the place and the innermost reason.
fn describe(error: &Error, origin: &str) -> TextError {
    let origin = origin.to_owned();
    let line = error.line();
    match error.kind() {
        ErrorKind::OutOfFuel => TextError::TemplateLimit {
            origin,
            line,
            message: "it takes more steps or memory than its limit".to_owned(),
        },
        ErrorKind::WriteFailure => {
            let reason = std::error::Error::source(error).map(ToString::to_string);
            let message = reason.unwrap_or_else(|| "the rendering could not be written".to_owned());
            TextError::TemplateLimit { origin, line, message }
        }
        kind => {
            let mut message = kind.to_string();
            if let Some(detail) = error.detail() {
                // A template's own exception text is shown as data: cut, and with control characters escaped.
                let detail = if detail.chars().any(char::is_control) || detail.len() > 400 {
                    quote(detail)
                } else {
                    detail.to_owned()
                };
                message = format!("{message}: {detail}");
            }
            TextError::Template { origin, line, message }
        }
    }
}

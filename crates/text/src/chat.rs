//! Chat messages to prompt tokens.
//!
//! A prompt must contain exactly the control tokens that the template wrote. Text of users may contain the same
//! strings: `<|im_end|>` in a document must stay ten ordinary characters. Encoding the messages one by one would
//! change how text at their borders tokenizes, so the template is rendered once, over contents in which control-token
//! strings are broken up by a marker character that occurs nowhere else; the rendering is split at the control tokens
//! that are still whole, and the marker is removed from the rest.

use serde::{Deserialize, Serialize};

use crate::conversation::Conversation;
use crate::generation_config::{parse_object, template_field, token_field};
use crate::template::Template;
use crate::tokenizer::Segment;
use crate::{SpecialTokens, TextError, Tokenizer};

/// `tokenizer_config.json` with a long template and a thousand added tokens stays below 1 MB.
const MAX_CONFIG_BYTES: usize = 16 << 20;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role` with `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// The chat template of a checkpoint: a Jinja program from messages to prompt text.
///
/// It runs as under Hugging Face's `apply_chat_template`: `trim_blocks` and `lstrip_blocks`, Python string methods,
/// `raise_exception`, `strftime_now` (in UTC), `tojson`, loop controls. Work, output
/// and time of a rendering are limited in proportion to the messages.
///
/// The time limit leaves the rendering thread behind, so a process that meets [`TextError::TemplateTimeout`] should
/// not go on using that checkpoint.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    template: Template,
}

impl ChatTemplate {
    /// Takes the template of a `tokenizer_config.json`, with its `bos_token` and `eos_token`; none when the file has no
    /// template. Of a list of named templates, the one named `default` is taken. `origin` names the file in messages.
    ///
    /// # Errors
    /// Bytes that are not JSON, fields of a wrong type, a list without `default`, and as [`ChatTemplate::new`].
    pub fn from_config_bytes(tokenizer_config_json: &[u8], origin: &str) -> Result<Option<Self>, TextError> {
        let config = parse_object(tokenizer_config_json, origin, MAX_CONFIG_BYTES)?;
        let bos = token_field(&config, "bos_token", origin)?;
        let eos = token_field(&config, "eos_token", origin)?;
        template_field(&config, origin)?
            .map(|source| Self::new(&source, bos.as_deref(), eos.as_deref(), origin))
            .transpose()
    }

    /// Compiles a template, for example the content of a `chat_template.jinja`.
    ///
    /// # Errors
    /// [`TextError::Template`] with the line when the source does not parse, [`TextError::TooLarge`] beyond 64 KiB,
    /// [`TextError::TemplateLimit`] for a tag with more than 4 KiB of code.
    pub fn new(
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
        origin: &str,
    ) -> Result<Self, TextError> {
        Ok(Self { template: Template::new(source, bos_token, eos_token, origin)? })
    }

    /// Another template with the special tokens of this one.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn with_source(&self, source: &str, origin: &str) -> Result<Self, TextError> {
        let (bos, eos) = self.template.special_tokens();
        Self::new(source, bos, eos, origin)
    }

    /// Renders `messages`, followed by the start of an assistant's turn if `add_generation_prompt`: see
    /// [`ChatTemplate::render_conversation`].
    ///
    /// # Errors
    /// As there.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        self.render_conversation(&Conversation::new(messages, add_generation_prompt))
    }

    /// Renders and encodes `messages`: see [`ChatTemplate::encode_conversation`].
    ///
    /// # Errors
    /// As there.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, TextError> {
        self.encode_conversation(tokenizer, &Conversation::new(messages, add_generation_prompt))
    }

    /// Renders a conversation.
    ///
    /// The text is for reading. To get tokens use [`ChatTemplate::encode_conversation`]: in this text, control tokens of the
    /// template cannot be told from the same strings in a message.
    ///
    /// # Errors
    /// [`TextError::Template`] when the template fails or raises an exception, or when there is nothing to continue;
    /// [`TextError::TemplateLimit`] and [`TextError::TemplateTimeout`] when it does too much.
    pub fn render_conversation(&self, conversation: &Conversation) -> Result<String, TextError> {
        conversation.cut(self.template.render(conversation)?, self.template.origin())
    }

    /// Renders a conversation and encodes the result. Special tokens are exactly those that the template wrote; all text
    /// that came from the conversation, its tools and documents included, is encoded as text.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_conversation`] and [`Tokenizer::encode`].
    pub fn encode_conversation(
        &self,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
    ) -> Result<Vec<u32>, TextError> {
        let specials: Vec<&str> = tokenizer.special_contents().collect();
        let marker = self.unused_character(conversation, &specials)?;
        let rendered =
            self.render_conversation(&conversation.map(&|text| defuse(text, &specials, marker)))?;
        let mut ids = Vec::with_capacity(rendered.len() / 3);
        for segment in tokenizer.split_special(&rendered)? {
            match segment {
                Segment::Special(id) => ids.push(id),
                Segment::Text(text) if text.contains(marker) => {
                    ids.extend(tokenizer.encode(&text.replace(marker, ""), SpecialTokens::AsText)?);
                }
                Segment::Text(text) => ids.extend(tokenizer.encode(&text, SpecialTokens::AsText)?),
            }
        }
        Ok(ids)
    }

    /// A private-use character that neither the conversation nor the template nor a special token contains.
    fn unused_character(&self, conversation: &Conversation, specials: &[&str]) -> Result<char, TextError> {
        // U+E000 alone is free in all but adversarial text, so one pass is the rule. With more than 137,000 private-use
        // characters, only a text that has them all leaves none.
        let private =
            ('\u{E000}'..='\u{F8FF}').chain('\u{F0000}'..='\u{FFFFD}').chain('\u{100000}'..='\u{10FFFD}');
        let mut used: std::collections::HashSet<char> = std::collections::HashSet::new();
        let mut add = |text: &str| used.extend(text.chars().filter(|&c| is_private_use(c)));
        conversation.visit(&mut add);
        specials.iter().copied().chain([self.template.source()]).for_each(add);
        private.into_iter().find(|c| !used.contains(c)).ok_or_else(|| TextError::Encode {
            origin: "messages".to_owned(),
            bytes: conversation.bytes(),
            message: "the text uses every private-use character of Unicode".to_owned(),
        })
    }
}

fn is_private_use(c: char) -> bool {
    matches!(c, '\u{E000}'..='\u{F8FF}' | '\u{F0000}'..='\u{FFFFD}' | '\u{100000}'..='\u{10FFFD}')
}

/// `text` with `marker` inside every special-token string, also inside those that begin in what stands before the text
/// or go on in what stands behind it. A marker never stands beside whitespace at an end, so templates may trim.
fn defuse(text: &str, specials: &[&str], marker: char) -> String {
    let mut cuts: Vec<usize> = Vec::new();
    let firsts: Vec<char> = specials.iter().filter_map(|special| special.chars().next()).collect();
    for (at, c) in text.char_indices().filter(|(_, c)| firsts.contains(c)) {
        let rest = text.get(at..).unwrap_or_default();
        if specials.iter().any(|special| rest.starts_with(special)) {
            cuts.push(at + c.len_utf8());
        }
    }
    for special in specials {
        let first = special.chars().next().map_or(0, char::len_utf8);
        let last = special.chars().next_back().map_or(0, char::len_utf8);
        for border in special.char_indices().map(|(at, _)| at).skip(1) {
            let (head, tail) = special.split_at(border);
            // The occurrence would go on behind the text: cut behind its first character.
            if text.ends_with(head) {
                cuts.push(text.len() - head.len() + first);
            }
            // The occurrence would begin before the text: cut before its last character.
            if text.starts_with(tail) {
                cuts.push(tail.len() - last);
            }
        }
    }
    if cuts.is_empty() {
        return text.to_owned();
    }
    cuts.sort_unstable();
    cuts.dedup();
    let mut out = String::with_capacity(text.len() + cuts.len() * marker.len_utf8());
    let mut from = 0;
    for cut in cuts {
        out.push_str(text.get(from..cut).unwrap_or_default());
        out.push(marker);
        from = cut;
    }
    out.push_str(text.get(from..).unwrap_or_default());
    out
}

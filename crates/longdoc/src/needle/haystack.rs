//! Prompts of an exact number of tokens with a sentence hidden at a depth.
//!
//! The haystack is encoded once; its token offsets tell where to cut. It is used as if it were repeated without end, an
//! empty line between the copies, in coordinates that run on: token `lap · tokens + i`, byte `lap · stride + b`.

use std::ops::Range;

use longhaul_engine::Generate;
use longhaul_text::{Message, SpecialTokens, Tokenizer};

use super::plan::{Fact, Random};
use crate::sentences::sentences;
use crate::{LongdocError, Result};

/// Attempts at hitting the length: a cut changes the tokens around it, so the first is off by a few.
const ATTEMPTS: usize = 8;
const BETWEEN_COPIES: &str = "\n\n";

/// An encoded haystack.
pub(crate) struct Haystack {
    text: String,
    /// Byte range of every token.
    offsets: Vec<Range<usize>>,
    sentences: Vec<Range<usize>>,
}

/// A prompt with the needle, and the same one without.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) ids: Vec<u32>,
    /// Tokens before the needle.
    pub(crate) needle_at: usize,
    /// The user message with the needle.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests look at the text"))]
    pub(crate) message: String,
    /// The user message without it.
    pub(crate) control: String,
}

impl Haystack {
    pub(crate) fn new(tokenizer: &Tokenizer, text: &str) -> Result<Self> {
        let text = text.trim().to_owned();
        let (_, offsets) = tokenizer.encode_with_offsets(&text)?;
        let sentences = sentences(&text);
        if offsets.is_empty() || sentences.is_empty() {
            return Err(LongdocError::Setting {
                field: "haystack",
                message: "the text has no tokens".into(),
            });
        }
        Ok(Self { text, offsets, sentences })
    }

    pub(crate) fn tokens(&self) -> usize {
        self.offsets.len()
    }

    /// Where instance `instance` starts: a sentence drawn by the seed, the same for all lengths and depths, so that
    /// prompts share their beginnings (and an engine that caches prefixes can reuse them).
    pub(crate) fn start(&self, seed: u64, instance: usize) -> usize {
        let mut random = Random::new(&[seed, 0x73_7461_7274, instance as u64]);
        let start = self.sentences.get(random.below(self.sentences.len())).map_or(0, |s| s.start);
        self.token_at(start)
    }

    /// Builds the prompt of at most `length` tokens, as close to it as the tokenizer allows.
    pub(crate) fn prompt(
        &self,
        model: &dyn Generate,
        fact: &Fact,
        start: usize,
        length: usize,
        depth: f32,
    ) -> Result<Prompt> {
        let around = encode(model, &format!("{}\n\n{}", fact.needle, fact.question))?.len();
        let too_short = |least: usize| LongdocError::Setting {
            field: "lengths",
            message: format!("{length} tokens are too few: template, needle and question alone take {least}"),
        };
        let mut fill = length.saturating_sub(around);
        if fill == 0 {
            return Err(too_short(around));
        }
        let mut best: Option<(Vec<u32>, String, String, String)> = None;
        let mut tried = Vec::with_capacity(ATTEMPTS);
        while tried.len() < ATTEMPTS && !tried.contains(&fill) {
            tried.push(fill);
            let (before, after) = self.cut(start, fill, depth);
            let message = insert(&before, &fact.needle, &after, &fact.question);
            let ids = encode(model, &message)?;
            let count = ids.len();
            if count <= length && best.as_ref().is_none_or(|(b, ..)| b.len() < count) {
                let control = format!("{}\n\n{}", [before.as_str(), &after].concat().trim(), fact.question);
                best = Some((ids, before, message, control));
            }
            if count == length || (count > length && fill == 1) {
                break;
            }
            fill = (fill + length).saturating_sub(count).max(1);
            // Between a prompt that is too long and one that is too short: creep up from below.
            if tried.contains(&fill) {
                fill = fill.saturating_sub(1).max(1);
            }
        }
        let (ids, before, message, control) = best.ok_or_else(|| too_short(around + 1))?;
        let needle_at = needle_position(model, &ids, &before, &fact.needle)?;
        Ok(Prompt { ids, needle_at, message, control })
    }

    /// The stretch of `fill` tokens from token `start`, cut in two where the needle goes: at `depth` percent of the
    /// tokens, back to the nearest end of a sentence. Depth 0 and 100 leave one side empty; for 100 the stretch is
    /// moved so that it ends with a sentence.
    fn cut(&self, start: usize, fill: usize, depth: f32) -> (String, String) {
        // Room to move backwards.
        let start = start + (fill / self.tokens() + 1) * self.tokens();
        let end = start + fill;
        if depth >= 100.0 {
            let (token, byte) =
                self.sentence_end(end).filter(|&(t, _)| t > start).unwrap_or((end, self.byte(end)));
            return (self.slice(self.byte(token - fill), byte).trim_start().to_owned(), String::new());
        }
        let target = start + (fill as f64 * f64::from(depth) / 100.0).round() as usize;
        let (from, to) = (self.byte(start), self.byte(end));
        match self.sentence_end(target).filter(|&(t, b)| t > start && b < to) {
            Some((_, at)) => (self.slice(from, at).trim_start().to_owned(), self.slice(at, to)),
            None => (String::new(), self.slice(from, to).trim_start().to_owned()),
        }
    }

    /// The last end of a sentence at or before a token: its token and byte.
    fn sentence_end(&self, token: usize) -> Option<(usize, usize)> {
        let (lap, within) = (token / self.tokens(), token % self.tokens());
        // A token that holds the last character of the sentence may reach beyond it.
        let ends = self.sentences.partition_point(|s| self.token_after(s.end) <= within);
        match ends.checked_sub(1).and_then(|i| self.sentences.get(i)) {
            Some(s) => Some((lap * self.tokens() + self.token_after(s.end), lap * self.stride() + s.end)),
            // The end of the copy before, whose last token is the one before this copy's first.
            None => lap.checked_sub(1).map(|l| (lap * self.tokens(), l * self.stride() + self.text.len())),
        }
    }

    /// The token that contains a byte.
    fn token_at(&self, byte: usize) -> usize {
        self.offsets.partition_point(|r| r.end <= byte)
    }

    /// The first token that starts at or after a byte.
    fn token_after(&self, byte: usize) -> usize {
        self.offsets.partition_point(|r| r.start < byte)
    }

    fn stride(&self) -> usize {
        self.text.len() + BETWEEN_COPIES.len()
    }

    /// Where a token starts.
    fn byte(&self, token: usize) -> usize {
        let (lap, within) = (token / self.tokens(), token % self.tokens());
        // A character of several tokens gives each of them its own range: the cut goes before it.
        let byte = self.offsets.get(within).map_or(0, |r| self.text.floor_char_boundary(r.start));
        lap * self.stride() + byte
    }

    fn slice(&self, from: usize, to: usize) -> String {
        let mut out = String::with_capacity(to.saturating_sub(from));
        let mut at = from;
        while at < to {
            let (lap, within) = (at / self.stride(), at % self.stride());
            let end = (to - lap * self.stride()).min(self.stride());
            out.push_str(self.text.get(within..end.min(self.text.len())).unwrap_or_default());
            if end == self.stride() {
                out.push_str(BETWEEN_COPIES);
            }
            at = lap * self.stride() + end;
        }
        out
    }
}

/// The user message: haystack with the needle as a sentence of its own, an empty line, the question.
fn insert(before: &str, needle: &str, after: &str, question: &str) -> String {
    let first = if before.is_empty() || before.ends_with(char::is_whitespace) { "" } else { " " };
    let second = if after.is_empty() || after.starts_with(char::is_whitespace) { "" } else { " " };
    format!("{before}{first}{needle}{second}{after}\n\n{question}")
}

pub(crate) fn encode(model: &dyn Generate, message: &str) -> Result<Vec<u32>> {
    Ok(model.chat_ids(&[Message { role: "user".into(), content: message.to_owned() }])?)
}

/// The number of tokens in front of the needle.
fn needle_position(model: &dyn Generate, ids: &[u32], before: &str, needle: &str) -> Result<usize> {
    let tokenizer = model.tokenizer()?;
    for text in [format!(" {needle}"), needle.to_owned()] {
        // Its last token may have merged with what follows.
        let needle = tokenizer.encode(&text, SpecialTokens::AsText)?;
        let needle = needle.get(..needle.len().saturating_sub(1).max(1)).unwrap_or(&needle);
        if let Some(at) = ids.windows(needle.len()).position(|w| w == needle) {
            return Ok(at);
        }
    }
    // Its first tokens merged with what stands before; the template in front of the message is left out.
    Ok(tokenizer.encode(before, SpecialTokens::AsText)?.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SearchModel, tokenizer};
    use longhaul_engine::LongContext;

    fn text() -> String {
        (0..60)
            .map(|i| {
                format!(
                    "Mr. Number {i} went home; \"why?\" he asked. Nobody knew{}",
                    if i % 5 == 4 { ".\n\n" } else { ". " }
                )
            })
            .collect()
    }

    fn fact() -> Fact {
        Fact {
            needle: "The secret code of Oslo is 48213.".into(),
            question: "What is the secret code of Oslo?".into(),
            expected: vec!["48213".into()],
        }
    }

    #[test]
    fn prompts_have_the_length_asked_for() {
        let model = SearchModel::new(LongContext::Dca);
        let text = text();
        let haystack = Haystack::new(&tokenizer(), &text).unwrap();
        for length in [60, 100, 333, 512, 1000, 4 * haystack.tokens() + 7] {
            for depth in [0.0, 10.0, 37.5, 50.0, 99.0, 100.0] {
                for instance in 0..3 {
                    let start = haystack.start(7, instance);
                    let prompt = haystack.prompt(&model, &fact(), start, length, depth).unwrap();
                    let tokens = prompt.ids.len();
                    assert!(tokens <= length && tokens + 3 >= length, "{tokens} of {length} at {depth} %");
                    assert_eq!(encode(&model, &prompt.message).unwrap(), prompt.ids);
                }
            }
        }
    }

    #[test]
    fn the_needle_is_a_sentence_of_its_own_at_its_depth() {
        let model = SearchModel::new(LongContext::Dca);
        let haystack = Haystack::new(&tokenizer(), &text()).unwrap();
        let needle = fact().needle;
        for step in 0..=20u8 {
            let depth = f32::from(step) * 5.0;
            let prompt = haystack.prompt(&model, &fact(), haystack.start(1, 0), 900, depth).unwrap();
            let (before, after) = prompt.message.split_once(&needle).unwrap();
            assert!(!after.contains(&needle));
            assert!(before.is_empty() || before.trim_end().ends_with(['.', '?', '"']), "{before:?}");
            assert!(!before.trim_end().ends_with("Mr."));
            assert!(after.starts_with([' ', '\n']));
            // Back from the target by less than two sentences, never beyond it.
            let target = 880.0 * f64::from(depth) / 100.0;
            let at = prompt.needle_at as f64;
            assert!(at <= target + 12.0 && at >= target - 45.0, "{at} for {target}");
            let position = model.tokenizer().unwrap().decode(&prompt.ids[prompt.needle_at..], false);
            assert!(position.trim_start().starts_with(&needle));
            match step {
                0 => assert_eq!(before, ""),
                20 => assert_eq!(after, format!("\n\n{}", fact().question)),
                _ => {}
            }
        }
    }

    #[test]
    fn the_control_is_the_prompt_without_the_needle() {
        let model = SearchModel::new(LongContext::Dca);
        let haystack = Haystack::new(&tokenizer(), &text()).unwrap();
        for depth in [0.0, 50.0, 100.0] {
            let prompt = haystack.prompt(&model, &fact(), 0, 400, depth).unwrap();
            assert!(!prompt.control.contains("48213"));
            let squeezed = |s: &str| s.split_whitespace().collect::<Vec<_>>().join(" ");
            let without = squeezed(&prompt.message.replace(&fact().needle, ""));
            assert_eq!(squeezed(&prompt.control), without);
        }
    }

    #[test]
    fn repeats_a_short_haystack() {
        let haystack = Haystack::new(&tokenizer(), "One two three. Four five. ").unwrap();
        let n = haystack.tokens();
        let (before, after) = haystack.cut(0, 3 * n, 50.0);
        let copies = "One two three. Four five.\n\n".repeat(3);
        assert_eq!(format!("{before}{after}").trim(), copies.trim());
        assert!(before.ends_with('.'));
    }

    #[test]
    fn cuts_between_characters_and_without_sentences() {
        let model = SearchModel::new(LongContext::Dca);
        for text in ["秘密の都市はどこにもない".repeat(50), "word ".repeat(500), "😀".repeat(300)]
        {
            let haystack = Haystack::new(&tokenizer(), &text).unwrap();
            for depth in [0.0, 50.0, 100.0] {
                for length in 90..110 {
                    let prompt =
                        haystack.prompt(&model, &fact(), haystack.start(3, 0), length, depth).unwrap();
                    assert!(prompt.ids.len() <= length && prompt.ids.len() + 6 >= length);
                    assert!(!prompt.message.contains('\u{fffd}'));
                }
            }
        }
    }

    #[test]
    fn refuses_a_length_without_room() {
        let model = SearchModel::new(LongContext::Dca);
        let haystack = Haystack::new(&tokenizer(), &text()).unwrap();
        let error = haystack.prompt(&model, &fact(), 0, 20, 50.0).unwrap_err();
        assert!(error.to_string().starts_with("lengths: 20 tokens are too few"), "{error}");
    }
}

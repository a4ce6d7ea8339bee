//! Token ids to text while they are generated, in constant time per token.

use crate::Tokenizer;

/// Turns a stream of token ids into text, piece by piece.
///
/// A token may end in the middle of a character. The bytes of an unfinished character (at most three) are held back
/// until later tokens finish it or prove it broken; nothing is ever decoded twice. The concatenation of all pieces
/// equals [`Tokenizer::decode`] of all ids, whatever the bytes are.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    utf8: Utf8Stream,
}

impl Detokenizer {
    /// A detokenizer at the start of a text. With `skip_special`, special tokens contribute nothing.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, utf8: Utf8Stream::default() }
    }

    /// Takes the next token and returns the text that became certain, possibly none. Unknown ids give nothing.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        let mut text = String::new();
        self.utf8.push(&self.tokenizer.token_bytes(id), &mut text);
        text
    }

    /// Ends the text: bytes of an unfinished character become U+FFFD. The detokenizer is then at the start again.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.utf8.finish(&mut text);
        text
    }
}

/// Lossy UTF-8 decoding of a byte stream, equal to [`String::from_utf8_lossy`] of the concatenation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Utf8Stream {
    /// A prefix of one character, 0 to 3 bytes, between calls.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Decodes `bytes` after what is pending and appends what is certain to `text`.
    pub(crate) fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut chunks = self.pending.utf8_chunks().peekable();
        let mut rest: Vec<u8> = Vec::new();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            let unfinished = chunks.peek().is_none() && is_unfinished(invalid);
            if unfinished {
                rest.extend_from_slice(invalid);
            } else {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending = rest;
    }

    /// Ends the stream: an unfinished character becomes one U+FFFD.
    pub(crate) fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Whether more bytes could still complete `invalid` to a character.
fn is_unfinished(invalid: &[u8]) -> bool {
    std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(pieces: &[&[u8]]) -> (String, Vec<String>) {
        let mut utf8 = Utf8Stream::default();
        let mut out = Vec::new();
        for piece in pieces {
            let mut text = String::new();
            utf8.push(piece, &mut text);
            out.push(text);
        }
        let mut text = String::new();
        utf8.finish(&mut text);
        out.push(text);
        (out.concat(), out)
    }

    #[test]
    fn a_character_appears_only_when_its_last_byte_arrives() {
        let bytes = "地".as_bytes();
        let (_, pieces) = stream(&[&bytes[..1], &bytes[1..2], &bytes[2..]]);
        assert_eq!(pieces, ["", "", "地", ""]);
    }

    #[test]
    fn an_unfinished_character_ends_as_one_replacement() {
        let (text, pieces) = stream(&["ok 🦀".as_bytes().split_at(6).0]);
        assert_eq!(pieces, ["ok ", "\u{FFFD}"]);
        assert_eq!(text, "ok \u{FFFD}");
    }

    #[test]
    fn impossible_sequences_are_replaced_at_once() {
        // 0xF5 can start nothing; 0xE0 0x80 is an overlong form; 0xED 0xA0 would be a surrogate.
        for bad in [&[0xF5_u8][..], &[0xE0, 0x80], &[0xED, 0xA0]] {
            let (text, pieces) = stream(&[bad, b"x"]);
            assert_eq!(text, format!("{}x", String::from_utf8_lossy(bad)));
            assert!(pieces[0].starts_with('\u{FFFD}'), "{bad:x?} must not be held back");
        }
    }

    /// Bytes that stress the decoder: leads, continuations, ASCII and whole characters.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<u8>().prop_map(|b| vec![b]),
            (0x80_u8..0xC0).prop_map(|b| vec![b]),
            (0xC0_u8..=0xFF).prop_map(|b| vec![b]),
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
        ];
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_split_equals_the_lossy_decoding_of_the_whole(
            bytes in bytes(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            prop_assert_eq!(stream(&pieces).0, String::from_utf8_lossy(&bytes));
        }
    }
}

//! Byte-level BPE tokenizer of a checkpoint.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::normalizer::OffsetReferential;
use tokenizers::{
    AddedToken, AddedVocabulary, Model, NormalizerWrapper, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper,
};

use crate::TextError;
use crate::byte_level::char_to_byte;
use crate::error::quote;
use crate::tokenizer_json::{self, MAX_FILE_BYTES, Parts};

/// What a special-token string such as `<|im_end|>` in a text means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Characters like any others. The only safe choice for text that came from a user or a document.
    AsText,
    /// The control token of that name.
    Parse,
}

/// A checkpoint's tokenizer. Cloning shares the vocabulary.
///
/// Qwen2's tokenizer normalizes text to Unicode NFC before it encodes: `decode(encode(text))` is the NFC form of
/// `text`, not always the same bytes. Offsets always point into the text that was given.
///
/// Added tokens that are not special (Qwen2.5 lists `<tool_call>` so) are matched in text in either mode, as the
/// reference implementation does: they carry no control meaning.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    origin: String,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: PreTokenizerWrapper,
    model: BPE,
    /// Matches all added tokens.
    parse: AddedVocabulary,
    /// Matches only the added tokens that are not special.
    as_text: AddedVocabulary,
    special: HashMap<String, u32>,
    table: TokenTable,
}

/// The raw bytes of every token, in one buffer.
#[derive(Default)]
struct TokenTable {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    start: u32,
    len: u32,
    special: bool,
}

impl TokenTable {
    fn insert(&mut self, id: u32, bytes: impl IntoIterator<Item = u8>, special: bool) {
        let start = self.bytes.len();
        self.bytes.extend(bytes);
        let index = id as usize;
        if self.entries.len() <= index {
            self.entries.resize(index + 1, Entry::default());
        }
        if let Some(entry) = self.entries.get_mut(index) {
            // Files are limited to 128 MiB, so offsets fit.
            *entry = Entry { start: start as u32, len: (self.bytes.len() - start) as u32, special };
        }
    }

    fn get(&self, id: u32) -> Option<&[u8]> {
        let entry = self.entries.get(id as usize)?;
        self.bytes.get(entry.start as usize..(entry.start + entry.len) as usize)
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`Tokenizer::from_bytes`], and when the file cannot be read.
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        let read = |source| TextError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(read)?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(read)?;
        Self::from_bytes(&bytes, &path.display().to_string())
    }

    /// Builds a tokenizer from the bytes of a `tokenizer.json`. `origin` names them in messages.
    ///
    /// Supported is byte-level BPE: model `BPE` with a token for each of the 256 bytes, pre-tokenizer and decoder
    /// `ByteLevel`, normalizer `NFC` or none. `truncation` and `padding` concern batches and are not used.
    ///
    /// # Errors
    /// Bytes that are not JSON, fields that are missing, malformed or contradict each other, and anything that is not
    /// supported; the message names the field.
    pub fn from_bytes(bytes: &[u8], origin: &str) -> Result<Self, TextError> {
        // The library panics on some malformed parts; the checks before it should leave none of those.
        catch_unwind(AssertUnwindSafe(|| Self::build(tokenizer_json::parse(bytes, origin)?, origin)))
            .unwrap_or_else(|_| {
                Err(TextError::Component {
                    origin: origin.to_owned(),
                    field: "tokenizer.json".to_owned(),
                    message: "the tokenizers library panicked on this file; it is damaged".to_owned(),
                })
            })
    }

    fn build(parts: Parts, origin: &str) -> Result<Self, TextError> {
        let component = |field: &str, message: String| TextError::Component {
            origin: origin.to_owned(),
            field: field.to_owned(),
            message,
        };
        let mut table = TokenTable::default();
        for (token, id) in &parts.vocab {
            table.insert(*id, vocab_bytes(token), false);
        }
        let vocab: Vocab = parts.vocab.into_iter().collect();
        let model = BpeBuilder::new()
            .vocab_and_merges(vocab, parts.merges)
            .ignore_merges(parts.ignore_merges)
            .build()
            .map_err(|e| component("model", e.to_string()))?;

        let tokens: Vec<AddedToken> = parts
            .added
            .iter()
            .map(|added| {
                AddedToken::from(added.content.clone(), added.special)
                    .normalized(added.normalized)
                    .lstrip(added.lstrip)
                    .rstrip(added.rstrip)
                    .single_word(added.single_word)
            })
            .collect();
        let vocabulary = || {
            let mut vocabulary = AddedVocabulary::new();
            vocabulary
                .add_tokens(tokens.clone(), &model, parts.normalizer.as_ref())
                .map_err(|e| component("added_tokens", e.to_string()))?;
            Ok(vocabulary)
        };
        let parse = vocabulary()?;
        let mut as_text = vocabulary()?;
        as_text.set_encode_special_tokens(true);

        let mut special = HashMap::new();
        for (i, added) in parts.added.iter().enumerate() {
            // The library numbers added tokens by position and only logs when the file says otherwise.
            let given = parse.token_to_id(&added.content, &model);
            if given != Some(added.id) {
                return Err(TextError::field(
                    origin,
                    format!("added_tokens[{i}].id"),
                    format!("{} for {}", added.id, quote(&added.content)),
                    match given {
                        Some(id) => {
                            format!("{id}: added tokens are numbered on from the vocabulary without gaps")
                        }
                        None => "an id that the vocabulary leaves free".to_owned(),
                    },
                ));
            }
            table.insert(added.id, added.content.bytes(), added.special);
            if added.special {
                special.insert(added.content.clone(), added.id);
            }
        }
        Ok(Self(Arc::new(Inner {
            origin: origin.to_owned(),
            normalizer: parts.normalizer,
            pre_tokenizer: parts.pre_tokenizer,
            model,
            parse,
            as_text,
            special,
            table,
        })))
    }

    /// Largest token id plus one. A model's embedding may have more rows; those ids decode to nothing.
    pub fn vocab_size(&self) -> usize {
        self.0.table.entries.len()
    }

    /// Id of the special token with exactly this content.
    pub fn special_id(&self, content: &str) -> Option<u32> {
        self.0.special.get(content).copied()
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.table.entries.get(id as usize).is_some_and(|entry| entry.special)
    }

    /// Contents of all special tokens, in no particular order.
    pub fn special_contents(&self) -> impl Iterator<Item = &str> {
        self.0.special.keys().map(String::as_str)
    }

    /// Encodes `text`. Nothing is added around it.
    ///
    /// # Errors
    /// [`TextError::Encode`] when the split pattern of the tokenizer gives up on this text.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TextError> {
        let vocabulary = match special {
            SpecialTokens::AsText => &self.0.as_text,
            SpecialTokens::Parse => &self.0.parse,
        };
        let encoded = self.tokenize(text, vocabulary)?;
        let splits = encoded.get_splits(OffsetReferential::Normalized, OffsetType::None);
        let mut ids = Vec::with_capacity(splits.len());
        for (_, _, tokens) in splits {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(ids)
    }

    /// Encodes `text` with special tokens as text and returns, for each id, the byte range of `text` it covers.
    ///
    /// Ranges are in order, begin and end at characters, and leave nothing out. A token that holds a part of a
    /// character has the range of the whole character, so neighbours may share one; with NFC, several characters may
    /// have become one.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), TextError> {
        let encoded = self.tokenize(text, &self.0.as_text)?;
        let encoding = encoded
            .into_encoding(None, 0, OffsetType::Byte)
            .map_err(|e| self.encode_error(text, e.to_string()))?;
        Ok((encoding.get_ids().to_vec(), cover(encoding.get_offsets(), text.len())))
    }

    fn tokenize(&self, text: &str, vocabulary: &AddedVocabulary) -> Result<PreTokenizedString, TextError> {
        let inner = &*self.0;
        let run = || -> tokenizers::Result<PreTokenizedString> {
            let mut pieces = vocabulary.extract_and_normalize(inner.normalizer.as_ref(), text);
            inner.pre_tokenizer.pre_tokenize(&mut pieces)?;
            pieces.tokenize(|piece| inner.model.tokenize(piece.get()))?;
            Ok(pieces)
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(pieces)) => Ok(pieces),
            Ok(Err(error)) => Err(self.encode_error(text, error.to_string())),
            Err(_) => Err(self.encode_error(text, "the tokenizers library panicked".to_owned())),
        }
    }

    fn encode_error(&self, text: &str, message: String) -> TextError {
        TextError::Encode { origin: self.0.origin.clone(), bytes: text.len(), message }
    }

    /// Splits `text` at its special tokens as the reference implementation does, without normalizing it.
    pub(crate) fn split_special(&self, text: &str) -> Result<Vec<Segment>, TextError> {
        let run = || self.0.parse.extract_and_normalize(None::<&NormalizerWrapper>, text);
        let pieces = catch_unwind(AssertUnwindSafe(run))
            .map_err(|_| self.encode_error(text, "the tokenizers library panicked".to_owned()))?;
        let mut segments: Vec<Segment> = Vec::new();
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            let special = tokens.iter().flatten().map(|token| token.id).find(|&id| self.is_special(id));
            match (special, segments.last_mut()) {
                (Some(id), _) => segments.push(Segment::Special(id)),
                (None, Some(Segment::Text(text))) => text.push_str(piece),
                (None, _) => segments.push(Segment::Text(piece.to_owned())),
            }
        }
        Ok(segments)
    }

    /// Decodes `ids`. Bytes that are not UTF-8 become U+FFFD, as [`String::from_utf8_lossy`] puts them; ids outside
    /// the vocabulary, and special tokens if `skip_special`, give nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(&self.token_bytes(id));
            }
        }
        match String::from_utf8_lossy(&bytes) {
            Cow::Borrowed(_) => String::from_utf8(bytes).unwrap_or_default(),
            Cow::Owned(text) => text,
        }
    }

    /// The bytes that token `id` stands for; empty for ids outside the vocabulary. A special token's bytes are its
    /// content.
    pub fn token_bytes(&self, id: u32) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.0.table.get(id).unwrap_or_default())
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("origin", &self.0.origin)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

/// Closes the gaps between `offsets`: where NFC composes characters, the library counts only the first of them.
fn cover(offsets: &[(usize, usize)], len: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::with_capacity(offsets.len());
    let mut next = (len, len);
    let mut end = len;
    for &(start, own_end) in offsets.iter().rev() {
        if (start, own_end) != next {
            // Tokens of one character share its range; before another one, the range reaches up to it.
            end = own_end.max(next.0);
        }
        next = (start, own_end);
        ranges.push(start..end);
    }
    ranges.reverse();
    if let Some(first) = offsets.first() {
        let shared = offsets.iter().take_while(|&offset| offset == first).count();
        ranges.iter_mut().take(shared).for_each(|range| range.start = 0);
    }
    ranges
}

/// A part of a text between or at special tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Ordinary text.
    Text(String),
    /// A special token.
    Special(u32),
}

/// The bytes of a vocabulary entry: its characters are bytes of GPT-2's alphabet. An entry with any other character
/// stands for itself, as in the reference decoder.
fn vocab_bytes(token: &str) -> Vec<u8> {
    token.chars().map(char_to_byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

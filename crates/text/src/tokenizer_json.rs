//! `tokenizer.json`: parsing and checking, before the `tokenizers` library sees any of it.
//!
//! The library trusts its input: some malformed files make it panic, others load and then silently drop text. Here
//! every field that matters is read and checked first, and only byte-level BPE as Qwen2 uses it is let through.

use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use crate::TextError;
use crate::byte_level::byte_to_char;
use crate::error::{describe, quote};

/// Largest file read: about four times the largest published one.
pub(crate) const MAX_FILE_BYTES: u64 = 128 << 20;

/// Largest token id: bounds the table from ids to bytes. Published vocabularies end below 300,000.
const MAX_TOKEN_ID: u32 = (1 << 22) - 1;

/// The checked contents of a `tokenizer.json`.
pub(crate) struct Parts {
    pub(crate) vocab: Vec<(String, u32)>,
    pub(crate) merges: Vec<(String, String)>,
    pub(crate) ignore_merges: bool,
    pub(crate) added: Vec<Added>,
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) pre_tokenizer: PreTokenizerWrapper,
}

/// One entry of `added_tokens`.
pub(crate) struct Added {
    pub(crate) id: u32,
    pub(crate) content: String,
    pub(crate) special: bool,
    pub(crate) normalized: bool,
    pub(crate) lstrip: bool,
    pub(crate) rstrip: bool,
    pub(crate) single_word: bool,
}

#[derive(Deserialize)]
#[serde(expecting = "a tokenizer.json object")]
struct Raw {
    #[serde(default)]
    added_tokens: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Option<RawModel>,
}

#[derive(Deserialize)]
#[serde(expecting = "`model` as an object")]
struct RawModel {
    #[serde(default, rename = "type")]
    kind: Value,
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    end_of_word_suffix: Value,
    #[serde(default)]
    byte_fallback: Value,
    #[serde(default)]
    ignore_merges: Value,
    vocab: Option<RawVocab>,
    merges: Option<RawMerges>,
}

/// Parses and checks `bytes`.
///
/// # Errors
/// Names the field and what was expected; see the tests for the list of refusals.
pub(crate) fn parse(bytes: &[u8], origin: &str) -> Result<Parts, TextError> {
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let (bytes, limit) = (bytes.len() as u64, MAX_FILE_BYTES);
        return Err(TextError::TooLarge { origin: origin.to_owned(), bytes, limit });
    }
    let raw: Raw = serde_json::from_slice(bytes).map_err(|source| match source.classify() {
        serde_json::error::Category::Data => TextError::Component {
            origin: origin.to_owned(),
            field: "tokenizer.json".to_owned(),
            message: source.to_string(),
        },
        _ => TextError::Json { origin: origin.to_owned(), source },
    })?;
    let check = Check { origin };
    let model = raw.model.ok_or_else(|| check.missing("model", "the BPE model (vocabulary and merges)"))?;
    check.model(&model)?;
    let vocab = model.vocab.ok_or_else(|| check.missing("model.vocab", "an object of tokens and ids"))?.0;
    let merges = model.merges.ok_or_else(|| check.missing("model.merges", "a list of merges"))?.0;
    let ignore_merges = check.flag("model.ignore_merges", &model.ignore_merges)?;
    let added = check.added_tokens(&raw.added_tokens)?;
    check.vocab(&vocab, &merges, &added, ignore_merges)?;
    check.decoder(&raw.decoder)?;
    check.post_processor(&raw.post_processor)?;
    Ok(Parts {
        vocab,
        merges,
        ignore_merges,
        added,
        normalizer: check.normalizer(raw.normalizer)?,
        pre_tokenizer: check.pre_tokenizer(raw.pre_tokenizer)?,
    })
}

struct Check<'a> {
    origin: &'a str,
}

impl Check<'_> {
    fn refuse(
        &self,
        field: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> TextError {
        TextError::field(self.origin, field, found, expected)
    }

    fn missing(&self, field: &str, expected: &str) -> TextError {
        self.refuse(field, "nothing", expected)
    }

    fn flag(&self, field: &str, value: &Value) -> Result<bool, TextError> {
        match value {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(*flag),
            other => Err(self.refuse(field, describe(other), "true or false")),
        }
    }

    fn model(&self, model: &RawModel) -> Result<(), TextError> {
        // Old files leave the type out.
        if !model.kind.is_null() && model.kind.as_str() != Some("BPE") {
            return Err(self.refuse(
                "model.type",
                describe(&model.kind),
                "\"BPE\", the only supported model",
            ));
        }
        if !(model.dropout.is_null() || model.dropout.as_f64() == Some(0.0)) {
            let expected = "null: dropout makes the same text encode differently each time";
            return Err(self.refuse("model.dropout", describe(&model.dropout), expected));
        }
        for (field, value) in [
            ("model.continuing_subword_prefix", &model.continuing_subword_prefix),
            ("model.end_of_word_suffix", &model.end_of_word_suffix),
        ] {
            if !(value.is_null() || value.as_str() == Some("")) {
                return Err(self.refuse(
                    field,
                    describe(value),
                    "null or \"\": byte-level BPE has no affixes",
                ));
            }
        }
        if self.flag("model.byte_fallback", &model.byte_fallback)? {
            return Err(self.refuse(
                "model.byte_fallback",
                "true",
                "false: only byte-level BPE is supported",
            ));
        }
        Ok(())
    }

    fn added_tokens(&self, value: &Value) -> Result<Vec<Added>, TextError> {
        let items = match value {
            Value::Null => return Ok(Vec::new()),
            Value::Array(items) => items,
            other => return Err(self.refuse("added_tokens", describe(other), "a list of added tokens")),
        };
        let mut added: Vec<Added> = Vec::with_capacity(items.len());
        let mut by_id: HashMap<u32, usize> = HashMap::new();
        let mut by_content: HashMap<&str, usize> = HashMap::new();
        for (i, item) in items.iter().enumerate() {
            let name = |key: &str| format!("added_tokens[{i}].{key}");
            let field = |key: &str| item.get(key).unwrap_or(&Value::Null);
            if !item.is_object() {
                return Err(self.refuse(
                    format!("added_tokens[{i}]"),
                    describe(item),
                    "an object with id and content",
                ));
            }
            let id =
                field("id").as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| id <= MAX_TOKEN_ID);
            let id = id.ok_or_else(|| {
                self.refuse(name("id"), describe(field("id")), format!("an integer from 0 to {MAX_TOKEN_ID}"))
            })?;
            let content = match field("content") {
                Value::String(text) if !text.is_empty() => text,
                other => {
                    return Err(self.refuse(name("content"), describe(other), "a string that is not empty"));
                }
            };
            if let Some(other) = by_id.insert(id, i) {
                let expected = format!("an id of its own: added_tokens[{other}] has it already");
                return Err(self.refuse(name("id"), id.to_string(), expected));
            }
            if let Some(other) = by_content.insert(content, i) {
                let expected = format!("a content of its own: added_tokens[{other}] has it already");
                return Err(self.refuse(name("content"), quote(content), expected));
            }
            added.push(Added {
                id,
                content: content.clone(),
                special: self.flag(&name("special"), field("special"))?,
                normalized: self.flag(&name("normalized"), field("normalized"))?,
                lstrip: self.flag(&name("lstrip"), field("lstrip"))?,
                rstrip: self.flag(&name("rstrip"), field("rstrip"))?,
                single_word: self.flag(&name("single_word"), field("single_word"))?,
            });
        }
        Ok(added)
    }

    fn vocab(
        &self,
        vocab: &[(String, u32)],
        merges: &[(String, String)],
        added: &[Added],
        ignore_merges: bool,
    ) -> Result<(), TextError> {
        let mut ids: HashMap<&str, u32> = HashMap::with_capacity(vocab.len());
        let mut tokens: HashMap<u32, &str> = HashMap::with_capacity(vocab.len());
        for (token, id) in vocab {
            let name = || format!("model.vocab[{}]", quote(token));
            if *id > MAX_TOKEN_ID {
                return Err(self.refuse(name(), id.to_string(), format!("an id from 0 to {MAX_TOKEN_ID}")));
            }
            if ids.insert(token, *id).is_some() {
                return Err(self.refuse(name(), "the token twice", "every token once"));
            }
            if let Some(other) = tokens.insert(*id, token) {
                let expected = format!("an id of its own: {} has it already", quote(other));
                return Err(self.refuse(name(), format!("id {id}"), expected));
            }
        }
        for byte in 0..=u8::MAX {
            let mut buffer = [0; 4];
            let token: &str = byte_to_char(byte).encode_utf8(&mut buffer);
            if !ids.contains_key(token) {
                let expected = "all 256 bytes: text with a missing byte would be dropped in silence";
                let found = format!("no token {} for byte 0x{byte:02X}", quote(token));
                return Err(self.refuse("model.vocab", found, expected));
            }
        }
        let mut results: HashMap<u32, usize> = HashMap::with_capacity(merges.len());
        let mut joined = String::new();
        for (i, (left, right)) in merges.iter().enumerate() {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            for token in [left, right, &joined] {
                if !ids.contains_key(token.as_str()) {
                    let found = format!("{} + {}", quote(left), quote(right));
                    let expected = format!("tokens of model.vocab: {} is not there", quote(token));
                    return Err(self.refuse(format!("model.merges[{i}]"), found, expected));
                }
            }
            if let Some(&id) = ids.get(joined.as_str()) {
                results.insert(id, i);
            }
        }
        for (i, token) in added.iter().enumerate() {
            self.added_against_vocab(i, token, &ids, &tokens)?;
            let plain = ids.contains_key(token.content.as_str());
            let reachable =
                ignore_merges || results.contains_key(&token.id) || token.content.chars().count() == 1;
            if token.special && plain && reachable {
                let expected = "a special token that ordinary text cannot be merged into";
                return Err(self.refuse(format!("added_tokens[{i}]"), quote(&token.content), expected));
            }
        }
        Ok(())
    }

    fn added_against_vocab(
        &self,
        index: usize,
        token: &Added,
        ids: &HashMap<&str, u32>,
        tokens: &HashMap<u32, &str>,
    ) -> Result<(), TextError> {
        let name = format!("added_tokens[{index}].id");
        match (ids.get(token.content.as_str()), tokens.get(&token.id)) {
            (Some(&id), _) if id != token.id => {
                let expected = format!("{id}, the id of {} in model.vocab", quote(&token.content));
                Err(self.refuse(name, token.id.to_string(), expected))
            }
            (None, Some(other)) => {
                let expected = format!("an id of its own: {} of model.vocab has it already", quote(other));
                Err(self.refuse(name, token.id.to_string(), expected))
            }
            _ => Ok(()),
        }
    }

    fn decoder(&self, value: &Value) -> Result<(), TextError> {
        match value.get("type").and_then(Value::as_str) {
            Some("ByteLevel") => Ok(()),
            _ => Err(self.refuse("decoder", describe(value), "ByteLevel, the only supported decoder")),
        }
    }

    /// A post-processor may only adjust offsets: one that inserts tokens would be ignored here, so it is refused.
    fn post_processor(&self, value: &Value) -> Result<(), TextError> {
        match value.get("type").and_then(Value::as_str) {
            _ if value.is_null() => Ok(()),
            Some("ByteLevel") => Ok(()),
            _ => Err(self.refuse("post_processor", describe(value), "null or ByteLevel")),
        }
    }

    fn normalizer(&self, value: Value) -> Result<Option<NormalizerWrapper>, TextError> {
        match value.get("type").and_then(Value::as_str) {
            _ if value.is_null() => return Ok(None),
            Some("NFC") => {}
            _ => return Err(self.refuse("normalizer", describe(&value), "null or NFC")),
        }
        serde_json::from_value(value).map(Some).map_err(|e| self.component("normalizer", e))
    }

    fn pre_tokenizer(&self, value: Value) -> Result<PreTokenizerWrapper, TextError> {
        let kind = |value: &Value| value.get("type").and_then(Value::as_str).map(str::to_owned);
        let expected = "ByteLevel, or a Sequence of Split, Digits and at last ByteLevel";
        let steps = match kind(&value).as_deref() {
            Some("ByteLevel") => vec![&value],
            Some("Sequence") => match value.get("pretokenizers") {
                Some(Value::Array(steps)) => steps.iter().collect(),
                other => {
                    let found = other.map_or_else(|| "nothing".to_owned(), describe);
                    return Err(self.refuse("pre_tokenizer.pretokenizers", found, "a list"));
                }
            },
            _ => return Err(self.refuse("pre_tokenizer", describe(&value), expected)),
        };
        for (i, step) in steps.iter().enumerate() {
            let last = i + 1 == steps.len();
            match kind(step).as_deref() {
                Some("ByteLevel") if last => {}
                Some("Split" | "Digits") if !last => {}
                _ => {
                    return Err(self.refuse(
                        format!("pre_tokenizer.pretokenizers[{i}]"),
                        describe(step),
                        expected,
                    ));
                }
            }
        }
        if steps.is_empty() {
            return Err(self.refuse("pre_tokenizer.pretokenizers", "an empty list", expected));
        }
        serde_json::from_value(value).map_err(|e| self.component("pre_tokenizer", e))
    }

    fn component(&self, field: &str, error: serde_json::Error) -> TextError {
        TextError::Component {
            origin: self.origin.to_owned(),
            field: field.to_owned(),
            message: error.to_string(),
        }
    }
}

/// `model.vocab`, in file order, duplicates kept for the check.
struct RawVocab(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for RawVocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawVocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`model.vocab` as an object of tokens and ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawVocab, A::Error> {
                let mut entries = Vec::new();
                while let Some((token, id)) = map.next_entry::<String, VocabId>()? {
                    entries.push((token, id.0));
                }
                Ok(RawVocab(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

struct VocabId(u32);

impl<'de> Deserialize<'de> for VocabId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Id;
        impl Visitor<'_> for Id {
            type Value = VocabId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "`model.vocab` ids as integers from 0 to {MAX_TOKEN_ID}")
            }

            fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<VocabId, E> {
                u32::try_from(id)
                    .map(VocabId)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(id), &self))
            }
        }
        deserializer.deserialize_u32(Id)
    }
}

/// `model.merges` in either published form: `"left right"` or `["left", "right"]`.
struct RawMerges(Vec<(String, String)>);

impl<'de> Deserialize<'de> for RawMerges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawMerges;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`model.merges` as a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<RawMerges, A::Error> {
                let mut entries = Vec::new();
                while let Some(Merge(left, right)) = seq.next_element()? {
                    entries.push((left, right));
                }
                Ok(RawMerges(entries))
            }
        }
        deserializer.deserialize_seq(Entries)
    }
}

struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge of `model.merges` as \"left right\" or [\"left\", \"right\"]")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Merge, E> {
                match text.split_once(' ') {
                    Some((left, right)) if !right.contains(' ') => {
                        Ok(Merge(left.to_owned(), right.to_owned()))
                    }
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
                use serde::de::Error;
                let left = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(0, &self))?;
                let right = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(1, &self))?;
                match seq.next_element::<serde::de::IgnoredAny>()? {
                    None => Ok(Merge(left, right)),
                    Some(_) => Err(A::Error::invalid_length(3, &self)),
                }
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

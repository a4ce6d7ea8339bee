//! `generation_config.json`: the checkpoint's end-of-sequence ids and sampling defaults.

use serde_json::{Map, Value};

use crate::TextError;
use crate::error::{describe, quote};

/// Larger than any published file of this kind by three orders of magnitude.
const MAX_BYTES: usize = 1 << 20;

/// Sampling defaults of a checkpoint. A field that the file leaves out, or sets to `null`, is `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a text. The file writes one id or a list; empty when it names none.
    pub eos_token_ids: Vec<u32>,
    /// Whether the checkpoint's authors sample (true) or decode greedily (false).
    pub do_sample: Option<bool>,
    /// Softmax temperature, finite, at least 0. 0 means greedy.
    pub temperature: Option<f32>,
    /// Nucleus probability mass, in (0, 1].
    pub top_p: Option<f32>,
    /// Number of most probable tokens kept. 0 (also written -1) keeps all.
    pub top_k: Option<u32>,
    /// Smallest probability kept, relative to the most probable token, in [0, 1].
    pub min_p: Option<f32>,
    /// Factor by which logits of tokens already seen are weakened, finite, above 0; 1 does nothing.
    pub repetition_penalty: Option<f32>,
    /// Most tokens to generate, at least 1.
    pub max_new_tokens: Option<u32>,
}

impl GenerationConfig {
    /// Parses the bytes of a `generation_config.json`. Keys that are not fields above are ignored, as they address
    /// other decoding methods. `origin` names the file in messages.
    ///
    /// # Errors
    /// Bytes that are not JSON, a root that is not an object, and any known key with a wrong type or range.
    pub fn from_bytes(bytes: &[u8], origin: &str) -> Result<Self, TextError> {
        let fields = parse_object(bytes, origin, MAX_BYTES)?;
        let f = Fields { origin, map: &fields };
        Ok(Self {
            eos_token_ids: f.ids("eos_token_id")?,
            do_sample: f.boolean("do_sample")?,
            temperature: f.float("temperature", "a number of at least 0", |x| x >= 0.0)?,
            top_p: f.float("top_p", "a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?,
            top_k: f.top_k()?,
            min_p: f.float("min_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty: f.float("repetition_penalty", "a number above 0", |x| x > 0.0)?,
            max_new_tokens: f.positive("max_new_tokens")?,
        })
    }
}

/// Parses a JSON file whose root is an object, within a size limit.
pub(crate) fn parse_object(
    bytes: &[u8],
    origin: &str,
    limit: usize,
) -> Result<Map<String, Value>, TextError> {
    if bytes.len() > limit {
        return Err(TextError::TooLarge {
            origin: origin.to_owned(),
            bytes: bytes.len() as u64,
            limit: limit as u64,
        });
    }
    let root: Value = serde_json::from_slice(bytes)
        .map_err(|source| TextError::Json { origin: origin.to_owned(), source })?;
    match root {
        Value::Object(map) => Ok(map),
        other => Err(TextError::field(origin, "the file's root", describe(&other), "an object")),
    }
}

/// Typed access to the keys of one object.
struct Fields<'a> {
    origin: &'a str,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn refuse(&self, key: &str, found: &Value, expected: &str) -> TextError {
        TextError::field(self.origin, key, describe(found), expected)
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, TextError> {
        self.get(key)
            .map(|value| value.as_bool().ok_or_else(|| self.refuse(key, value, "true or false")))
            .transpose()
    }

    fn float(&self, key: &str, expected: &str, allowed: fn(f32) -> bool) -> Result<Option<f32>, TextError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().map(|x| x as f32) {
            // The range is checked on the rounded value: 1e-60 would be a temperature of exactly 0.
            Some(x) if x.is_finite() && allowed(x) => Ok(Some(x)),
            _ => Err(self.refuse(key, value, expected)),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<u32>, TextError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match integer(value).and_then(|n| u32::try_from(n).ok()) {
            Some(n) if n > 0 => Ok(Some(n)),
            _ => Err(self.refuse(key, value, "an integer of at least 1")),
        }
    }

    fn top_k(&self) -> Result<Option<u32>, TextError> {
        let Some(value) = self.get("top_k") else { return Ok(None) };
        match integer(value) {
            Some(-1) => Ok(Some(0)),
            Some(n) if u32::try_from(n).is_ok() => Ok(u32::try_from(n).ok()),
            _ => Err(self.refuse("top_k", value, "an integer of at least 0, or -1 for no limit")),
        }
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>, TextError> {
        let expected = "a token id (an integer of at least 0) or a list of them";
        let id = |value: &Value| integer(value).and_then(|n| u32::try_from(n).ok());
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => {
                let mut ids = Vec::with_capacity(items.len());
                for (i, item) in items.iter().enumerate() {
                    let id = id(item).ok_or_else(|| {
                        TextError::field(self.origin, format!("{key}[{i}]"), describe(item), expected)
                    })?;
                    if !ids.contains(&id) {
                        ids.push(id);
                    }
                }
                Ok(ids)
            }
            Some(value) => Ok(vec![id(value).ok_or_else(|| self.refuse(key, value, expected))?]),
        }
    }
}

/// An integer, also when it is written as `20.0`.
fn integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        let x = value.as_f64()?;
        (x.fract() == 0.0 && x.abs() < 9.0e15).then_some(x as i64)
    })
}

/// A special-token field of `tokenizer_config.json`: a string, an object with `content`, or absent.
pub(crate) fn token_field(
    map: &Map<String, Value>,
    key: &str,
    origin: &str,
) -> Result<Option<String>, TextError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Object(object)) => match object.get("content") {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            other => Err(TextError::field(
                origin,
                format!("{key}.content"),
                other.map_or_else(|| "nothing".to_owned(), describe),
                "a string",
            )),
        },
        Some(other) => Err(TextError::field(
            origin,
            key,
            describe(other),
            "a string, null, or an object with \"content\"",
        )),
    }
}

/// The chat template of a `tokenizer_config.json`: a string, or a list of named ones of which `default` is taken.
pub(crate) fn template_field(map: &Map<String, Value>, origin: &str) -> Result<Option<String>, TextError> {
    let items = match map.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(source)) => return Ok(Some(source.clone())),
        Some(Value::Array(items)) => items,
        Some(other) => {
            let expected = "a template, or a list of {\"name\", \"template\"}";
            return Err(TextError::field(origin, "chat_template", describe(other), expected));
        }
    };
    let mut names = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let text = |key: &str| match item.get(key) {
            Some(Value::String(text)) => Ok(text),
            other => Err(TextError::field(
                origin,
                format!("chat_template[{i}].{key}"),
                other.map_or_else(|| "nothing".to_owned(), describe),
                "a string",
            )),
        };
        let name = text("name")?;
        let template = text("template")?;
        if name == "default" {
            return Ok(Some(template.clone()));
        }
        names.push(quote(name));
    }
    let found = if names.is_empty() { "an empty list".to_owned() } else { names.join(", ") };
    Err(TextError::field(origin, "chat_template", found, "a template named \"default\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<GenerationConfig, TextError> {
        GenerationConfig::from_bytes(json.as_bytes(), "dir/generation_config.json")
    }

    #[test]
    fn reads_the_published_instruct_and_base_files() {
        let instruct = parse(
            r#"{"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": true, "eos_token_id": [151645, 151643],
                "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
                "transformers_version": "4.37.0"}"#,
        )
        .unwrap();
        assert_eq!(
            instruct,
            GenerationConfig {
                eos_token_ids: vec![151645, 151643],
                do_sample: Some(true),
                temperature: Some(0.7),
                top_p: Some(0.8),
                top_k: Some(20),
                min_p: None,
                repetition_penalty: Some(1.05),
                max_new_tokens: None,
            }
        );
        let base = parse(
            r#"{"bos_token_id":151643,"do_sample":false,"eos_token_id":151643,"max_new_tokens":2048,
                "transformers_version":"4.37.0"}"#,
        )
        .unwrap();
        let expected = GenerationConfig {
            eos_token_ids: vec![151643],
            do_sample: Some(false),
            max_new_tokens: Some(2048),
            ..Default::default()
        };
        assert_eq!(base, expected);
        assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
    }

    #[test]
    fn off_values_nulls_and_bounds_are_accepted() {
        let config = parse(
            r#"{"top_k": -1, "temperature": 0, "top_p": 1, "min_p": 0, "eos_token_id": [7, 7, 0],
                "repetition_penalty": null, "do_sample": null, "watermarking_config": {"bias": 2}}"#,
        )
        .unwrap();
        assert_eq!(config.top_k, Some(0));
        assert_eq!((config.temperature, config.top_p, config.min_p), (Some(0.0), Some(1.0), Some(0.0)));
        assert_eq!(config.eos_token_ids, [7, 0]);
        assert_eq!((config.repetition_penalty, config.do_sample), (None, None));
        assert_eq!(parse(r#"{"top_k": 20.0}"#).unwrap().top_k, Some(20));
    }

    #[test]
    fn wrong_types_and_ranges_are_refused_by_field() {
        let cases = [
            (r#"{"temperature": -0.1}"#, "temperature: found -0.1, expected a number of at least 0"),
            (r#"{"temperature": "hot"}"#, "temperature: found the string \"hot\""),
            (r#"{"temperature": 1e40}"#, "temperature: found 1e+40"),
            (r#"{"temperature": true}"#, "temperature: found true"),
            (r#"{"top_p": 0}"#, "top_p: found 0, expected a number above 0 and at most 1"),
            (r#"{"top_p": 1.01}"#, "top_p: found 1.01"),
            (r#"{"top_p": 1e-60}"#, "top_p: found 1"),
            (r#"{"top_k": -2}"#, "top_k: found -2"),
            (r#"{"top_k": 2.5}"#, "top_k: found 2.5"),
            (r#"{"top_k": 4294967296}"#, "top_k: found 4294967296"),
            (r#"{"min_p": 1.5}"#, "min_p: found 1.5"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty: found 0, expected a number above 0"),
            (r#"{"repetition_penalty": [1.1]}"#, "repetition_penalty: found a list of 1"),
            (r#"{"eos_token_id": -1}"#, "eos_token_id: found -1"),
            (r#"{"eos_token_id": [1, "2"]}"#, "eos_token_id[1]: found the string \"2\""),
            (r#"{"eos_token_id": {"id": 1}}"#, "eos_token_id: found an object with 1 keys"),
            (r#"{"eos_token_id": 1.5}"#, "eos_token_id: found 1.5"),
            (r#"{"do_sample": 1}"#, "do_sample: found 1, expected true or false"),
            (r#"{"max_new_tokens": 0}"#, "max_new_tokens: found 0, expected an integer of at least 1"),
            (r#"[]"#, "the file's root: found a list of 0, expected an object"),
            (r#"{"top_k": 2"#, "not valid JSON"),
            ("", "not valid JSON"),
        ];
        for (json, culprit) in cases {
            let message = parse(json).unwrap_err().to_string();
            assert!(message.starts_with("dir/generation_config.json: "), "{message}");
            assert!(message.contains(culprit), "{json}: {message}");
        }
        let huge = format!("{{\"x\": \"{}\"}}", "y".repeat(MAX_BYTES));
        assert!(parse(&huge).unwrap_err().to_string().contains("more than the limit"));
    }
}

//! Typed access to the fields of a JSON config: every failure names file and field.

use serde_json::{Map, Value};

use crate::{ModelError, Result};

/// An object of a config file together with where it stands.
pub(crate) struct Fields<'a> {
    origin: &'a str,
    prefix: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(origin: &'a str, prefix: &'a str, map: &'a Map<String, Value>) -> Self {
        Self { origin, prefix, map }
    }

    /// An error about `field`.
    pub(crate) fn error(&self, field: &str, message: impl Into<String>) -> ModelError {
        ModelError::Field {
            origin: self.origin.into(),
            field: format!("{}{field}", self.prefix),
            message: message.into(),
        }
    }

    /// The value, unless missing or null.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a String> {
        self.map.keys()
    }

    fn wrong(&self, field: &str, found: &Value, expected: &str) -> ModelError {
        let mut found = found.to_string();
        if found.len() > 60 {
            found = format!("{}…", found.chars().take(60).collect::<String>());
        }
        self.error(field, format!("expected {expected}, found {found}"))
    }

    fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(field, "is missing"))
    }

    /// An integer within `range`.
    pub(crate) fn integer(
        &self,
        field: &str,
        range: std::ops::RangeInclusive<usize>,
    ) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let expected = || format!("an integer from {} to {}", range.start(), range.end());
        match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
            Some(v) if range.contains(&v) => Ok(Some(v)),
            _ => Err(self.wrong(field, value, &expected())),
        }
    }

    pub(crate) fn required_integer(
        &self,
        field: &str,
        range: std::ops::RangeInclusive<usize>,
    ) -> Result<usize> {
        let value = self.integer(field, range)?;
        self.required(field, value)
    }

    /// A finite number for which `fits` holds; `expected` says it in words.
    pub(crate) fn number(&self, field: &str, expected: &str, fits: fn(f64) -> bool) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(v) if v.is_finite() && fits(v) => Ok(Some(v)),
            _ => Err(self.wrong(field, value, expected)),
        }
    }

    pub(crate) fn boolean(&self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(field, value, "true or false"))
    }

    pub(crate) fn string(&self, field: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(field, value, "a string"))
    }

    pub(crate) fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_object().map(Some).ok_or_else(|| self.wrong(field, value, "an object"))
    }

    pub(crate) fn array(&self, field: &str) -> Result<Option<&'a Vec<Value>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_array().map(Some).ok_or_else(|| self.wrong(field, value, "a list"))
    }

    /// One token id or a list of them.
    pub(crate) fn token_ids(&self, field: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice);
        list.iter()
            .map(|v| match v.as_u64() {
                Some(id) if (id as usize) < vocab_size => Ok(id as u32),
                _ => Err(self.wrong(field, v, &format!("a token id below vocab_size {vocab_size}"))),
            })
            .collect()
    }
}

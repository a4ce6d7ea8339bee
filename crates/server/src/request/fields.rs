//! The fields of a JSON object, taken one by one. What nobody took at the end is refused by name.

use serde_json::{Map, Value};

use crate::error::{ApiError, ApiResult, describe, quote};

/// An object whose fields are being read. `null` is the same as absent.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Path of the object, with a dot; empty for the body itself.
    path: String,
}

impl Fields {
    /// The body of a request.
    ///
    /// # Errors
    /// Bytes that are not a JSON object.
    pub(crate) fn body(bytes: &[u8]) -> ApiResult<Self> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Self { map, path: String::new() }),
            Ok(other) => Err(ApiError::bad_request(format!(
                "the body must be a JSON object, not {}",
                describe(&other)
            ))),
            Err(error) => Err(ApiError::bad_request(format!("the body is not valid JSON: {error}"))),
        }
    }

    /// An object inside the body; `path` is its name.
    ///
    /// # Errors
    /// A value that is no object.
    pub(crate) fn object(value: Value, path: &str) -> ApiResult<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, path: format!("{path}.") }),
            other => Err(ApiError::field(path, format_args!("must be an object, not {}", describe(&other)))),
        }
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// An error about a field.
    pub(crate) fn error(&self, key: &str, message: impl std::fmt::Display) -> ApiError {
        ApiError::field(self.name(key), message)
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> ApiError {
        self.error(key, format_args!("must be {expected}, not {}", describe(value)))
    }

    /// The field's value as it is.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        // `shift_remove`, so that the fields left over are reported in their order.
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    pub(crate) fn boolean(&mut self, key: &str) -> ApiResult<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(value) => Err(self.wrong(key, &value, "true or false")),
        }
    }

    pub(crate) fn string(&mut self, key: &str) -> ApiResult<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.wrong(key, &value, "a string")),
        }
    }

    /// A string that is there.
    pub(crate) fn required_string(&mut self, key: &str) -> ApiResult<String> {
        self.string(key)?.ok_or_else(|| self.error(key, "is missing; a string is expected"))
    }

    /// A finite number for which `fits` holds after rounding to f32.
    pub(crate) fn number(
        &mut self,
        key: &str,
        expected: &str,
        fits: fn(f32) -> bool,
    ) -> ApiResult<Option<f32>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_f64().map(|x| x as f32) {
            Some(x) if x.is_finite() && fits(x) => Ok(Some(x)),
            _ => Err(self.wrong(key, &value, expected)),
        }
    }

    /// An integer of `min..=max`, also when it is written as `1.0`.
    pub(crate) fn integer(&mut self, key: &str, min: i64, max: i64) -> ApiResult<Option<i64>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match integer(&value) {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ if max == i64::MAX => Err(self.wrong(key, &value, &format!("an integer of at least {min}"))),
            _ => Err(self.wrong(key, &value, &format!("an integer from {min} to {max}"))),
        }
    }

    /// An unsigned integer of at least `min`.
    pub(crate) fn count(&mut self, key: &str, min: i64, max: i64) -> ApiResult<Option<usize>> {
        Ok(self.integer(key, min, max)?.and_then(|n| usize::try_from(n).ok()))
    }

    /// A list of at most `most` elements.
    pub(crate) fn list(&mut self, key: &str, most: usize) -> ApiResult<Option<Vec<Value>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(items)) if items.len() <= most => Ok(Some(items)),
            Some(value) => Err(self.wrong(key, &value, &format!("a list of at most {most}"))),
        }
    }

    /// Token ids below `vocab`.
    pub(crate) fn ids(&mut self, key: &str, vocab: usize, most: usize) -> ApiResult<Vec<u32>> {
        let items = self.list(key, most)?.unwrap_or_default();
        token_ids(&items, vocab).map_err(|(index, message)| self.error(&format!("{key}[{index}]"), message))
    }

    /// A field with one possible meaning: any other value than one of `neutral` asks for what is not supported.
    pub(crate) fn only(&mut self, key: &str, neutral: &[Value]) -> ApiResult<()> {
        match self.take(key) {
            Some(value) if !neutral.contains(&value) => Err(ApiError::unsupported(self.name(key))),
            _ => Ok(()),
        }
    }

    /// Fields that label a request for logs and bills of others and mean nothing for its answer.
    pub(crate) fn label(&mut self, key: &str, most: usize) -> ApiResult<()> {
        match self.take(key) {
            None => Ok(()),
            Some(Value::String(text)) if text.len() <= most => Ok(()),
            Some(value) => Err(self.wrong(key, &value, &format!("a string of at most {most} bytes"))),
        }
    }

    /// Whether the field is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// Refuses what was not taken.
    ///
    /// # Errors
    /// The first field that is left.
    pub(crate) fn end(mut self) -> ApiResult<()> {
        self.map.retain(|_, value| !value.is_null());
        match self.map.keys().next() {
            None => Ok(()),
            Some(key) if self.path.is_empty() => {
                let message =
                    format!("{} is not a field that this server supports; leave it out", quote(key));
                let param: String = key.chars().take(64).collect();
                Err(ApiError::bad_request(message).with_param(param))
            }
            Some(key) => {
                let name: String = self.name(key).chars().take(128).collect();
                Err(ApiError::unsupported(name))
            }
        }
    }
}

/// An integer, also when it is written as `20.0` or `1e18`. A float has one value, which is an integer or none.
fn integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        // What is no i64 is a u64 above it, which rounds to 2^63 at least, or a float. 2^63 is the first that is too large.
        let (x, end) = (value.as_f64()?, -(i64::MIN as f64));
        (x.fract() == 0.0 && (-end..end).contains(&x)).then_some(x as i64)
    })
}

/// Token ids below `vocab`, or the index of the first that is none and why.
pub(crate) fn token_ids(items: &[Value], vocab: usize) -> Result<Vec<u32>, (usize, String)> {
    let mut ids = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        match integer(item).and_then(|id| u32::try_from(id).ok()) {
            Some(id) if (id as usize) < vocab => ids.push(id),
            _ => {
                return Err((
                    index,
                    format!(
                        "must be a token id from 0 to {}, not {}",
                        vocab.saturating_sub(1),
                        describe(item)
                    ),
                ));
            }
        }
    }
    Ok(ids)
}

/// Whether a body is JSON by its `Content-Type`.
///
/// # Errors
/// Anything but `application/json`.
pub(crate) fn check_content_type(value: Option<&str>) -> ApiResult<()> {
    let essence = value.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(ApiError::bad_request("Content-Type must be application/json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::object(value, "o").unwrap()
    }

    fn message<T>(result: ApiResult<T>) -> String {
        result.map(drop).unwrap_err().message
    }

    #[test]
    fn numbers_are_checked_after_rounding() {
        let read = |value: Value| fields(json!({"x": value})).number("x", "above 0", |x| x > 0.0);
        assert_eq!(read(json!(0.5)), Ok(Some(0.5)));
        assert_eq!(read(Value::Null), Ok(None));
        for bad in [
            json!(0),
            json!(-1),
            json!(1e-60),
            json!(1e39),
            json!(1e308),
            json!("1"),
            json!([]),
            json!({}),
            json!(true),
        ] {
            assert!(message(read(bad.clone())).starts_with("o.x: must be above 0, not "), "{bad}");
        }
    }

    #[test]
    fn integers_have_bounds() {
        let read = |value: Value| fields(json!({"x": value})).integer("x", 0, 16);
        for (value, expected) in [(json!(0), 0), (json!(16), 16), (json!(3.0), 3)] {
            assert_eq!(read(value), Ok(Some(expected)));
        }
        for bad in [
            json!(-1),
            json!(17),
            json!(1.5),
            json!(2_147_483_648_u64),
            json!(9_007_199_254_740_993_u64),
            json!(u64::MAX),
            json!(1e308),
            json!("1"),
            json!([]),
            json!({}),
            json!(false),
        ] {
            assert!(message(read(bad.clone())).contains("o.x: must be an integer from 0 to 16"), "{bad}");
        }
    }

    /// JSON has one kind of number: `1e18` is as much of an integer as `5`.
    #[test]
    fn integers_may_be_written_as_floats() {
        let read = |value: Value| fields(json!({"x": value})).integer("x", i64::MIN, i64::MAX);
        for (value, expected) in [
            (json!(i64::MAX), i64::MAX),
            (json!(i64::MIN), i64::MIN),
            (json!(1e18), 1_000_000_000_000_000_000),
            (json!(i64::MIN as f64), i64::MIN),
            (json!(-0.0), 0),
        ] {
            assert_eq!(read(value), Ok(Some(expected)));
        }
        for bad in [json!(i64::MAX as u64 + 1), json!(u64::MAX), json!(9.3e18), json!(-9.3e18), json!(0.5)] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
        assert_eq!(fields(json!({"ids": [5.0, 1e0]})).ids("ids", 10, 3), Ok(vec![5, 1]));
    }

    #[test]
    fn what_is_left_is_named() {
        let mut f = fields(json!({"a": 1, "zebra": null, "best_of": 2}));
        assert_eq!(f.count("a", 0, i64::MAX), Ok(Some(1)));
        assert!(message(f.end()).contains("o.best_of"));
        let body = Fields::body(br#"{"b": 1}"#).unwrap();
        assert_eq!(body.end().unwrap_err().param.as_deref(), Some("b"));
        assert!(fields(json!({"zebra": null})).end().is_ok());
        for bad in [&b"[]"[..], b"1", b"", b"{", b"{\"a\": NaN}", b"\xff"] {
            assert!(Fields::body(bad).is_err());
        }
        let deep = "[".repeat(1_000_000);
        assert!(Fields::body(deep.as_bytes()).is_err());
    }

    #[test]
    fn ids_lie_within_the_vocabulary() {
        let read = |value: Value| fields(json!({"ids": value})).ids("ids", 10, 3);
        assert_eq!(read(json!([0, 9])), Ok(vec![0, 9]));
        assert!(message(read(json!([0, 10]))).contains("o.ids[1]: must be a token id from 0 to 9, not 10"));
        for bad in [
            json!([-1]),
            json!([1.5]),
            json!(["1"]),
            json!([null]),
            json!([2_147_483_647]),
            json!([0, 0, 0, 0]),
            json!(1),
        ] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_json_is_json() {
        for good in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
            assert!(check_content_type(Some(good)).is_ok());
        }
        for bad in
            [None, Some(""), Some("text/plain"), Some("application/jsonp"), Some("x-www-form-urlencoded")]
        {
            assert!(check_content_type(bad).is_err());
        }
    }
}

//! The `tojson` filter of chat templates: Python's `json.dumps` with the defaults Hugging Face gives it.
//!
//! minijinja's own filter escapes for HTML, which would put `\u003c` into prompts. The output here grows only up to
//! a budget, because a template can build a small value that is exponentially large when written out.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting written. Real tool definitions stay below ten.
const MAX_DEPTH: usize = 64;

/// What writing one value costs beyond its text, so that many small ones end as soon as few large ones.
const NODE_COST: usize = 64;

/// How `json.dumps` is called.
#[derive(Debug, Clone, Default)]
pub(crate) struct Style {
    /// `ensure_ascii`: write characters above U+007F as `\uXXXX`.
    pub(crate) ascii: bool,
    /// `indent`: spaces for each level; none for one line.
    pub(crate) indent: Option<usize>,
    /// `separators`: between items and after keys. None for Python's defaults.
    pub(crate) separators: Option<(String, String)>,
    /// `sort_keys`.
    pub(crate) sort_keys: bool,
}

/// Writes `value` as JSON of at most `budget` bytes, less [`NODE_COST`] for each value in it.
///
/// # Errors
/// Beyond the budget or the depth, and for values that have no JSON form.
pub(crate) fn dumps(value: &Value, style: &Style, budget: usize) -> Result<String, Error> {
    let (item, key) = match (&style.separators, style.indent) {
        (Some((item, key)), _) => (item.clone(), key.clone()),
        (None, None) => (", ".to_owned(), ": ".to_owned()),
        (None, Some(_)) => (",".to_owned(), ": ".to_owned()),
    };
    let mut writer = Writer { out: String::new(), left: budget, style, item, key };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    out: String,
    left: usize,
    style: &'a Style,
    item: String,
    key: String,
}

impl Writer<'_> {
    fn spend(&mut self, cost: usize) -> Result<(), Error> {
        self.left = self.left.checked_sub(cost).ok_or_else(|| Error::from(ErrorKind::OutOfFuel))?;
        Ok(())
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.spend(text.len())?;
        self.out.push_str(text);
        Ok(())
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            let message = format!("tojson: value is nested deeper than {MAX_DEPTH} levels");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        self.spend(NODE_COST)?;
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.push(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.push("[")?;
                let mut empty = true;
                for item in value.try_iter()? {
                    self.separate(&mut empty, depth)?;
                    self.value(&item, depth + 1)?;
                }
                self.close("]", empty, depth)
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.style.sort_keys {
                    keys.sort();
                }
                self.push("{")?;
                let mut empty = true;
                for key in keys {
                    self.separate(&mut empty, depth)?;
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default())?,
                        ValueKind::Number => self.string(&number(&key))?,
                        ValueKind::Bool => self.string(if key.is_true() { "true" } else { "false" })?,
                        ValueKind::None => self.string("null")?,
                        kind => return Err(unserializable(&format!("a key of type {kind}"))),
                    }
                    let separator = self.key.clone();
                    self.push(&separator)?;
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.close("}", empty, depth)
            }
            kind => Err(unserializable(&kind.to_string())),
        }
    }

    fn separate(&mut self, empty: &mut bool, depth: usize) -> Result<(), Error> {
        if !std::mem::replace(empty, false) {
            let separator = self.item.clone();
            self.push(&separator)?;
        }
        self.line(depth + 1)
    }

    fn close(&mut self, bracket: &str, empty: bool, depth: usize) -> Result<(), Error> {
        if !empty {
            self.line(depth)?;
        }
        self.push(bracket)
    }

    fn line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = self.style.indent else { return Ok(()) };
        let width = indent.saturating_mul(depth);
        self.spend(width.saturating_add(1))?; // before the allocation
        self.out.push('\n');
        self.out.push_str(&" ".repeat(width));
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.push("\"")?;
        let mut buffer = [0; 4];
        for c in text.chars() {
            match c {
                '"' => self.push("\\\"")?,
                '\\' => self.push("\\\\")?,
                '\n' => self.push("\\n")?,
                '\r' => self.push("\\r")?,
                '\t' => self.push("\\t")?,
                '\u{8}' => self.push("\\b")?,
                '\u{c}' => self.push("\\f")?,
                c if u32::from(c) < 0x20 || (self.style.ascii && u32::from(c) > 0x7E) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.push(&format!("\\u{unit:04x}"))?;
                    }
                }
                c => self.push(c.encode_utf8(&mut buffer))?,
            }
        }
        self.push("\"")
    }
}

/// A number as Python's `json` writes it, non-finite ones included.
fn number(value: &Value) -> String {
    match value.to_string().as_str() {
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        other => other.to_owned(),
    }
}

fn unserializable(what: &str) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson: {what} has no JSON form"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &str) -> Value {
        Value::from(minijinja::value::Serde(serde_json::from_str::<serde_json::Value>(json).unwrap()))
    }

    fn with(json: &str, style: Style) -> String {
        dumps(&value(json), &style, 10_000).unwrap()
    }

    #[test]
    fn writes_what_python_writes() {
        // Left column printed by CPython 3: json.dumps(json.loads(s), ensure_ascii=False).
        let cases = [
            (r#"{"a": [1, 2.5, true, null], "b": {}, "c": []}"#, r#"{"a":[1,2.5,true,null],"b":{},"c":[]}"#),
            (r#""<b> & 'q' \"d\" \\ /""#, r#""<b> & 'q' \"d\" \\ /""#),
            (r#""tab\t nl\n bell\u0007 del é 地 🦀""#, "\"tab\\t nl\\n bell\\u0007 del é 地 🦀\""),
        ];
        for (expected, input) in cases {
            assert_eq!(with(input, Style::default()), expected);
        }
        let unsorted = Value::from_pairs([("z", 1), ("a", 2)]);
        assert_eq!(dumps(&unsorted, &Style::default(), 1000).unwrap(), r#"{"z": 1, "a": 2}"#);
    }

    #[test]
    fn honours_the_arguments_of_json_dumps() {
        let indented =
            with(r#"{"b":[1,{}],"a":2}"#, Style { indent: Some(2), sort_keys: true, ..Style::default() });
        assert_eq!(indented, "{\n  \"a\": 2,\n  \"b\": [\n    1,\n    {}\n  ]\n}");
        let compact = Style { separators: Some((",".into(), ":".into())), ..Style::default() };
        assert_eq!(with(r#"{"a":[1,2]}"#, compact), r#"{"a":[1,2]}"#);
        assert_eq!(with(r#""é🦀""#, Style { ascii: true, ..Style::default() }), r#""\u00e9\ud83e\udd80""#);
    }

    #[test]
    fn stops_at_the_budget_and_the_depth() {
        let mut twice = Value::from(1);
        for _ in 0..60 {
            twice = Value::from(vec![twice.clone(), twice]);
        }
        assert_eq!(dumps(&twice, &Style::default(), 1 << 20).unwrap_err().kind(), ErrorKind::OutOfFuel);
        let mut deep = Value::from(1);
        for _ in 0..100 {
            deep = Value::from(vec![deep]);
        }
        assert!(dumps(&deep, &Style::default(), 1 << 20).unwrap_err().to_string().contains("nested deeper"));
        let wide = Style { indent: Some(usize::MAX), ..Style::default() };
        assert_eq!(dumps(&value("[1]"), &wide, 1000).unwrap_err().kind(), ErrorKind::OutOfFuel);
    }
}

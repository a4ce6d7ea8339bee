//! The Jinja environment of chat templates: what Hugging Face adds to Jinja2, and guards on what templates can spend.
//!
//! minijinja charges instructions and bytes against a fuel budget, mostly before it allocates. The gaps are closed
//! here: Python string methods allocate before they are charged, and a value whose parts are shared (`[x, x]`
//! repeated) prints at exponential size.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value, escape_formatter};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::calendar::civil_date;
use crate::json_dumps::{Style, dumps};

/// Bytes that one unit of minijinja's fuel pays for.
pub(crate) const BYTES_PER_FUEL: u64 = 64;

/// Memory of one list slot, generously.
const SLOT_BYTES: usize = 64;

/// Deepest value that may be printed.
const MAX_DEPTH: usize = 64;

/// An environment as Hugging Face sets it up (`transformers/utils/chat_template_utils.py`), without fuel set.
pub(crate) fn environment() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_recursion_limit(100);
    env.set_debug(false);
    env.set_formatter(|out, state, value| {
        check_printable(state, value)?;
        escape_formatter(out, state, value)
    });
    env.set_unknown_method_callback(method);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: String| strftime(&format, unix_seconds()));
    env.add_filter("tojson", tojson);
    env.add_filter("string", |state: &State, value: Value| -> Result<String, Error> {
        check_printable(state, &value)?;
        Ok(value.to_string())
    });
    env.add_filter("join", |state: &State, value: Value, joiner: Option<String>, args: Kwargs| {
        let attribute: Option<String> = args.get("attribute")?;
        args.assert_all_used()?;
        join(state, &value, joiner.as_deref().unwrap_or(""), attribute.as_deref())
    });
    // Printing helpers whose size follows from numbers in the template; no chat template needs them.
    for name in ["pprint", "format", "urlencode"] {
        env.remove_filter(name);
    }
    env.remove_global("debug");
    Ok(env)
}

/// Bytes that the remaining fuel pays for.
fn budget(state: &State) -> usize {
    let fuel = state.fuel_levels().map_or(0, |(_, remaining)| remaining);
    usize::try_from(fuel.saturating_mul(BYTES_PER_FUEL)).unwrap_or(usize::MAX)
}

/// Fails as if the fuel had run out when `bytes` cannot be paid for.
fn ensure(state: &State, bytes: usize) -> Result<(), Error> {
    if bytes > budget(state) { state.consume_fuel(u64::MAX) } else { Ok(()) }
}

/// Fails when `value` would print at more bytes than the remaining fuel pays for, or is nested too deep.
fn check_printable(state: &State, value: &Value) -> Result<(), Error> {
    if value.as_str().is_some() {
        return Ok(()); // charged by the engine when it was made
    }
    let mut left = budget(state);
    match measure(value, &mut left, MAX_DEPTH) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::OutOfFuel => state.consume_fuel(u64::MAX),
        Err(error) => Err(error),
    }
}

/// Takes the printed size of `value` from `left`.
fn measure(value: &Value, left: &mut usize, depth: usize) -> Result<(), Error> {
    let own = value.as_str().map_or(SLOT_BYTES, |text| text.len().saturating_add(SLOT_BYTES));
    *left = left.checked_sub(own).ok_or_else(|| Error::from(ErrorKind::OutOfFuel))?;
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        return Ok(());
    }
    let Some(depth) = depth.checked_sub(1) else {
        let message = format!("a value nested deeper than {MAX_DEPTH} levels cannot be printed");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    };
    if kind == ValueKind::Iterable {
        let message = "an iterator cannot be printed; make it a list first (| list)";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    for item in value.try_iter()? {
        if kind == ValueKind::Map {
            measure(&value.get_item(&item)?, left, depth)?;
        }
        measure(&item, left, depth)?;
    }
    Ok(())
}

fn tojson(state: &State, value: Value, indent: Option<usize>, args: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => args.get("indent")?,
    };
    let separators: Option<Vec<String>> = args.get("separators")?;
    let separators = match separators.as_deref() {
        None => None,
        Some([item, key]) => Some((item.clone(), key.clone())),
        Some(other) => {
            let message = format!("tojson: separators has {} entries, expected 2", other.len());
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    };
    let style = Style {
        ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        separators,
        sort_keys: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    args.assert_all_used()?;
    let text = dumps(&value, &style, budget(state))?;
    state.consume_fuel(text.len() as u64 / 8)?;
    Ok(Value::from(text))
}

fn join(state: &State, values: &Value, joiner: &str, attribute: Option<&str>) -> Result<Value, Error> {
    let mut text = String::new();
    for (i, value) in values.try_iter()?.enumerate() {
        let value = match attribute {
            Some(name) => value.get_attr(name)?,
            None => value,
        };
        check_printable(state, &value)?;
        let piece = value.to_string();
        ensure(state, text.len().saturating_add(joiner.len()).saturating_add(piece.len()))?;
        if i > 0 {
            text.push_str(joiner);
        }
        text.push_str(&piece);
    }
    Ok(Value::from(text))
}

/// Python methods on strings, lists and maps. Those that can allocate more than they read are measured first.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        let first = args.first().and_then(Value::as_str);
        match (name, first) {
            ("replace", Some(old)) => {
                let new = args.get(1).and_then(Value::as_str).unwrap_or_default();
                let grown = text.matches(old).count().saturating_mul(new.len());
                ensure(state, text.len().saturating_add(grown))?;
            }
            ("split", separator) => {
                let pieces = match separator {
                    Some("") => {
                        return Err(Error::new(ErrorKind::InvalidOperation, "split: empty separator"));
                    }
                    Some(separator) => text.matches(separator).count() + 1,
                    None => text.split_whitespace().count(),
                };
                ensure(state, text.len().saturating_add(pieces.saturating_mul(SLOT_BYTES)))?;
            }
            ("splitlines", _) => {
                let pieces = text.matches(['\n', '\r']).count() + 1;
                ensure(state, text.len().saturating_add(pieces.saturating_mul(SLOT_BYTES)))?;
            }
            ("upper" | "lower" | "title" | "capitalize", _) => ensure(state, text.len().saturating_mul(3))?,
            ("join", _) => match args {
                [values] => return join(state, values, text, None),
                _ => return Err(Error::from(ErrorKind::MissingArgument)),
            },
            ("removeprefix", Some(prefix)) => {
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            ("removesuffix", Some(suffix)) => {
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            // Its result can be as wide as a number in the template says.
            ("format", _) => return Err(Error::from(ErrorKind::UnknownMethod)),
            _ => {}
        }
    }
    unknown_method_callback(state, value, name, args)
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// `strftime` in UTC for the directives that prompts use.
fn strftime(format: &str, unix: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, seconds) = (unix / 86_400, unix % 86_400);
    let (year, month, day, day_of_year) = civil_date(days);
    let month_name = MONTHS.get(month as usize - 1).copied().unwrap_or_default();
    let day_name = DAYS.get((days % 7) as usize).copied().unwrap_or_default();
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let plain = directive == Some('-');
        if plain {
            directive = chars.next();
        }
        let number = |n: u64, width: usize| if plain { n.to_string() } else { format!("{n:0width$}") };
        out += &match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name.chars().take(3).collect(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name.chars().take(3).collect(),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let directive = other.map_or_else(|| "nothing".to_owned(), |c| format!("%{c}"));
                let message = format!("strftime_now: directive {directive} is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_match_the_c_library() {
        // Printed by `date -u -d @N +'...'`.
        let all = "%Y-%m-%d %H:%M:%S %j %A %a %B %b %I %p %y %-d %-m %%";
        for (unix, expected) in [
            (0, "1970-01-01 00:00:00 001 Thursday Thu January Jan 12 AM 70 1 1 %"),
            (951_827_696, "2000-02-29 12:34:56 060 Tuesday Tue February Feb 12 PM 00 29 2 %"),
            (1_735_689_599, "2024-12-31 23:59:59 366 Tuesday Tue December Dec 11 PM 24 31 12 %"),
            (4_107_542_400, "2100-03-01 00:00:00 060 Monday Mon March Mar 12 AM 00 1 3 %"),
        ] {
            assert_eq!(strftime(all, unix).unwrap(), expected);
        }
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q is not supported"));
        assert!(strftime("%", 0).is_err());
    }
}

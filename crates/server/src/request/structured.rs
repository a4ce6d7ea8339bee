//! What an answer has to look like: `response_format`, `structured_outputs`, and the older `guided_…` fields.

use longhaul_grammar::{Source, Whitespace};
use serde_json::Value;

use crate::error::{ApiError, ApiResult, describe, quote};
use crate::request::{Fields, bounds};

/// A constraint, and the field that asked for it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Constraint {
    pub(crate) field: String,
    pub(crate) source: Source,
}

impl Constraint {
    fn new(field: &str, source: Source) -> Self {
        Self { field: field.to_owned(), source }
    }
}

/// Takes the fields that constrain an answer out of `f`.
///
/// # Errors
/// A field that is malformed, and two constraints at once.
pub(crate) fn constraint(f: &mut Fields) -> ApiResult<Option<Constraint>> {
    let mut found = response_format(f)?;
    for constraint in [structured_outputs(f)?].into_iter().chain(guided(f)?) {
        match (&found, constraint) {
            (_, None) => {}
            (None, constraint) => found = constraint,
            (Some(first), Some(second)) => return Err(exclude(&second.field, &first.field)),
        }
    }
    Ok(found)
}

/// Two fields that cannot both be obeyed.
pub(crate) fn exclude(field: &str, other: &str) -> ApiError {
    ApiError::field(field, format_args!("cannot be combined with {other}; send one of them"))
}

fn response_format(f: &mut Fields) -> ApiResult<Option<Constraint>> {
    const FIELD: &str = "response_format";
    let Some(value) = f.take(FIELD) else { return Ok(None) };
    let mut format = Fields::object(value, FIELD)?;
    let kind = format.required_string("type")?;
    let constraint = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Constraint::new(FIELD, Source::JsonObject(Whitespace::Flexible))),
        "json_schema" => {
            let named =
                format.take("json_schema").ok_or_else(|| format.error("json_schema", "is missing"))?;
            let path = format!("{FIELD}.json_schema");
            let mut named = Fields::object(named, &path)?;
            // They label the schema, for models that are told of it.
            named.label("name", bounds::SCHEMA_NAME_BYTES)?;
            named.label("description", bounds::SCHEMA_DESCRIPTION_BYTES)?;
            // Answers follow the schema either way.
            named.boolean("strict")?;
            let schema = named.take("schema").ok_or_else(|| named.error("schema", "is missing"))?;
            named.end()?;
            let source = Source::JsonSchema(schema, Whitespace::Flexible);
            Some(Constraint::new(&format!("{path}.schema"), source))
        }
        other => {
            let message = format!(
                "{} is not supported; use \"text\", \"json_object\" or \"json_schema\"",
                quote(other)
            );
            return Err(format.error("type", message));
        }
    };
    format.end()?;
    Ok(constraint)
}

fn structured_outputs(f: &mut Fields) -> ApiResult<Option<Constraint>> {
    const FIELD: &str = "structured_outputs";
    let Some(value) = f.take(FIELD) else { return Ok(None) };
    let mut o = Fields::object(value, FIELD)?;
    let whitespace = whitespace(&mut o)?;
    let mut found: Option<Constraint> = None;
    let mut add = |key: &str, source: Option<Source>| match (&found, source) {
        (_, None) => Ok(()),
        (Some(first), Some(_)) => Err(exclude(&format!("{FIELD}.{key}"), &first.field)),
        (None, Some(source)) => {
            found = Some(Constraint::new(&format!("{FIELD}.{key}"), source));
            Ok(())
        }
    };
    let blanks = whitespace.clone().unwrap_or_default();
    add("json", schema(&mut o, "json")?.map(|schema| Source::JsonSchema(schema, blanks.clone())))?;
    add(
        "json_object",
        o.boolean("json_object")?.filter(|wanted| *wanted).map(|_| Source::JsonObject(blanks)),
    )?;
    add("regex", o.string("regex")?.map(Source::Regex))?;
    add("grammar", o.string("grammar")?.map(Source::Grammar))?;
    add("choice", choices(&mut o, "choice")?.map(Source::Choice))?;
    if o.has("structural_tag") {
        return Err(o.error("structural_tag", "is not supported; use tools, or a grammar"));
    }
    o.end()?;
    match (&found, whitespace) {
        (Some(Constraint { source: Source::JsonSchema(..) | Source::JsonObject(_), .. }), _) | (_, None) => {
            Ok(found)
        }
        (_, Some(_)) => {
            let message = "disable_any_whitespace and whitespace_pattern need json or json_object";
            Err(ApiError::field(FIELD, message))
        }
    }
}

fn whitespace(o: &mut Fields) -> ApiResult<Option<Whitespace>> {
    let fixed = o.boolean("disable_any_whitespace")?.unwrap_or(false);
    match (fixed, o.string("whitespace_pattern")?) {
        (false, None) => Ok(None),
        (true, None) => Ok(Some(Whitespace::Fixed)),
        (false, Some(pattern)) => Ok(Some(Whitespace::Pattern(pattern))),
        (true, Some(_)) => {
            Err(o.error("whitespace_pattern", "cannot be combined with disable_any_whitespace"))
        }
    }
}

/// The fields that older clients of vLLM send.
fn guided(f: &mut Fields) -> ApiResult<[Option<Constraint>; 4]> {
    let new = |field: &'static str| move |source| Constraint::new(field, source);
    Ok([
        schema(f, "guided_json")?
            .map(|schema| Source::JsonSchema(schema, Whitespace::Flexible))
            .map(new("guided_json")),
        f.string("guided_regex")?.map(Source::Regex).map(new("guided_regex")),
        choices(f, "guided_choice")?.map(Source::Choice).map(new("guided_choice")),
        f.string("guided_grammar")?.map(Source::Grammar).map(new("guided_grammar")),
    ])
}

/// A JSON schema, or one as a string.
fn schema(f: &mut Fields, key: &str) -> ApiResult<Option<Value>> {
    match f.take(key) {
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(schema) => Ok(Some(schema)),
            Err(error) => Err(f.error(key, format_args!("the string is not valid JSON: {error}"))),
        },
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Some(schema)),
        Some(other) => Err(f.error(key, format_args!("must be a JSON schema, not {}", describe(&other)))),
        None => Ok(None),
    }
}

fn choices(f: &mut Fields, key: &str) -> ApiResult<Option<Vec<String>>> {
    let Some(items) = f.list(key, bounds::CHOICES)? else { return Ok(None) };
    let choice = |(index, item)| match item {
        Value::String(text) => Ok(text),
        other => Err(
            f.error(&format!("{key}[{index}]"), format_args!("must be a string, not {}", describe(&other)))
        ),
    };
    items.into_iter().enumerate().map(choice).collect::<ApiResult<Vec<_>>>().map(Some)
}

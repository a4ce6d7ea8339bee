//! `POST /v1/chat/completions`.

use longhaul_grammar::{CallCount, Source, Tool};
use longhaul_text::{Conversation, RESERVED_VARIABLES};
use serde_json::{Map, Value, json};

use crate::config::Limits;
use crate::error::{ApiError, ApiResult, describe};
use crate::request::structured::exclude;
use crate::request::{Common, Constraint, Fields, bounds};
use crate::serving::ModelInfo;

/// Deepest value of `chat_template_kwargs`, `documents` and tools.
const MAX_DEPTH: usize = 32;

/// `tool_choice`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// The output is text.
    None,
    /// The model decides; calls are parsed.
    Auto,
    /// The output is at least one call.
    Required,
    /// The output is a call of this tool.
    Named(String),
}

/// The body of a chat request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ChatRequest {
    pub(crate) model: Option<String>,
    pub(crate) conversation: Conversation,
    pub(crate) max_tokens: Option<usize>,
    /// Alternatives to report with each token; none = no log probabilities.
    pub(crate) logprobs: Option<u32>,
    pub(crate) tool_choice: ToolChoice,
    pub(crate) parallel_tool_calls: bool,
    pub(crate) common: Common,
}

impl ChatRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// The first field that is wrong or not supported.
    pub(crate) fn read(mut f: Fields, model: &ModelInfo, limits: &Limits) -> ApiResult<Self> {
        let name = f.string("model")?;
        let (conversation, tool_choice) = conversation(&mut f, limits)?;
        let (new, old) =
            (f.count("max_completion_tokens", 1, i64::MAX)?, f.count("max_tokens", 1, i64::MAX)?);
        let parallel_tool_calls = f.boolean("parallel_tool_calls")?.unwrap_or(true);
        let mut common = Common::read(&mut f, model, limits)?;
        if let Some(calls) = calls(&conversation, &tool_choice, parallel_tool_calls) {
            if let Some(other) = &common.constraint {
                return Err(exclude(&calls.field, &other.field));
            }
            common.constraint = Some(calls);
        }
        let request = Self {
            model: name,
            conversation,
            max_tokens: new.or(old),
            logprobs: logprobs(&mut f, model)?,
            tool_choice,
            parallel_tool_calls,
            common,
        };
        f.only("echo", &[json!(false)])?;
        f.only("reasoning_effort", &[json!("none")])?;
        f.only("modalities", &[json!(["text"])])?;
        f.end()?;
        Ok(request)
    }
}

/// What the template sees, for chats and for `/tokenize` with messages.
///
/// # Errors
/// The first field that is wrong or not supported.
pub(super) fn conversation(f: &mut Fields, limits: &Limits) -> ApiResult<(Conversation, ToolChoice)> {
    let messages = f
        .list("messages", limits.messages)?
        .filter(|messages| !messages.is_empty())
        .ok_or_else(|| f.error("messages", "must be a list of at least one message"))?;
    let messages: Vec<Value> = messages
        .into_iter()
        .enumerate()
        .map(|(index, item)| message(item, &format!("messages[{index}]")))
        .collect::<ApiResult<_>>()?;
    let tools = tools(f, limits)?;
    let choice = tool_choice(f, tools.as_deref().unwrap_or_default())?;
    let continue_final_message = f.boolean("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = f.boolean("add_generation_prompt")?.unwrap_or(!continue_final_message);
    if continue_final_message && add_generation_prompt {
        return Err(f.error("continue_final_message", "excludes add_generation_prompt: true"));
    }
    // The family's tokenizers put nothing around a text, so both values mean the same.
    f.boolean("add_special_tokens")?;
    if f.has("chat_template") {
        let message =
            "templates of requests are not run; the server's own is used, with chat_template_kwargs";
        return Err(f.error("chat_template", message));
    }
    let documents = f.list("documents", limits.messages)?;
    if documents.iter().flatten().any(|document| !document.is_object() || depth(document) > MAX_DEPTH) {
        return Err(f.error("documents", "must be a list of objects"));
    }
    let conversation = Conversation {
        messages,
        // Without a choice the model is not told of tools.
        tools: tools.filter(|_| choice != ToolChoice::None),
        documents,
        variables: variables(f)?,
        add_generation_prompt,
        continue_final_message,
    };
    Ok((conversation, choice))
}

fn logprobs(f: &mut Fields, model: &ModelInfo) -> ApiResult<Option<u32>> {
    let wanted = f.boolean("logprobs")?.unwrap_or(false);
    let top = f.integer("top_logprobs", 0, model.max_logprobs.into())?.and_then(|n| u32::try_from(n).ok());
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(f.error("top_logprobs", "needs logprobs: true")),
    }
}

/// A message as templates expect it: `content` a string, the arguments of tool calls an object.
fn message(item: Value, path: &str) -> ApiResult<Value> {
    let mut f = Fields::object(item, path)?;
    let role = f.required_string("role")?;
    if role.is_empty() || role.len() > bounds::ROLE_BYTES {
        return Err(f.error("role", format_args!("must have 1 to {} bytes", bounds::ROLE_BYTES)));
    }
    let calls = match f.list("tool_calls", bounds::ENTRIES)?.filter(|calls| !calls.is_empty()) {
        None => None,
        Some(calls) => {
            let call = |(index, item)| tool_call(item, &format!("{path}.tool_calls[{index}]"));
            Some(calls.into_iter().enumerate().map(call).collect::<ApiResult<Vec<_>>>()?)
        }
    };
    let content = content(&mut f, path, calls.is_some())?;
    let mut message = Map::from_iter([("role".into(), json!(role)), ("content".into(), json!(content))]);
    if let Some(calls) = calls {
        message.insert("tool_calls".into(), Value::Array(calls));
    }
    for key in ["name", "tool_call_id"] {
        if let Some(text) = f.string(key)? {
            message.insert(key.into(), json!(text));
        }
    }
    for key in bounds::EMPTY_IN_MESSAGES {
        f.only(key, &[json!([]), json!("")])?;
    }
    f.end()?;
    Ok(Value::Object(message))
}

/// The text of a message: a string, or the text parts of a list.
fn content(f: &mut Fields, path: &str, calls: bool) -> ApiResult<String> {
    let parts = match f.take("content") {
        None if calls => return Ok(String::new()),
        None => return Err(f.error("content", "is missing")),
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Array(parts)) => parts,
        Some(other) => {
            let message = format!("must be a string or a list of text parts, not {}", describe(&other));
            return Err(f.error("content", message));
        }
    };
    let part = |(index, item)| -> ApiResult<String> {
        let mut part = Fields::object(item, &format!("{path}.content[{index}]"))?;
        let kind = part.required_string("type")?;
        if kind != "text" {
            let message =
                format!("{} parts are not supported: the model reads text", crate::error::quote(&kind));
            return Err(part.error("type", message));
        }
        let text = part.required_string("text")?;
        part.end()?;
        Ok(text)
    };
    Ok(parts.into_iter().enumerate().map(part).collect::<ApiResult<Vec<_>>>()?.join("\n"))
}

fn tool_call(item: Value, path: &str) -> ApiResult<Value> {
    let mut f = Fields::object(item, path)?;
    let id = f.string("id")?;
    f.only("type", &[json!("function")])?;
    f.integer("index", 0, i64::MAX)?;
    let function = f.take("function").ok_or_else(|| f.error("function", "is missing"))?;
    f.end()?;
    let mut f = Fields::object(function, &format!("{path}.function"))?;
    let name = f.required_string("name")?;
    let arguments = match f.take("arguments") {
        None => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => serde_json::from_str(&text)
            .ok()
            .filter(Value::is_object)
            .ok_or_else(|| f.error("arguments", "must be a JSON object as a string"))?,
        Some(value @ Value::Object(_)) => value,
        Some(other) => {
            return Err(
                f.error("arguments", format_args!("must be a string of JSON, not {}", describe(&other)))
            );
        }
    };
    f.end()?;
    let mut call = Map::new();
    if let Some(id) = id {
        call.insert("id".into(), json!(id));
    }
    call.insert("type".into(), json!("function"));
    call.insert("function".into(), json!({"name": name, "arguments": arguments}));
    Ok(Value::Object(call))
}

fn tools(f: &mut Fields, limits: &Limits) -> ApiResult<Option<Vec<Value>>> {
    let Some(items) = f.list("tools", limits.tools)?.filter(|items| !items.is_empty()) else {
        return Ok(None);
    };
    for (index, item) in items.iter().enumerate() {
        let path = format!("tools[{index}]");
        if depth(item) > MAX_DEPTH {
            return Err(ApiError::field(path, format_args!("is nested deeper than {MAX_DEPTH} levels")));
        }
        let mut tool = Fields::object(item.clone(), &path)?;
        let kind = tool.required_string("type")?;
        if kind != "function" {
            return Err(tool.error("type", "only function tools are supported"));
        }
        let function = tool.take("function").ok_or_else(|| tool.error("function", "is missing"))?;
        tool.end()?;
        let mut function = Fields::object(function, &format!("{path}.function"))?;
        let name = function.required_string("name")?;
        let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if !(1..=64).contains(&name.len()) || !name.bytes().all(fits) {
            return Err(function.error("name", "must have 1 to 64 characters of A-Z a-z 0-9 _ . -"));
        }
        function.string("description")?;
        if function.take("parameters").is_some_and(|parameters| !parameters.is_object()) {
            return Err(function.error("parameters", "must be a JSON schema, an object"));
        }
        function.boolean("strict")?;
        function.end()?;
    }
    Ok(Some(items))
}

fn tool_choice(f: &mut Fields, tools: &[Value]) -> ApiResult<ToolChoice> {
    const FIELD: &str = "tool_choice";
    let auto = if tools.is_empty() { ToolChoice::None } else { ToolChoice::Auto };
    Ok(match f.take(FIELD) {
        None => auto,
        Some(Value::String(choice)) => match choice.as_str() {
            "none" => ToolChoice::None,
            "auto" => auto,
            "required" if tools.is_empty() => return Err(f.error(FIELD, "\"required\" needs tools")),
            "required" => ToolChoice::Required,
            other => {
                let message = format!(
                    "{} is not supported; use \"none\", \"auto\", \"required\" or a function",
                    crate::error::quote(other)
                );
                return Err(f.error(FIELD, message));
            }
        },
        Some(value) => {
            let mut choice = Fields::object(value, FIELD)?;
            let kind = choice.required_string("type")?;
            if kind != "function" {
                return Err(choice.error("type", "must be \"function\""));
            }
            let function = choice.take("function").ok_or_else(|| choice.error("function", "is missing"))?;
            choice.end()?;
            let mut function = Fields::object(function, "tool_choice.function")?;
            let name = function.required_string("name")?;
            if !tools.iter().any(|tool| tool_name(tool) == Some(name.as_str())) {
                return Err(function.error("name", "is none of the tools"));
            }
            function.end()?;
            ToolChoice::Named(name)
        }
    })
}

fn tool_name(tool: &Value) -> Option<&str> {
    tool.pointer("/function/name")?.as_str()
}

/// What the choice of tools makes of the answer. A model that must call says nothing else; one that may call is held to the
/// schemas of tools that are strict, once it calls.
fn calls(conversation: &Conversation, choice: &ToolChoice, parallel: bool) -> Option<Constraint> {
    let tools = conversation.tools.as_deref().unwrap_or_default();
    let is_strict = |tool: &Value| tool.pointer("/function/strict") == Some(&Value::Bool(true));
    let (field, count) = match choice {
        ToolChoice::None => return None,
        ToolChoice::Auto if !tools.iter().any(is_strict) => return None,
        ToolChoice::Auto => ("tools", if parallel { CallCount::Any } else { CallCount::AtMostOne }),
        ToolChoice::Required => ("tools", if parallel { CallCount::Some } else { CallCount::One }),
        ToolChoice::Named(_) => ("tool_choice", CallCount::One),
    };
    let tool = |tool: &Value| {
        let name = tool_name(tool)?;
        let is_wanted = !matches!(choice, ToolChoice::Named(only) if only != name);
        let parameters = match choice {
            ToolChoice::Auto if !is_strict(tool) => Value::Null,
            _ => tool.pointer("/function/parameters").cloned().unwrap_or_default(),
        };
        is_wanted.then(|| Tool { name: name.to_owned(), parameters })
    };
    let tools = tools.iter().filter_map(tool).collect();
    Some(Constraint { field: field.to_owned(), source: Source::ToolCalls(tools, count) })
}

fn variables(f: &mut Fields) -> ApiResult<Map<String, Value>> {
    let variables = match f.take("chat_template_kwargs") {
        None => return Ok(Map::new()),
        Some(Value::Object(map)) => map,
        Some(_) => return Err(f.error("chat_template_kwargs", "must be an object")),
    };
    if variables.len() > bounds::ENTRIES || variables.values().any(|value| depth(value) > MAX_DEPTH) {
        let message = format!("has more than {} entries or {MAX_DEPTH} levels", bounds::ENTRIES);
        return Err(f.error("chat_template_kwargs", message));
    }
    if let Some(name) = variables.keys().find(|name| RESERVED_VARIABLES.contains(&name.as_str())) {
        return Err(f.error("chat_template_kwargs", format_args!("{name} cannot be set here")));
    }
    Ok(variables)
}

/// Levels of a value. Bounded by the JSON parser's own limit.
fn depth(value: &Value) -> usize {
    let below = match value {
        Value::Array(items) => items.iter().map(depth).max(),
        Value::Object(map) => map.values().map(depth).max(),
        _ => return 0,
    };
    below.unwrap_or(0) + 1
}

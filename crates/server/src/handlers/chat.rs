use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use longhaul_text::Conversation;
use serde_json::{Map, Value, json};

use crate::choice::{Calls, TextOptions};
use crate::error::{ApiError, ApiResult};
use crate::handlers::{Call, Ready, answer, open, plain, receive};
use crate::pipeline::Generation;
use crate::prompt::{Encoded, encode_chat, room, text_error, tokenizer};
use crate::request::{ChatRequest, Fields, ToolChoice};
use crate::response::ChatWriter;
use crate::server::App;

/// `POST /v1/chat/completions`
pub(crate) async fn create(State(app): State<Arc<App>>, request: Request) -> Response {
    let ticket = open(&app, &request);
    answer(start(app, request).await, ticket).await
}

/// `POST /v1/chat/completions/render`: the prompt of a chat, without running it.
pub(crate) async fn render(State(app): State<Arc<App>>, request: Request) -> Response {
    let ticket = open(&app, &request);
    plain(rendered(app, request).await, ticket)
}

async fn parse(call: &mut Call) -> ApiResult<(ChatRequest, Encoded)> {
    let (serving, app) = (Arc::clone(&call.serving), Arc::clone(&call.app));
    let body = std::mem::take(&mut call.body);
    call.app
        .pool
        .run(move || {
            let model = serving.model();
            let mut request = ChatRequest::read(Fields::body(&body)?, model, &app.config.limits)?;
            fill(&mut request.conversation, &app.config.template_variables);
            let encoded = encode_chat(model, &request.conversation, request.common.truncate_prompt_tokens)?;
            Ok((request, encoded))
        })
        .await
}

/// Gives the template the operator's variables, where the request has none of that name.
pub(super) fn fill(conversation: &mut Conversation, variables: &Map<String, Value>) {
    for (name, value) in variables {
        conversation.variables.entry(name).or_insert_with(|| value.clone());
    }
}

async fn start(app: Arc<App>, request: Request) -> ApiResult<Ready<ChatWriter>> {
    let mut call = receive(app, request).await?;
    let (request, prompt) = parse(&mut call).await?;
    let mut common = request.common;
    let constraint = common.constraint.take();
    let name = call.model_name(request.model.as_deref())?;
    let model = call.model();
    let room = room(model, prompt.ids.len(), 1)?;
    // Asked for, or the checkpoint's own limit; never more than fits.
    let max_tokens = request.max_tokens.or(model.max_new_tokens).unwrap_or(room).min(room);
    check_min_tokens(common.sampling.min_tokens, max_tokens)?;
    let grammar = call.app.grammars.compile(&call.serving, constraint).await?;
    let id = call.id("chatcmpl", common.request_id.as_deref());
    let mut submission = call.submission(id.clone(), Arc::clone(&prompt.ids), &common, grammar, max_tokens);
    submission.logprobs = request.logprobs;
    let options = TextOptions {
        calls: match request.tool_choice {
            ToolChoice::None => Calls::None,
            ToolChoice::Auto => Calls::Among,
            ToolChoice::Required | ToolChoice::Named(_) => Calls::Only,
        },
        parallel_tool_calls: request.parallel_tool_calls,
        // The client has chosen the call; that the model made it is no news.
        calls_finish: if let ToolChoice::Named(_) = request.tool_choice { "stop" } else { "tool_calls" },
        ..call.text_options(&common)
    };
    let writer = ChatWriter::new(
        call.head(id, name),
        call.app.config.response_role.clone(),
        call.token_writer(&common),
        request.logprobs.is_some(),
        common.prompt_logprobs.is_some(),
        common.return_token_ids.then(|| prompt.ids.to_vec()),
    );
    let metrics = Arc::clone(&call.app.metrics);
    let generation = Generation::submit(&*call.serving, vec![submission], &options, metrics, call.arrived)?;
    drop(call.held);
    Ok(Ready { app: call.app, generation, writer, common })
}

async fn rendered(app: Arc<App>, request: Request) -> ApiResult<String> {
    let mut call = receive(app, request).await?;
    let (request, prompt) = parse(&mut call).await?;
    let name = call.model_name(request.model.as_deref())?;
    let serving = Arc::clone(&call.serving);
    let work = move || {
        let model = serving.model();
        let template = model.template.as_ref().ok_or_else(|| ApiError::internal("the template is gone"))?;
        let text = template.render_conversation(&request.conversation).map_err(text_error)?;
        tokenizer(model)?;
        let body = json!({
            "model": name,
            "prompt": text,
            "token_ids": prompt.ids.as_ref(),
            "count": prompt.ids.len(),
            "max_model_len": model.max_model_len,
        });
        Ok(body.to_string())
    };
    call.app.pool.run(work).await
}

/// # Errors
/// More tokens wanted at least than at most.
pub(super) fn check_min_tokens(min: usize, max: usize) -> ApiResult<()> {
    if min > max {
        return Err(ApiError::field(
            "min_tokens",
            format_args!("{min} is more than the {max} tokens of max_tokens"),
        ));
    }
    Ok(())
}

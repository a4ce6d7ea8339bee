use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;

use crate::error::{ApiError, ApiResult};
use crate::handlers::chat::check_min_tokens;
use crate::handlers::{Ready, answer, open, receive};
use crate::pipeline::Generation;
use crate::prompt::{encode_prompts, room};
use crate::request::{CompletionRequest, Fields};
use crate::response::{CompletionOptions, CompletionWriter};
use crate::server::App;

/// `POST /v1/completions`
pub(crate) async fn create(State(app): State<Arc<App>>, request: Request) -> Response {
    let ticket = open(&app, &request);
    answer(start(app, request).await, ticket).await
}

async fn start(app: Arc<App>, request: Request) -> ApiResult<Ready<CompletionWriter>> {
    let mut call = receive(app, request).await?;
    let (serving, limits) = (Arc::clone(&call.serving), call.app.config.limits.clone());
    let body = std::mem::take(&mut call.body);
    let parse = move || {
        let mut request = CompletionRequest::read(Fields::body(&body)?, serving.model(), &limits)?;
        let prompts = std::mem::take(&mut request.prompts);
        let truncate = request.common.truncate_prompt_tokens;
        Ok((encode_prompts(&*serving, prompts, truncate, request.echo)?, request))
    };
    let (prompts, request) = call.app.pool.run(parse).await?;
    let mut common = request.common;
    let constraint = common.constraint.take();
    let name = call.model_name(request.model.as_deref())?;
    let model = call.model();
    if request.echo && model.tokenizer.is_none() {
        return Err(ApiError::field("echo", "needs a tokenizer, which this model has not"));
    }
    let grammar = call.app.grammars.compile(&call.serving, constraint).await?;
    let id = call.id("cmpl", common.request_id.as_deref());
    let mut submissions = Vec::with_capacity(prompts.len());
    for (index, prompt) in prompts.iter().enumerate() {
        let room = room(model, prompt.ids.len(), request.max_tokens.min(1))?;
        let max_tokens = request.max_tokens.min(room);
        check_min_tokens(common.sampling.min_tokens, max_tokens)?;
        let part = format!("{id}-{index}");
        let mut submission =
            call.submission(part, Arc::clone(&prompt.ids), &common, grammar.clone(), max_tokens);
        submission.logprobs = request.logprobs;
        if request.echo {
            // The echoed tokens have scores, too.
            submission.prompt_logprobs = submission.prompt_logprobs.max(request.logprobs);
        }
        submissions.push(submission);
    }
    let options = call.text_options(&common);
    let writer = CompletionWriter::new(
        call.head(id, name),
        call.token_writer(&common),
        prompts,
        common.n as usize,
        CompletionOptions {
            echo: request.echo,
            logprobs: request.logprobs.is_some(),
            prompt_logprobs: common.prompt_logprobs.is_some(),
            token_ids: common.return_token_ids,
        },
    );
    let metrics = Arc::clone(&call.app.metrics);
    let generation = Generation::submit(&*call.serving, submissions, &options, metrics, call.arrived)?;
    drop(call.held);
    Ok(Ready { app: call.app, generation, writer, common })
}

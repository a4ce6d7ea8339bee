use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use longhaul_text::SpecialTokens;
use serde_json::json;

use crate::error::ApiResult;
use crate::handlers::chat::fill;
use crate::handlers::{open, plain, receive};
use crate::prompt::{encode_chat, text_error, tokenizer};
use crate::request::{DetokenizeRequest, Fields, TokenizeRequest, TokenizeSource};
use crate::server::App;

/// `POST /tokenize`
pub(crate) async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Response {
    let ticket = open(&app, &request);
    plain(tokens(app, request).await, ticket)
}

/// `POST /detokenize`
pub(crate) async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Response {
    let ticket = open(&app, &request);
    plain(text(app, request).await, ticket)
}

async fn tokens(app: Arc<App>, request: Request) -> ApiResult<String> {
    let mut call = receive(app, request).await?;
    let (serving, app) = (Arc::clone(&call.serving), Arc::clone(&call.app));
    let body = std::mem::take(&mut call.body);
    let work = move || {
        let mut request = TokenizeRequest::read(Fields::body(&body)?, &app.config.limits)?;
        if let TokenizeSource::Chat(conversation) = &mut request.source {
            fill(conversation, &app.config.template_variables);
        }
        let model = serving.model();
        let ids = match &request.source {
            TokenizeSource::Text(text) => {
                tokenizer(model)?.encode(text, SpecialTokens::Parse).map_err(text_error)?.into()
            }
            TokenizeSource::Chat(conversation) => encode_chat(model, conversation, None)?.ids,
        };
        let strings = match request.return_token_strs {
            true => {
                let tokenizer = tokenizer(model)?;
                Some(ids.iter().map(|id| tokenizer.decode(&[*id], false)).collect::<Vec<_>>())
            }
            false => None,
        };
        let body = json!({
            "count": ids.len(),
            "max_model_len": model.max_model_len,
            "tokens": ids.as_ref(),
            "token_strs": strings,
        });
        Ok((request.model, body.to_string()))
    };
    let (name, body) = call.app.pool.run(work).await?;
    call.model_name(name.as_deref())?;
    Ok(body)
}

async fn text(app: Arc<App>, request: Request) -> ApiResult<String> {
    let mut call = receive(app, request).await?;
    let serving = Arc::clone(&call.serving);
    let body = std::mem::take(&mut call.body);
    let work = move || {
        let model = serving.model();
        let request = DetokenizeRequest::read(Fields::body(&body)?, model)?;
        let text = tokenizer(model)?.decode(&request.tokens, false);
        Ok((request.model, json!({"prompt": text}).to_string()))
    };
    let (name, body) = call.app.pool.run(work).await?;
    call.model_name(name.as_deref())?;
    Ok(body)
}

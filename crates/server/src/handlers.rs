//! What the routes do.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod info;
pub(crate) mod tokenize;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{timeout, timeout_at};

use crate::choice::{Calls, TextOptions};
use crate::error::{ApiError, ApiResult, quote};
use crate::ledger::Ticket;
use crate::logprobs::TokenWriter;
use crate::metrics::Metrics;
use crate::pipeline::{Generation, Update};
use crate::request::{Common, check_content_type};
use crate::response::{Head, Writer};
use crate::router::Caller;
use crate::server::{App, unix_seconds};
use crate::serving::{Grammar, ModelInfo, Serving, Submission};
use crate::sse;

/// A request that has its whole body.
struct Call {
    app: Arc<App>,
    serving: Arc<dyn Serving>,
    caller: Caller,
    body: Bytes,
    /// The body's share of the bytes that may be held at once.
    held: HeldBody,
    arrived: Instant,
}

/// A request for the API has arrived.
fn open(app: &App, request: &Request) -> Ticket {
    let caller = request.extensions().get::<Caller>();
    app.metrics.ledger.open().with_record(caller.map(|caller| Arc::clone(&caller.record)))
}

/// Receives a request for the API.
async fn receive(app: Arc<App>, request: Request) -> ApiResult<Call> {
    let arrived = Instant::now();
    let serving = match app.lifecycle.phase() {
        crate::Phase::Serving(serving) | crate::Phase::Leaving(serving) => serving,
        crate::Phase::Loading => {
            return Err(ApiError::unavailable("the model is still loading; see /ready", Some(LOADING_RETRY)));
        }
        crate::Phase::Draining => {
            app.metrics.rejected("draining");
            return Err(ApiError::draining());
        }
    };
    let (parts, body) = request.into_parts();
    let caller = parts.extensions.get::<Caller>().cloned();
    let caller = caller.ok_or_else(|| ApiError::internal("the request was not checked"))?;
    if let Some(quota) = &caller.quota {
        let lease = quota.admit(arrived).inspect_err(|_| app.metrics.rejected("quota"))?;
        caller.record.hold(lease);
    }
    let limit = app.config.limits.body_limit(serving.model().max_model_len);
    let (body, held) = read_body(&app, &parts.headers, body, limit).await?;
    Ok(Call { app, serving, caller, body, held, arrived })
}

/// When to ask again while the model loads.
const LOADING_RETRY: Duration = Duration::from_secs(5);

/// Reads a JSON body within its bounds of size and time, and within what all bodies together may hold.
async fn read_body(
    app: &App,
    headers: &HeaderMap,
    mut body: Body,
    limit: usize,
) -> ApiResult<(Bytes, HeldBody)> {
    let text = |name| headers.get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok());
    if headers.contains_key(CONTENT_ENCODING) && text(CONTENT_ENCODING) != Some("identity") {
        return Err(ApiError::unsupported_encoding());
    }
    check_content_type(text(CONTENT_TYPE))?;
    let declared = text(CONTENT_LENGTH).and_then(|length| length.parse::<usize>().ok());
    if declared.is_some_and(|length| length > limit) {
        return Err(ApiError::too_large(limit));
    }
    let limits = &app.config.limits;
    let mut held = HeldBody::new(app);
    let mut bytes: Vec<u8> = Vec::with_capacity(declared.unwrap_or(0).min(64 << 10));
    let deadline = tokio::time::Instant::now() + limits.body_time;
    loop {
        let frame =
            timeout_at(deadline, timeout(limits.body_idle, poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))));
        let frame = match frame.await {
            Ok(Ok(frame)) => frame,
            Ok(Err(_)) | Err(_) => return Err(ApiError::body_timeout()),
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|_| ApiError::bad_request("the body could not be read to its end"))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            return Err(ApiError::too_large(limit));
        }
        bytes.extend_from_slice(&data);
        held.grow(&app.bodies, bytes.len())?;
    }
    Ok((bytes.into(), held))
}

/// A body's share of the bytes that all bodies together may hold.
struct HeldBody {
    permit: Option<OwnedSemaphorePermit>,
    metrics: Arc<Metrics>,
}

impl HeldBody {
    fn new(app: &App) -> Self {
        Self { permit: None, metrics: Arc::clone(&app.metrics) }
    }

    fn kib(&self) -> usize {
        self.permit.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }

    /// Holds `bytes` bytes from now on.
    ///
    /// # Errors
    /// No room.
    fn grow(&mut self, bodies: &Arc<Semaphore>, bytes: usize) -> ApiResult<()> {
        let more = bytes.div_ceil(1 << 10).saturating_sub(self.kib());
        let count = u32::try_from(more).unwrap_or(u32::MAX);
        let permit = Arc::clone(bodies).try_acquire_many_owned(count).map_err(|_| {
            ApiError::unavailable("too many request bodies at once", Some(Duration::from_secs(1)))
        })?;
        self.metrics.body_bytes.fetch_add((more as u64) << 10, Ordering::AcqRel);
        match &mut self.permit {
            Some(held) => held.merge(permit),
            None => self.permit = Some(permit),
        }
        Ok(())
    }
}

impl Drop for HeldBody {
    fn drop(&mut self) {
        self.metrics.body_bytes.fetch_sub((self.kib() as u64) << 10, Ordering::AcqRel);
    }
}

impl Call {
    fn model(&self) -> &ModelInfo {
        self.serving.model()
    }

    /// The name in answers, for the model that the request named.
    ///
    /// # Errors
    /// A name under which nothing is served.
    fn model_name(&self, asked: Option<&str>) -> ApiResult<String> {
        let names = names(&self.app, self.model());
        let named = |name: String| {
            self.caller.record.model(&name);
            Ok(name)
        };
        match asked {
            None => named(names.first().cloned().unwrap_or_default()),
            Some(asked) if names.iter().any(|name| name == asked) => named(asked.to_owned()),
            Some(asked) => {
                let asked = quote(asked);
                let message = format!("The model `{}` does not exist.", asked.trim_matches('"'));
                Err(ApiError::not_found(message).with_param("model"))
            }
        }
    }

    /// `prefix-` and the id of the request: the client's header, its field, or a random one.
    fn id(&self, prefix: &str, field: Option<&str>) -> String {
        let id = self.caller.given_id.as_deref().or(field).unwrap_or(&self.caller.id);
        format!("{prefix}-{id}")
    }

    fn head(&self, id: String, model: String) -> Head {
        let details = self.app.config.prompt_tokens_details;
        Head { id, created: unix_seconds(), model, details }
    }

    fn token_writer(&self, common: &Common) -> TokenWriter {
        let as_ids = common.return_tokens_as_token_ids || self.app.config.tokens_as_ids;
        TokenWriter::new(self.model().tokenizer.clone(), as_ids)
    }

    /// How the text of a request that knows no tools is made.
    fn text_options(&self, common: &Common) -> TextOptions {
        TextOptions {
            tokenizer: self.model().tokenizer.clone(),
            stop: common.stop.clone(),
            include_stop: common.include_stop_str_in_output,
            skip_special: common.skip_special_tokens,
            min_tokens: common.sampling.min_tokens,
            calls: Calls::None,
            parallel_tool_calls: true,
            calls_finish: "tool_calls",
        }
    }

    fn submission(
        &self,
        id: String,
        prompt: Arc<[u32]>,
        common: &Common,
        grammar: Option<Arc<dyn Grammar>>,
        max_tokens: usize,
    ) -> Submission {
        let limit = self.app.config.limits.request_time;
        let submission = Submission {
            id,
            prompt,
            sampling: common.sampling.clone(),
            grammar,
            max_tokens,
            n: common.n,
            logprobs: None,
            prompt_logprobs: common.prompt_logprobs,
            deadline: limit.map(|limit| self.arrived + limit),
            priority: self
                .caller
                .quota
                .as_ref()
                .map_or(common.priority, |quota| common.priority.saturating_add(quota.terms.priority)),
            cache_salt: common.cache_salt.clone(),
            namespace: self.caller.namespace.clone(),
        };
        self.caller.record.submitted(&submission);
        submission
    }
}

/// The names under which the model is served.
fn names(app: &App, model: &ModelInfo) -> Vec<String> {
    match app.config.served_model_names.as_slice() {
        [] => vec![model.root.clone()],
        names => names.to_vec(),
    }
}

/// What a request leads to when it is accepted.
struct Ready<W> {
    app: Arc<App>,
    generation: Generation,
    writer: W,
    common: Common,
}

/// Answers: as a stream or as one body.
async fn answer<W: Writer + Unpin>(ready: ApiResult<Ready<W>>, mut ticket: Ticket) -> Response {
    let Ready { app, generation, writer, common } = match ready {
        Ok(ready) => ready,
        Err(error) => {
            ticket.finish(error.outcome());
            return error.into_response();
        }
    };
    let mut generation = generation.with_ticket(ticket);
    let mut writer = writer;
    if common.stream {
        let mut options = common.stream_options;
        if app.config.force_include_usage {
            options.include_usage = true;
            options.continuous_usage_stats = true;
        }
        return sse::respond(generation, writer, options, app.config.sse_keep_alive);
    }
    loop {
        match generation.next().await {
            Update::Prompt { part, tokens } => writer.prompt(part, tokens),
            Update::Piece { index, piece, token } => writer.keep(index, piece, token),
            Update::Failed(error) => return error.into_response(),
            Update::Done => return json(&writer.body(&generation)),
        }
    }
}

/// A JSON body.
fn json(value: &Value) -> Response {
    written(value.to_string())
}

/// A JSON body that is written.
fn written(json: String) -> Response {
    let mut response = Response::new(Body::from(json));
    response.headers_mut().insert(CONTENT_TYPE, axum::http::HeaderValue::from_static("application/json"));
    response
}

/// Answers a request that generates nothing. Its body may be large, so it is written where its text was read.
fn plain(result: ApiResult<String>, mut ticket: Ticket) -> Response {
    match result {
        Ok(body) => {
            ticket.finish(crate::Outcome::Stop);
            written(body)
        }
        Err(error) => {
            ticket.finish(error.outcome());
            error.into_response()
        }
    }
}

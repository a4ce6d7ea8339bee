//! Routes, and what every request passes before it reaches one: host check, key check, request id, panic guard.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};

use crate::error::ApiError;
use crate::handlers::{chat, completions, info, tokenize};
use crate::host;
use crate::lifecycle::Phase;
use crate::request::is_request_id;
use crate::server::App;
use crate::serving::Namespace;

/// Who may call a route. A path that is no route is [`Access::Key`]: without a key nobody learns what exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Everybody: probes and scrapers, which carry no keys.
    Public,
    /// Holders of a key, when there are keys.
    Key,
}

/// A route as data.
pub(crate) struct Route {
    pub(crate) path: &'static str,
    pub(crate) access: Access,
    /// Whether requests count in `http_requests_total`; probes would drown the rest.
    counted: bool,
    handler: fn() -> MethodRouter<Arc<App>>,
}

const fn public(path: &'static str, handler: fn() -> MethodRouter<Arc<App>>) -> Route {
    Route { path, access: Access::Public, counted: false, handler }
}

const fn keyed(path: &'static str, handler: fn() -> MethodRouter<Arc<App>>) -> Route {
    Route { path, access: Access::Key, counted: true, handler }
}

/// Every route there is.
pub(crate) static ROUTES: &[Route] = &[
    public("/health", || get(info::health)),
    public("/ping", || get(info::health).post(info::health)),
    public("/ready", || get(info::ready)),
    public("/live", || get(info::live)),
    public("/version", || get(info::version)),
    public("/load", || get(info::load)),
    public("/metrics", || get(info::metrics)),
    public("/openapi.json", || get(info::openapi)),
    keyed("/v1/models", || get(info::models)),
    keyed("/v1/chat/completions", || post(chat::create)),
    keyed("/v1/chat/completions/render", || post(chat::render)),
    keyed("/v1/completions", || post(completions::create)),
    keyed("/tokenize", || post(tokenize::tokenize)),
    keyed("/detokenize", || post(tokenize::detokenize)),
];

/// What the guard found out about a request.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) namespace: Namespace,
    /// The client's own id, if it sent a good one.
    pub(crate) given_id: Option<String>,
    /// That one, or a random one.
    pub(crate) id: String,
}

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The service that answers requests.
pub(crate) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        router = router.route(route.path, (route.handler)());
    }
    router
        .fallback(|| async { ApiError::not_found("Not Found") })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(from_fn_with_state(Arc::clone(&app), guard))
        .with_state(app)
}

async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path();
    let route = ROUTES.iter().find(|route| route.path == path);
    let checked = host::check(request.version(), request.uri(), request.headers(), &app.config.allowed_hosts);
    let access = route.map_or(Access::Key, |route| route.access);
    let namespace = match access {
        Access::Public => Some(Namespace::default()),
        Access::Key => app.config.api_keys.admit(request.headers()),
    };
    let given_id = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    let given_id = given_id.filter(|id| is_request_id(id)).map(str::to_owned);
    let id = given_id.clone().unwrap_or_else(random_id);
    let mut response = match (checked, namespace) {
        (Err(error), _) => error.into_response(),
        (Ok(()), None) => unauthorized(),
        (Ok(()), Some(namespace)) => {
            request.extensions_mut().insert(Caller { namespace, given_id, id: id.clone() });
            caught(&app, next.run(request)).await
        }
    };
    if route.is_none_or(|route| route.counted) {
        let (path, method) = (route.map_or("none", |route| route.path), known(method.as_str()));
        app.metrics.http(path, method, response.status().as_u16(), started.elapsed());
    }
    let headers = response.headers_mut();
    if app.config.request_id_headers
        && let Ok(id) = HeaderValue::from_str(&id)
    {
        headers.insert(REQUEST_ID.clone(), id);
    }
    if matches!(app.lifecycle.phase(), Phase::Draining) {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// A client may invent methods; the metrics have room for the known ones.
fn known(method: &str) -> &str {
    let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    known.into_iter().find(|known| *known == method).unwrap_or("other")
}

/// Runs a handler; its panic is a 500 for its request and nothing for the others.
async fn caught(app: &App, handler: impl Future<Output = Response>) -> Response {
    let mut handler = std::pin::pin!(handler);
    std::future::poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| handler.as_mut().poll(cx))) {
        Ok(poll) => poll,
        Err(_) => {
            app.metrics.panics.fetch_add(1, Ordering::Relaxed);
            Poll::Ready(ApiError::internal("the server failed on this request").into_response())
        }
    })
    .await
}

/// As the rivals answer it.
fn unauthorized() -> Response {
    let mut response = Response::new(Body::from(r#"{"error":"Unauthorized"}"#));
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// 128 random bits in hexadecimal.
pub(crate) fn random_id() -> String {
    let random = || getrandom::u64().unwrap_or_else(|_| crate::server::unix_seconds());
    format!("{:016x}{:016x}", random(), random())
}

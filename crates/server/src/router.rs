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
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use crate::auth::Admitted;
use crate::body::Holding;
use crate::config::Cors;
use crate::error::ApiError;
use crate::handlers::{chat, completions, info, tokenize};
use crate::host;
use crate::lifecycle::Phase;
use crate::quota::Quota;
use crate::record::Record;
use crate::request::is_request_id;
use crate::server::App;
use crate::serving::Namespace;
use crate::traces::Parent;
use crate::unread;

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
    /// What its key may ask for.
    pub(crate) quota: Option<Arc<Quota>>,
    /// The client's own id, if it sent a good one.
    pub(crate) given_id: Option<String>,
    /// That one, or a random one.
    pub(crate) id: String,
    pub(crate) record: Arc<Record>,
}

/// Whether `path` is a route.
pub(crate) fn is_route(path: &str) -> bool {
    ROUTES.iter().any(|route| route.path == path)
}

/// Whether requests for `route` are among those that count; one for no route at all does.
pub(crate) fn is_counted(route: &str) -> bool {
    ROUTES.iter().find(|known| known.path == route).is_none_or(|known| known.counted)
}

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The service that answers requests.
pub(crate) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        router = router.route(route.path, (route.handler)());
    }
    router = router
        .fallback(|| async { ApiError::not_found("Not Found") })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(from_fn_with_state(Arc::clone(&app), guard));
    // It answers every OPTIONS: only where somebody wants that.
    if !app.config.cors.origins.is_empty() {
        router = router.layer(cors(&app.config.cors));
    }
    router.with_state(app)
}

/// Answers what browsers ask before a page of another origin may call.
fn cors(cors: &Cors) -> CorsLayer {
    let any = cors.origins.iter().any(|origin| origin == "*");
    let origins = if any { AllowOrigin::any() } else { AllowOrigin::list(cors.origins.clone()) };
    let methods = match cors.methods.as_slice() {
        [] => AllowMethods::list([Method::GET, Method::POST]),
        methods => AllowMethods::list(methods.to_vec()),
    };
    let headers = match cors.headers.as_slice() {
        [] => AllowHeaders::mirror_request(),
        headers => AllowHeaders::list(headers.to_vec()),
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods(methods)
        .allow_headers(headers)
        .allow_credentials(cors.credentials && !any)
        .expose_headers([REQUEST_ID.clone()])
}

/// The target without `root` before it, where it is there.
pub(crate) fn rooted(root: &str, uri: &Uri) -> Option<Uri> {
    let target = uri.path_and_query()?.as_str();
    let rest = target.strip_prefix(root).filter(|rest| !root.is_empty() && rest.starts_with('/'))?;
    // A target with a host of its own is refused later on.
    if uri.authority().is_some() { None } else { rest.parse().ok() }
}

async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path();
    let route = ROUTES.iter().find(|route| route.path == path);
    let checked = host::check(request.version(), request.uri(), request.headers(), &app.config.allowed_hosts);
    let access = route.map_or(Access::Key, |route| route.access);
    let admitted = match access {
        Access::Public => Some(Admitted::default()),
        Access::Key => app.config.api_keys.admit(request.headers()),
    };
    let given_id = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    let given_id = given_id.filter(|id| is_request_id(id)).map(str::to_owned);
    let id = given_id.clone().unwrap_or_else(random_id);
    let (path, method) = (route.map_or("none", |route| route.path), known(method.as_str()));
    let parent = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
    let parent = parent.and_then(Parent::parse);
    let record = Record::new(Arc::clone(&app), id.clone(), method, path, parent, started);
    let (body, read) = unread::watch(std::mem::take(request.body_mut()));
    *request.body_mut() = body;
    let response = match (checked, admitted) {
        (Err(error), _) => error.into_response(),
        (Ok(()), None) => unauthorized(),
        (Ok(()), Some(Admitted { namespace, quota })) => {
            record.caller(&namespace, quota.as_deref());
            let record = Arc::clone(&record);
            request.extensions_mut().insert(Caller { namespace, quota, given_id, id: id.clone(), record });
            caught(&app, next.run(request)).await
        }
    };
    let status = response.status().as_u16();
    record.status(status);
    if route.is_none_or(|route| route.counted) {
        app.metrics.http(path, method, status, started.elapsed());
    }
    let mut response = response.map(|body| Body::new(Holding::new(body, record)));
    let headers = response.headers_mut();
    if app.config.request_id_headers
        && let Ok(id) = HeaderValue::from_str(&id)
    {
        headers.insert(REQUEST_ID.clone(), id);
    }
    if matches!(app.lifecycle.phase(), Phase::Draining) || !read.reached() {
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

//! Probes, metrics, and what the server says of itself.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::handlers::{json as body, names};
use crate::lifecycle::Phase;
use crate::openapi;
use crate::server::App;

/// `GET /health`, `/ping`: whether requests are served and the engine makes progress. An empty body.
pub(crate) async fn health(State(app): State<Arc<App>>) -> StatusCode {
    match app.lifecycle.serving() {
        Some(serving) if serving.health().is_ok() => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// `GET /live`: whether the process answers at all.
pub(crate) async fn live() -> StatusCode {
    StatusCode::OK
}

/// `GET /ready`: whether new requests should come here; if not, why not yet or no more.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    let (status, value) = match app.lifecycle.phase() {
        Phase::Serving(serving) => match serving.health() {
            Ok(()) => (StatusCode::OK, json!({"status": "ready"})),
            Err(reason) => {
                (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "unhealthy", "reason": reason}))
            }
        },
        Phase::Loading => {
            let (done, total) = app.lifecycle.loaded();
            let value = json!({"status": "loading", "loaded_bytes": done, "total_bytes": total});
            (StatusCode::SERVICE_UNAVAILABLE, value)
        }
        Phase::Leaving(_) | Phase::Draining => (
            StatusCode::SERVICE_UNAVAILABLE,
            json!({"status": "draining", "requests": app.metrics.ledger.in_flight()}),
        ),
    };
    let mut response = body(&value);
    *response.status_mut() = status;
    response
}

/// `GET /version`
pub(crate) async fn version() -> Response {
    body(&json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /load`: requests of the API in flight.
pub(crate) async fn load(State(app): State<Arc<App>>) -> Response {
    body(&json!({"server_load": app.metrics.ledger.in_flight()}))
}

/// `GET /metrics`
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let serving = app.lifecycle.serving();
    let name = serving.as_ref().and_then(|serving| names(&app, serving.model()).into_iter().next());
    let served = serving.as_ref().zip(name.as_deref());
    let page = app.metrics.render(served.map(|(s, name)| (s.model(), name, s.snapshot())), app.started);
    let mut response = Response::new(Body::from(page));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// `GET /openapi.json`
pub(crate) async fn openapi(State(app): State<Arc<App>>) -> Response {
    let serving = app.lifecycle.serving();
    body(&openapi::document(&app.config, serving.as_ref().map(|serving| serving.model())))
}

/// `GET /v1/models`
pub(crate) async fn models(State(app): State<Arc<App>>) -> Response {
    let Some(serving) = app.lifecycle.serving() else {
        return ApiError::unavailable("the model is not loaded; see /ready", None).into_response();
    };
    let model = serving.model();
    let card = |name: String| -> Value {
        json!({
            "id": name,
            "object": "model",
            "created": app.created,
            "owned_by": "longhaul",
            "root": model.root,
            "parent": null,
            "max_model_len": model.max_model_len,
            "permission": [{
                "id": format!("modelperm-{name}"),
                "object": "model_permission",
                "created": app.created,
                "allow_create_engine": false,
                "allow_sampling": true,
                "allow_logprobs": true,
                "allow_search_indices": false,
                "allow_view": true,
                "allow_fine_tuning": false,
                "organization": "*",
                "group": null,
                "is_blocking": false,
            }],
        })
    };
    let cards: Vec<Value> = names(&app, model).into_iter().map(card).collect();
    body(&json!({"object": "list", "data": cards}))
}

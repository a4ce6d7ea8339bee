//! Errors as a client sees them: `{"error": {"message", "type", "param", "code"}}`.

use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::ledger::Outcome;
use crate::serving::{Failure, Refusal};

/// An answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
    retry_after: Option<Duration>,
    close: bool,
}

pub(crate) type ApiResult<T> = Result<T, ApiError>;

/// Longest piece of a client's own input in a message.
const QUOTED_CHARACTERS: usize = 200;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, retry_after: None, close: false }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message)
    }

    /// A field that is wrong, or that this server does not support.
    pub(crate) fn field(field: impl Into<String>, message: impl std::fmt::Display) -> Self {
        let field = field.into();
        Self { param: Some(field.clone()), ..Self::bad_request(format!("{field}: {message}")) }
    }

    /// Names the field that the error is about.
    pub(crate) fn with_param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    pub(crate) fn unsupported(field: impl Into<String>) -> Self {
        Self::field(field, "is not supported by this server; leave it out")
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message)
    }

    pub(crate) fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed", "Method Not Allowed")
    }

    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than the limit of {limit} bytes");
        Self { close: true, ..Self::new(StatusCode::PAYLOAD_TOO_LARGE, "Request Entity Too Large", message) }
    }

    pub(crate) fn unsupported_encoding() -> Self {
        let message = "compressed bodies are not accepted; send the body without Content-Encoding";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Unsupported Media Type", message)
    }

    pub(crate) fn body_timeout() -> Self {
        let message = "the body did not arrive in time";
        Self { close: true, ..Self::new(StatusCode::REQUEST_TIMEOUT, "Request Timeout", message) }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message)
    }

    pub(crate) fn unavailable(message: impl Into<String>, retry_after: Option<Duration>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableError", message);
        Self { retry_after, ..error }
    }

    /// The server is shutting down: try another one.
    pub(crate) fn draining() -> Self {
        let error = Self::unavailable("the server is shutting down", Some(Duration::from_secs(1)));
        Self { close: true, ..error }
    }

    pub(crate) fn request_line(status: StatusCode, message: &'static str) -> Self {
        Self { close: true, ..Self::new(status, "Bad Request", message) }
    }

    /// The object under `error`.
    pub(crate) fn object(&self) -> Value {
        json!({"message": self.message, "type": self.kind, "param": self.param, "code": self.status.as_u16()})
    }

    /// How the ledger counts a request that ends with this error.
    pub(crate) fn outcome(&self) -> Outcome {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => Outcome::Shed429,
            StatusCode::SERVICE_UNAVAILABLE if self.close => Outcome::Drained503,
            StatusCode::SERVICE_UNAVAILABLE => Outcome::Shed503,
            StatusCode::GATEWAY_TIMEOUT => Outcome::Deadline,
            status if status.is_client_error() => Outcome::Invalid4xx,
            _ => Outcome::EngineError500,
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Field { field, message } => Self::field(field, message),
            Refusal::Quota { reason, retry_after } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "RateLimitError", reason);
                Self { retry_after: Some(retry_after), ..error }
            }
            Refusal::Saturated { reason, retry_after } => Self::unavailable(reason, Some(retry_after)),
            Refusal::Unavailable(reason) => Self::unavailable(reason, None),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Engine(_) | Failure::Numeric | Failure::SlowReader => Self::internal(message),
            Failure::Grammar(_) => Self::bad_request(message),
            Failure::NothingAllowed => Self::bad_request(message).with_param("allowed_token_ids"),
            Failure::Deadline => Self::new(StatusCode::GATEWAY_TIMEOUT, "GatewayTimeoutError", message),
            Failure::Drained => Self::draining(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({"error": self.object()}).to_string();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(after) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// A client's text in a message: short, and without control characters.
pub(crate) fn quote(text: &str) -> String {
    let mut short: String = text.chars().take(QUOTED_CHARACTERS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}

/// A JSON value in a few words.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => quote(text),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(map) => format!("an object with {} keys", map.len()),
        other => other.to_string(),
    }
}

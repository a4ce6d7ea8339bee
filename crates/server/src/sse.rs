//! Server-sent events: `data: {json}`, a blank line, at the end `data: [DONE]`.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::Response;
use futures_core::Stream;
use serde_json::{Value, json};
use tokio::time::{Instant, Sleep, sleep};

use crate::error::ApiError;
use crate::pipeline::{Generation, Update};
use crate::request::StreamOptions;
use crate::response::Writer;

const DONE: &[u8] = b"data: [DONE]\n\n";
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// The body of a streamed answer.
struct Events<W> {
    generation: Generation,
    writer: W,
    options: StreamOptions,
    opened: bool,
    done: bool,
    pending: VecDeque<Bytes>,
    keep_alive: Option<(Duration, Pin<Box<Sleep>>)>,
}

/// The response that streams `generation` as `writer` writes it.
pub(crate) fn respond<W: Writer + Unpin>(
    generation: Generation,
    writer: W,
    options: StreamOptions,
    keep_alive: Option<Duration>,
) -> Response {
    let events = Events {
        generation,
        writer,
        options,
        opened: false,
        done: false,
        pending: VecDeque::new(),
        keep_alive: keep_alive.map(|period| (period, Box::pin(sleep(period)))),
    };
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

impl<W: Writer> Events<W> {
    fn update(&mut self, update: Update) {
        match update {
            Update::Prompt { part, tokens } => self.writer.prompt(part, tokens),
            Update::Piece { index, piece, token } => {
                if !std::mem::replace(&mut self.opened, true) {
                    let opening = self.writer.opening(self.generation.choices());
                    self.pending.extend(opening.iter().map(event));
                }
                let usage = self.options.continuous_usage_stats && self.options.include_usage;
                let usage = usage.then(|| self.generation.usage_of(index));
                let chunk = self.writer.chunk(index, piece, token, usage);
                self.pending.push_back(event(&chunk));
            }
            Update::Done => {
                if self.options.include_usage {
                    let chunk = self.writer.usage(self.generation.usage());
                    self.pending.push_back(event(&chunk));
                }
                self.end();
            }
            Update::Failed(error) => self.fail(&error),
        }
    }

    /// The head is long sent: the error is an event.
    fn fail(&mut self, error: &ApiError) {
        self.pending.push_back(event(&json!({"error": error.object()})));
        self.end();
    }

    fn end(&mut self) {
        self.pending.push_back(Bytes::from_static(DONE));
        self.done = true;
    }

    /// A comment when nothing was sent for a while.
    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        let Some((period, timer)) = &mut self.keep_alive else { return Poll::Pending };
        match timer.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                timer.as_mut().reset(Instant::now() + *period);
                // The new time has to be registered for waking.
                let _ = timer.as_mut().poll(cx);
                Poll::Ready(Bytes::from_static(KEEP_ALIVE))
            }
        }
    }
}

impl<W: Writer + Unpin> Stream for Events<W> {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(bytes) = this.pending.pop_front() {
                if let Some((period, timer)) = &mut this.keep_alive {
                    timer.as_mut().reset(Instant::now() + *period);
                }
                return Poll::Ready(Some(Ok(bytes)));
            }
            if this.done {
                return Poll::Ready(None);
            }
            let step = catch_unwind(AssertUnwindSafe(|| match this.generation.poll_next(cx) {
                Poll::Ready(update) => {
                    this.update(update);
                    true
                }
                Poll::Pending => false,
            }));
            match step {
                Ok(true) => {}
                Ok(false) => return this.poll_keep_alive(cx).map(|bytes| Some(Ok(bytes))),
                Err(_) => {
                    this.generation.panicked();
                    this.fail(&ApiError::internal("the server failed on this request"));
                }
            }
        }
    }
}

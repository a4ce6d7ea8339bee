//! Bodies that nobody reads to their end: an answer given before that ends its connection, and must say so. A client that is
//! not told sends its next request into a connection that is being closed.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};

/// Whether a body has been read to its end.
#[derive(Clone, Default)]
pub(crate) struct ReadToEnd(Arc<AtomicBool>);

/// A body that tells when it has been read.
struct Watched {
    body: Body,
    end: ReadToEnd,
}

/// `body`, and whether it has been read to its end.
pub(crate) fn watch(body: Body) -> (Body, ReadToEnd) {
    let end = ReadToEnd(Arc::new(AtomicBool::new(body.is_end_stream())));
    (Body::new(Watched { body, end: end.clone() }), end)
}

impl ReadToEnd {
    /// Whether nothing of the body is left.
    pub(crate) fn reached(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let poll = Pin::new(&mut self.body).poll_frame(cx);
        if matches!(poll, Poll::Ready(None)) || self.body.is_end_stream() {
            self.end.0.store(true, Ordering::Release);
        }
        poll
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

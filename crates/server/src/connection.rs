//! Connections: how many, how long, how fast.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
#[cfg(target_os = "linux")]
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::body::Holding;
use crate::config::{Config, Limits};
use crate::router::rooted;
use crate::server::App;

/// Largest head of a request, and the read buffer of a connection.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Most headers of a request.
const MAX_HEADERS: usize = 64;

/// Bytes of an answer that the kernel takes before they can be sent: enough for a fast reader, and not the megabytes that
/// it would keep for each reader that takes none.
#[cfg(target_os = "linux")]
const UNSENT_BYTES: u32 = 64 << 10;

/// Pause after an `accept` that failed: the process has no file descriptor left, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where connections come from.
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection, of whatever kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

type BoxStream = Box<dyn Stream>;

impl Listener {
    async fn accept(&self) -> io::Result<BoxStream> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Small events must not wait for each other; a connection without the options works all the same.
                let _ = stream.set_nodelay(true);
                #[cfg(target_os = "linux")]
                let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
                Box::new(stream)
            }
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Accepts connections until `closing` is true. Connections beyond the limit wait in the listener's backlog.
pub(crate) async fn accept(
    app: Arc<App>,
    listener: Listener,
    router: Router,
    permits: Arc<Semaphore>,
    mut closing: watch::Receiver<bool>,
) {
    loop {
        let permit = tokio::select! {
            permit = Arc::clone(&permits).acquire_owned() => permit,
            _ = closing.wait_for(|closing| *closing) => return,
        };
        let Ok(permit) = permit else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closing.wait_for(|closing| *closing) => return,
        };
        match accepted {
            Ok(stream) => {
                let (app, router, closing) = (Arc::clone(&app), router.clone(), closing.clone());
                tokio::spawn(connection(app, stream, router, permit, closing));
            }
            Err(_) => {
                app.metrics.accept_errors.fetch_add(1, Ordering::Relaxed);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(
    app: Arc<App>,
    stream: BoxStream,
    router: Router,
    permit: OwnedSemaphorePermit,
    closing: watch::Receiver<bool>,
) {
    app.metrics.connections.fetch_add(1, Ordering::Relaxed);
    if let Some(stream) = secured(&app, stream).await {
        serve(&app.config, stream, router, closing).await;
    }
    app.metrics.connections.fetch_sub(1, Ordering::Relaxed);
    drop(permit);
}

/// The stream inside TLS, where that is spoken; none when the client does not manage the handshake.
async fn secured(app: &App, stream: BoxStream) -> Option<BoxStream> {
    let Some(tls) = &app.config.tls else { return Some(stream) };
    match timeout(app.config.limits.handshake_time, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => Some(Box::new(stream)),
        Ok(Err(_)) | Err(_) => {
            app.metrics.handshake_errors.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

async fn serve(config: &Config, stream: BoxStream, router: Router, mut closing: watch::Receiver<bool>) {
    let limits = &config.limits;
    let phase = Arc::new(watch::Sender::new(Phase::Head));
    let timed = Timed { stream, phase: Arc::clone(&phase), limit: limits.write_time, stalled: None };
    let router = TowerToHyperService::new(router);
    let service = service_fn(|mut request: hyper::Request<Incoming>| {
        if let Some(uri) = rooted(&config.root_path, request.uri()) {
            *request.uri_mut() = uri;
        }
        phase.send_replace(Phase::Busy);
        // Made before the answer, so that a handler that ends without one leaves it, too.
        let busy = Busy(Arc::clone(&phase));
        let answer = hyper::service::Service::call(&router, request);
        async move {
            let response = answer.await?;
            Ok::<_, std::convert::Infallible>(response.map(|body| Holding::new(body, busy)))
        }
    });
    let connection = http1::Builder::new()
        // `overdue` has them all, and tells a request's head from the time between two.
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(timed), service);
    let mut connection = std::pin::pin!(connection);
    // How a connection ends is the client's affair: the ledger books what became of its requests.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = overdue(phase.subscribe(), limits) => return,
        _ = closing.wait_for(|closing| *closing) => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        _ = connection => {}
        () = overdue(phase.subscribe(), limits) => {}
    }
}

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The rest of a request's head, or the first one.
    Head,
    /// The answer.
    Busy,
    /// The next request.
    Idle,
}

/// Ends when a connection has been waiting for its client for too long.
async fn overdue(mut phase: watch::Receiver<Phase>, limits: &Limits) {
    loop {
        let limit = match *phase.borrow_and_update() {
            Phase::Head => limits.header_time,
            Phase::Idle => limits.keep_alive,
            // Bodies, answers and their reading have limits of their own.
            Phase::Busy => Duration::MAX,
        };
        if let Ok(changed) = timeout(limit, phase.changed()).await
            && changed.is_ok()
        {
            continue;
        }
        return;
    }
}

/// While it lives, a request is being answered; its end begins the time until the next one.
struct Busy(Arc<watch::Sender<Phase>>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.send_replace(Phase::Idle);
    }
}

/// A stream that tells when a next request begins, and whose writes fail when the peer takes nothing for a while.
struct Timed {
    stream: BoxStream,
    phase: Arc<watch::Sender<Phase>>,
    limit: Duration,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Timed {
    fn check<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalled = None;
            // An answer that is still being read began no pause: its time starts again.
            self.phase.send_if_modified(|phase| *phase == Phase::Idle);
            return poll;
        }
        let limit = self.limit;
        let timer =
            self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Timed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let poll = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.phase.send_if_modified(|phase| {
                let begins = *phase == Phase::Idle;
                if begins {
                    *phase = Phase::Head;
                }
                begins
            });
        }
        poll
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.check(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.check(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(cx);
        self.check(cx, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.check(cx, poll)
    }
}

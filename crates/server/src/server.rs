//! From bind to exit.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

use crate::config::Config;
use crate::connection;
use crate::lifecycle::Lifecycle;
use crate::metrics::Metrics;
use crate::prompt::TextPool;
use crate::router;

/// Time that connections have to send what is written when everything else has ended.
const FLUSH_TIME: Duration = Duration::from_secs(5);

/// The names of a machine for itself.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// What handlers share.
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) pool: TextPool,
    /// KiB of bodies that may be held at once.
    pub(crate) bodies: Arc<Semaphore>,
    pub(crate) started: Instant,
    pub(crate) created: u64,
}

/// Why a server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The port is taken, or not ours to take.
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// Everybody on the network could call the API.
    #[error(
        "{address} is reachable from other machines and there is no API key; give keys (--api-key-file), listen on \
         127.0.0.1, or say --allow-unauthenticated"
    )]
    Unauthenticated {
        /// The address.
        address: SocketAddr,
    },
    /// The runtime could not be started.
    #[error("cannot start the server: {0}")]
    Start(#[source] io::Error),
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Requests that were cut because the time to drain was over.
    pub cut: u64,
}

/// A server whose port is bound.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: Arc<App>,
}

impl Server {
    /// Binds the port. Connections are accepted from then on, and answered once [`Server::run`] runs.
    ///
    /// # Errors
    /// [`ServerError::Bind`], and [`ServerError::Unauthenticated`] before anything is bound.
    pub fn bind(address: SocketAddr, mut config: Config) -> Result<Self, ServerError> {
        let open = config.api_keys.is_empty();
        let local = address.ip().is_loopback();
        if open && !local && !config.allow_unauthenticated {
            return Err(ServerError::Unauthenticated { address });
        }
        if open && local && config.allowed_hosts.is_empty() {
            config.allowed_hosts = LOCAL_NAMES.map(str::to_owned).into();
        }
        let failed = |source| ServerError::Bind { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let limits = &config.limits;
        let app = App {
            lifecycle: Lifecycle::default(),
            metrics: Arc::default(),
            pool: TextPool::new(limits.tokenizing),
            bodies: Arc::new(Semaphore::new((limits.inflight_body_bytes >> 10).max(1))),
            started: Instant::now(),
            created: unix_seconds(),
            config,
        };
        Ok(Self { listener, address: bound, app: Arc::new(app) })
    }

    /// The address that is bound: with port 0, the one that the system chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The handle by which the model is announced.
    pub fn lifecycle(&self) -> Lifecycle {
        self.app.lifecycle.clone()
    }

    /// Serves until SIGTERM or SIGINT, then drains; a second signal ends the drain at once.
    ///
    /// # Errors
    /// [`ServerError::Start`].
    pub fn run(self) -> Result<Drained, ServerError> {
        let runtime = runtime()?;
        runtime.block_on(async move {
            let (stop, stops) = mpsc::channel(2);
            for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
                let mut signals = signal(kind).map_err(ServerError::Start)?;
                let stop = stop.clone();
                tokio::spawn(async move {
                    while signals.recv().await.is_some() {
                        // A third signal has nothing to add.
                        let _ = stop.try_send(());
                    }
                });
            }
            self.serve(stops).await
        })
    }

    /// As [`Server::run`], with messages instead of signals. All senders gone is not a message.
    ///
    /// # Errors
    /// [`ServerError::Start`].
    pub fn run_until(self, stops: mpsc::Receiver<()>) -> Result<Drained, ServerError> {
        runtime()?.block_on(self.serve(stops))
    }

    async fn serve(self, mut stops: mpsc::Receiver<()>) -> Result<Drained, ServerError> {
        let app = self.app;
        let listener = tokio::net::TcpListener::from_std(self.listener).map_err(ServerError::Start)?;
        let connections = app.config.limits.connections.clamp(1, u32::MAX as usize >> 3);
        let permits = Arc::new(Semaphore::new(connections));
        let (close, closing) = watch::channel(false);
        let router = router::router(Arc::clone(&app));
        tokio::spawn(connection::accept(Arc::clone(&app), listener, router, Arc::clone(&permits), closing));

        tokio::select! {
            () = stopped(&mut stops) => {}
            () = app.lifecycle.abandoned() => return Ok(Drained { cut: 0 }),
        }
        let cut = drain(&app, &mut stops).await;
        // No connection is accepted any more; those that are open finish writing.
        close.send_replace(true);
        let all = permits.acquire_many(connections as u32);
        let _ = timeout(FLUSH_TIME, all).await;
        Ok(Drained { cut })
    }
}

/// Lets running requests finish, as long as there is time; the number of those that were cut.
async fn drain(app: &App, stops: &mut mpsc::Receiver<()>) -> u64 {
    let config = &app.config;
    let mut hurry = false;
    if app.lifecycle.leave() {
        hurry = timeout(config.drain_delay, stopped(stops)).await.is_ok();
    }
    let serving = app.lifecycle.drain();
    let ledger = &app.metrics.ledger;
    if !hurry {
        tokio::select! {
            () = ledger.idle() => return 0,
            () = tokio::time::sleep(config.drain_timeout) => {}
            () = stopped(stops) => {}
        }
    }
    let cut = ledger.in_flight();
    if let Some(serving) = serving {
        serving.abort_all();
    }
    let _ = timeout(FLUSH_TIME, ledger.idle()).await;
    cut
}

/// A message to stop.
async fn stopped(stops: &mut mpsc::Receiver<()>) {
    if stops.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, ServerError> {
    tokio::runtime::Builder::new_multi_thread()
        .thread_name("longhaul-http")
        .enable_all()
        .build()
        .map_err(ServerError::Start)
}

/// Wall-clock time for `created`.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

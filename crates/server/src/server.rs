//! From bind to exit.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

use crate::config::Config;
use crate::connection;
use crate::endpoint::{Bound, Endpoint};
use crate::lifecycle::{EngineLost, Lifecycle};
use crate::log::warn;
use crate::metrics::Metrics;
use crate::prompt::TextPool;
use crate::router;
use crate::structured::Grammars;

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
    pub(crate) grammars: Grammars,
    /// KiB of bodies that may be held at once.
    pub(crate) bodies: Arc<Semaphore>,
    pub(crate) started: Instant,
    pub(crate) created: u64,
}

/// Why a server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The port is taken, or not ours to take.
    #[error("cannot listen on {endpoint}: {source}; {}", .endpoint.remedy())]
    Bind {
        /// The place.
        endpoint: Endpoint,
        /// The system's reason.
        source: io::Error,
    },
    /// Everybody on the network could call the API.
    #[error(
        "{endpoint} is reachable from other machines and there is no API key; give keys (--api-key-file), listen on \
         127.0.0.1, or say --allow-unauthenticated"
    )]
    Unauthenticated {
        /// The place.
        endpoint: Endpoint,
    },
    /// The runtime could not be started.
    #[error("cannot start the server: {0}")]
    Start(#[source] io::Error),
    /// Nothing is served any more; what ran has failed, and the process should be started again.
    #[error("the engine is lost: {}", .0.reason)]
    EngineLost(EngineLost),
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Requests that were cut because the time to drain was over.
    pub cut: u64,
}

/// A server whose port is bound.
pub struct Server {
    bound: Bound,
    endpoint: Endpoint,
    app: Arc<App>,
    on_stop: Option<Box<dyn FnOnce() + Send>>,
}

impl Server {
    /// Binds the endpoint. Connections are accepted from then on, and answered once [`Server::run`] runs.
    ///
    /// # Errors
    /// [`ServerError::Bind`], and [`ServerError::Unauthenticated`] before anything is bound.
    pub fn bind(endpoint: impl Into<Endpoint>, mut config: Config) -> Result<Self, ServerError> {
        let endpoint = endpoint.into();
        let open = config.api_keys.is_empty();
        let local = endpoint.is_local();
        if open && !local && !config.allow_unauthenticated {
            return Err(ServerError::Unauthenticated { endpoint });
        }
        // No web page can reach a socket in the file system.
        if open && local && config.allowed_hosts.is_empty() && matches!(endpoint, Endpoint::Tcp(_)) {
            config.allowed_hosts = LOCAL_NAMES.map(str::to_owned).into();
        }
        let failed = |source| ServerError::Bind { endpoint: endpoint.clone(), source };
        let bound = Bound::new(&endpoint).map_err(failed)?;
        let endpoint = bound.endpoint().map_err(failed)?;
        for route in config.log.silent_routes.iter().filter(|route| !router::is_route(route)) {
            warn(format_args!("there is no route {route:?} whose records could be left out"));
        }
        let limits = &config.limits;
        let app = App {
            lifecycle: Lifecycle::default(),
            metrics: Arc::new(Metrics::new(config.log_drops.clone(), config.tracer.clone())),
            pool: TextPool::new(limits.tokenizing),
            grammars: Grammars::new(limits.compiling, limits.compile_time),
            bodies: Arc::new(Semaphore::new((limits.inflight_body_bytes >> 10).max(1))),
            started: Instant::now(),
            created: unix_seconds(),
            config,
        };
        Ok(Self { bound, endpoint, app: Arc::new(app), on_stop: None })
    }

    /// Calls `told` when the end was asked for, before anything is refused.
    pub fn on_stop(self, told: impl FnOnce() + Send + 'static) -> Self {
        Self { on_stop: Some(Box::new(told)), ..self }
    }

    /// Where it listens: with port 0, with the one that the system chose.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// [`Self::endpoint`] as a client writes it.
    pub fn url(&self) -> String {
        let scheme = if self.app.config.tls.is_some() { "https" } else { "http" };
        match &self.endpoint {
            Endpoint::Tcp(address) => format!("{scheme}://{address}"),
            Endpoint::Unix(path) => format!("{scheme}+unix:{}", path.display()),
        }
    }

    /// The handle by which the model is announced.
    pub fn lifecycle(&self) -> Lifecycle {
        self.app.lifecycle.clone()
    }

    /// Serves until SIGTERM or SIGINT, then drains; a second signal ends the drain at once.
    ///
    /// # Errors
    /// [`ServerError::Start`], [`ServerError::EngineLost`].
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
    /// As [`Server::run`].
    pub fn run_until(self, stops: mpsc::Receiver<()>) -> Result<Drained, ServerError> {
        runtime()?.block_on(self.serve(stops))
    }

    async fn serve(self, mut stops: mpsc::Receiver<()>) -> Result<Drained, ServerError> {
        let app = self.app;
        let (listener, _file) = self.bound.listener().map_err(ServerError::Start)?;
        let connections = app.config.limits.connections.clamp(1, u32::MAX as usize >> 3);
        let permits = Arc::new(Semaphore::new(connections));
        let (close, closing) = watch::channel(false);
        let router = router::router(Arc::clone(&app));
        tokio::spawn(connection::accept(Arc::clone(&app), listener, router, Arc::clone(&permits), closing));

        let ending = async {
            stopped(&mut stops).await;
            self.on_stop.into_iter().for_each(|told| told());
            drain(&app, &mut stops).await
        };
        let end = tokio::select! {
            cut = ending => Ok(Drained { cut }),
            () = app.lifecycle.abandoned() => return Ok(Drained { cut: 0 }),
            loss = app.lifecycle.lost() => Err(loss),
        };
        if end.is_err() {
            app.lifecycle.drain();
            // Whoever waits or runs hears of it by an event; then nothing is left to wait for.
            let _ = timeout(FLUSH_TIME, app.metrics.ledger.idle()).await;
        }
        // No connection is accepted any more; those that are open finish writing.
        close.send_replace(true);
        let all = permits.acquire_many(connections as u32);
        let _ = timeout(FLUSH_TIME, all).await;
        end.map_err(ServerError::EngineLost)
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

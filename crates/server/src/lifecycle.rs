//! Where the server is between bind and exit. One value, read by probes and handlers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

use crate::serving::Serving;

/// A stage of the server's life.
#[derive(Clone)]
pub enum Phase {
    /// The port is bound, the model is not loaded.
    Loading,
    /// Requests are served.
    Serving(Arc<dyn Serving>),
    /// The end was asked for: unready, but requests are still accepted until routers have noticed.
    Leaving(Arc<dyn Serving>),
    /// New requests are refused, running ones finish.
    Draining,
}

/// The stage, with the loading's progress. Clones share it.
#[derive(Clone)]
pub struct Lifecycle {
    phase: Arc<watch::Sender<Phase>>,
    progress: Arc<(AtomicU64, AtomicU64)>,
    abandoned: Arc<watch::Sender<bool>>,
    lost: Arc<watch::Sender<Option<EngineLost>>>,
}

/// Why nothing is served any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineLost {
    /// In words.
    pub reason: String,
    /// Whether it was the device: the next process may lose it again.
    pub is_device: bool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            phase: Arc::new(watch::Sender::new(Phase::Loading)),
            progress: Arc::default(),
            abandoned: Arc::new(watch::Sender::new(false)),
            lost: Arc::new(watch::Sender::new(None)),
        }
    }
}

impl Lifecycle {
    /// `done` of `total` bytes of the model are read.
    pub fn progress(&self, done: u64, total: u64) {
        self.progress.0.store(done, Ordering::Relaxed);
        self.progress.1.store(total, Ordering::Relaxed);
    }

    /// Bytes of the model that are read, and in all; the second is 0 before that is known.
    pub fn loaded(&self) -> (u64, u64) {
        (self.progress.0.load(Ordering::Relaxed), self.progress.1.load(Ordering::Relaxed))
    }

    /// The model is loaded. Without effect once the end was asked for.
    pub fn ready(&self, serving: Arc<dyn Serving>) {
        self.phase.send_if_modified(|phase| {
            let loading = matches!(phase, Phase::Loading);
            if loading {
                *phase = Phase::Serving(serving);
            }
            loading
        });
    }

    /// The model cannot be loaded: the server ends at once.
    pub fn abandon(&self) {
        self.abandoned.send_replace(true);
    }

    pub(crate) async fn abandoned(&self) {
        // The sender lives as long as this value.
        let _ = self.abandoned.subscribe().wait_for(|abandoned| *abandoned).await;
    }

    /// The engine is lost: what runs fails, and the server ends with an error. Only the first loss counts.
    pub fn lose(&self, loss: EngineLost) {
        self.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            lost.get_or_insert(loss);
            first
        });
    }

    pub(crate) async fn lost(&self) -> EngineLost {
        let mut lost = self.lost.subscribe();
        match lost.wait_for(Option::is_some).await.ok().and_then(|lost| lost.clone()) {
            Some(loss) => loss,
            // The sender lives as long as this value.
            None => std::future::pending().await,
        }
    }

    /// The stage now.
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// The engine, while requests are accepted.
    pub(crate) fn serving(&self) -> Option<Arc<dyn Serving>> {
        match &*self.phase.borrow() {
            Phase::Serving(serving) | Phase::Leaving(serving) => Some(Arc::clone(serving)),
            Phase::Loading | Phase::Draining => None,
        }
    }

    /// Unready from now on. True when requests are still accepted.
    pub(crate) fn leave(&self) -> bool {
        self.phase.send_modify(|phase| {
            *phase = match std::mem::replace(phase, Phase::Draining) {
                Phase::Serving(serving) | Phase::Leaving(serving) => Phase::Leaving(serving),
                Phase::Loading | Phase::Draining => Phase::Draining,
            };
        });
        matches!(&*self.phase.borrow(), Phase::Leaving(_))
    }

    /// Refuses requests from now on; the engine, if there was one.
    pub(crate) fn drain(&self) -> Option<Arc<dyn Serving>> {
        let mut serving = None;
        self.phase.send_modify(|phase| {
            if let Phase::Serving(s) | Phase::Leaving(s) = std::mem::replace(phase, Phase::Draining) {
                serving = Some(s);
            }
        });
        serving
    }
}

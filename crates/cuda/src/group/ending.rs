//! The end of a group: whoever waits is woken, on the host, in a kernel, and in NCCL.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use longhaul_backend::{Collective, CollectiveError, Values, ValuesMut};
use nccl_rs::AbortHandle;

use crate::driver::HostWord;

/// How long another thread's call of NCCL may take to return before a communicator is left to its own deadline.
const PATIENCE: Duration = Duration::from_millis(500);

/// What waits outside the host's collectives.
#[derive(Default)]
pub(super) struct Ending {
    /// Kernels of peer-to-peer exchanges look at it.
    word: Option<Arc<dyn HostWord>>,
    communicators: Mutex<Vec<AbortHandle>>,
}

impl Ending {
    pub(super) fn new(word: Option<Arc<dyn HostWord>>) -> Self {
        Self { word, communicators: Mutex::default() }
    }

    /// Another communicator to abort.
    pub(super) fn add(&self, communicator: AbortHandle) {
        self.communicators.lock().unwrap_or_else(PoisonError::into_inner).push(communicator);
    }

    fn end(&self) {
        if let Some(word) = &self.word {
            word.set(1);
        }
        let communicators =
            std::mem::take(&mut *self.communicators.lock().unwrap_or_else(PoisonError::into_inner));
        for communicator in communicators {
            // One that is stuck ends at its own deadline.
            let _ = communicator.abort(PATIENCE);
        }
    }
}

/// A rank's collective whose end is the end of all that waits. Dropping it in a panic ends the group.
pub(super) struct Member {
    inner: Arc<dyn Collective>,
    ending: Arc<Ending>,
}

impl Member {
    pub(super) fn new(inner: Arc<dyn Collective>, ending: Arc<Ending>) -> Self {
        Self { inner, ending }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.ending.end();
        }
    }
}

impl Collective for Member {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce(&self, values: ValuesMut<'_>) -> Result<(), CollectiveError> {
        self.inner.all_reduce(values)
    }

    fn reduce_scatter(
        &self,
        input: Values<'_>,
        counts: &[usize],
        output: ValuesMut<'_>,
    ) -> Result<(), CollectiveError> {
        self.inner.reduce_scatter(input, counts, output)
    }

    fn all_gather(
        &self,
        input: Values<'_>,
        counts: &[usize],
        output: ValuesMut<'_>,
    ) -> Result<(), CollectiveError> {
        self.inner.all_gather(input, counts, output)
    }

    fn broadcast(&self, root: usize, values: ValuesMut<'_>) -> Result<(), CollectiveError> {
        self.inner.broadcast(root, values)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.inner.barrier()
    }

    fn check(&self) -> Result<(), CollectiveError> {
        self.inner.check()
    }

    fn abort(&self, message: &str) {
        // First the reason, then the end: who is woken asks for it.
        self.inner.abort(message);
        self.ending.end();
    }
}

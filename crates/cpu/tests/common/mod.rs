//! What the tests of groups share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use longhaul_backend::{Collective, CollectiveError, Values, ValuesMut};
use longhaul_collective::Threads;

/// What a rank has done so far.
#[derive(Default)]
pub struct Counts {
    /// All-reduces.
    #[allow(dead_code)]
    pub sums: AtomicUsize,
    /// All-gathers.
    #[allow(dead_code)]
    pub gathers: AtomicUsize,
    /// Bytes of its own parts of them, in words of four.
    #[allow(dead_code)]
    pub gathered_bytes: AtomicUsize,
}

/// A rank whose operations are counted.
pub struct Counted {
    pub group: Threads,
    pub counts: Arc<Counts>,
}

type Result = std::result::Result<(), CollectiveError>;

impl Collective for Counted {
    fn rank(&self) -> usize {
        self.group.rank()
    }
    fn world_size(&self) -> usize {
        self.group.world_size()
    }
    fn all_reduce(&self, values: ValuesMut<'_>) -> Result {
        self.counts.sums.fetch_add(1, Ordering::Relaxed);
        self.group.all_reduce(values)
    }
    fn reduce_scatter(&self, input: Values<'_>, counts: &[usize], output: ValuesMut<'_>) -> Result {
        self.group.reduce_scatter(input, counts, output)
    }
    fn all_gather(&self, input: Values<'_>, counts: &[usize], output: ValuesMut<'_>) -> Result {
        self.counts.gathers.fetch_add(1, Ordering::Relaxed);
        self.counts.gathered_bytes.fetch_add(4 * input.len(), Ordering::Relaxed);
        self.group.all_gather(input, counts, output)
    }
    fn broadcast(&self, root: usize, values: ValuesMut<'_>) -> Result {
        self.group.broadcast(root, values)
    }
    fn barrier(&self) -> Result {
        self.group.barrier()
    }
    fn check(&self) -> Result {
        self.group.check()
    }
    fn abort(&self, message: &str) {
        self.group.abort(message);
    }
}

//! Sums through NCCL, on the device's own stream.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use longhaul_backend::{Collective, CollectiveError};
use nccl_rs::{Communicator, DataType, DeviceAddress, Library, Options, Stream, UniqueId};

use super::ending::Ending;
use crate::driver::{Driver, Element};
use crate::tensor::Tensor;
use crate::{CudaError, Result};

/// For all ranks to join: they have met already, and start at once.
const JOIN_TIMEOUT: Duration = Duration::from_secs(60);

/// The library and the name of a group that is to be.
#[derive(Clone)]
pub struct Nccl {
    library: Library,
    id: UniqueId,
}

impl Nccl {
    /// Loads the library from the first of `folders` that has it, else from where the system finds it.
    ///
    /// # Errors
    /// The library's.
    pub fn load(folders: &[PathBuf]) -> std::result::Result<Self, nccl_rs::Error> {
        let library = Library::load(folders)?;
        let id = library.unique_id()?;
        Ok(Self { library, id })
    }

    /// The name that this rank would give the group; rank 0's counts.
    pub fn id(&self) -> UniqueId {
        self.id
    }
}

/// One rank of a group of NCCL's.
pub struct NcclRank {
    nccl: Nccl,
    communicator: OnceLock<Mutex<Communicator>>,
    ending: OnceLock<Arc<Ending>>,
}

impl NcclRank {
    /// A rank that has not joined yet.
    pub fn new(nccl: Nccl) -> Self {
        Self { nccl, communicator: OnceLock::new(), ending: OnceLock::new() }
    }

    pub(super) fn watched_by(self, ending: &Arc<Ending>) -> Self {
        let _ = self.ending.set(ending.clone());
        self
    }

    /// The name of the group that all ranks of `group` join: rank 0's.
    ///
    /// # Errors
    /// [`CudaError::Collective`].
    pub(super) fn agree(&self, group: &dyn Collective) -> Result<UniqueId> {
        let UniqueId(mut bytes) = self.nccl.id();
        // Whoever knows it can join: it travels where the nodes' authenticated messages do.
        let mut words =
            bytes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word)).collect::<Vec<_>>();
        group.broadcast(0, words.as_mut_slice().into())?;
        bytes.as_chunks_mut::<4>().0.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
        Ok(UniqueId(bytes))
    }

    /// Joins the group `id` as `rank` and waits for the others.
    ///
    /// # Errors
    /// [`CudaError::Collective`].
    pub fn join(&self, driver: &dyn Driver, id: &UniqueId, rank: usize, world_size: usize) -> Result<()> {
        // The device must be current.
        driver.raw_stream()?;
        let options = Options { join_timeout: JOIN_TIMEOUT, ..Options::default() };
        let communicator = Communicator::join(&self.nccl.library, id, rank, world_size, options)
            .map_err(|e| transport("join", &e))?;
        if let Some(ending) = self.ending.get() {
            ending.add(communicator.abort_handle());
        }
        let _ = self.communicator.set(Mutex::new(communicator));
        Ok(())
    }

    fn communicator(&self, op: &'static str) -> Result<MutexGuard<'_, Communicator>> {
        let communicator = self.communicator.get().ok_or_else(|| {
            CudaError::from(CollectiveError::Misuse { op, detail: "the rank has not joined".into() })
        })?;
        Ok(communicator.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Queues the sum of `x` over the ranks, in place, on the stream of `driver`.
    ///
    /// # Errors
    /// [`CudaError::Collective`]; a rank that fails later shows in [`NcclRank::check`].
    pub fn all_reduce(&self, driver: &dyn Driver, x: &Tensor) -> Result<()> {
        const OP: &str = "all_reduce";
        // Devices without a stream work in call order: the default one.
        let stream = Stream(driver.raw_stream()?.unwrap_or(0));
        let data_type = match x.element {
            Element::F32 => DataType::F32,
            Element::Bf16 => DataType::Bf16,
            other => return Err(CudaError::Unsupported(format!("{OP} of {other:?}"))),
        };
        let (address, count) = (DeviceAddress(x.address().0), x.rows * x.stride);
        if count == 0 {
            return Ok(());
        }
        // SAFETY: the tensor has `count` elements in memory of the stream's device; the arena hands them on only to work that
        // is queued behind this on the same stream.
        unsafe { self.communicator(OP)?.all_reduce(address, address, count, data_type, stream) }
            .map_err(|e| transport(OP, &e))
    }

    /// Whether all is well so far.
    ///
    /// # Errors
    /// [`CudaError::Collective`].
    pub fn check(&self) -> Result<()> {
        self.communicator("check")?.check().map_err(|e| transport("check", &e))
    }
}

fn transport(op: &'static str, error: &nccl_rs::Error) -> CudaError {
    CollectiveError::Transport { op, message: error.to_string() }.into()
}

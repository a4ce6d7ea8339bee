use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use crate::ffi::{Config, IN_PROGRESS, RawComm, RawUniqueId, SUCCESS, SUM};
use crate::{DataType, DeviceAddress, Error, Library, Stream, UniqueId};

type Result<T> = std::result::Result<T, Error>;

/// How long a communicator waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// For all ranks to join.
    pub join_timeout: Duration,
    /// For a call to be queued on its stream, which may need a peer the first time two ranks talk.
    pub call_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { join_timeout: Duration::from_secs(600), call_timeout: Duration::from_secs(30) }
    }
}

/// The raw communicator until it is aborted or destroyed. The lock is held for one call at a time, none of which waits.
struct Shared {
    library: Library,
    raw: Mutex<Option<Raw>>,
}

struct Raw(RawComm);

// SAFETY: the library lets any thread call with a communicator, one at a time, which the lock around it sees to.
unsafe impl Send for Raw {}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Raw>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one call.
    fn with<T>(&self, call: &'static str, f: impl FnOnce(RawComm) -> T) -> Result<T> {
        match self.lock().as_ref() {
            Some(raw) => Ok(f(raw.0)),
            None => Err(Error::Aborted { call }),
        }
    }

    fn abort_locked(&self, raw: &mut Option<Raw>) {
        if let Some(raw) = raw.take() {
            // SAFETY: the communicator is live and gone from here on. The result is of no use: nothing is left to do.
            let _ = unsafe { (self.library.functions.comm_abort)(raw.0) };
        }
    }
}

/// Aborts a communicator from any thread.
#[derive(Clone)]
pub struct AbortHandle(Arc<Shared>);

impl AbortHandle {
    /// Aborts: work on the device ends, and calls of the communicator return [`Error::Aborted`]. Without effect the second
    /// time.
    ///
    /// # Errors
    /// [`Error::Stuck`] when a call of another thread does not return from the library within `patience`.
    pub fn abort(&self, patience: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.0.raw.try_lock() {
                Ok(mut raw) => {
                    self.0.abort_locked(&mut raw);
                    return Ok(());
                }
                Err(TryLockError::Poisoned(poisoned)) => {
                    self.0.abort_locked(&mut poisoned.into_inner());
                    return Ok(());
                }
                Err(TryLockError::WouldBlock) if began.elapsed() < patience => {
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(TryLockError::WouldBlock) => return Err(Error::Stuck { after: patience }),
            }
        }
    }
}

/// One rank of a group. Belongs to one thread at a time; its device must be the thread's current one.
///
/// Operations queue work on a stream and return. That work ends, or fails, later: ask [`Communicator::check`] while waiting
/// for the stream. An operation that fails or does not get queued in time aborts the communicator.
pub struct Communicator {
    shared: Arc<Shared>,
    rank: usize,
    world_size: usize,
    options: Options,
    /// Between the start and the end of a group nothing is sent, so there is nothing to wait for.
    in_group: Cell<bool>,
}

impl Communicator {
    /// Joins the group of `id` as `rank` of `world_size`, and waits for all ranks.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::Call`] or [`Error::Timeout`].
    pub fn join(
        library: &Library,
        id: &UniqueId,
        rank: usize,
        world_size: usize,
        options: Options,
    ) -> Result<Self> {
        const CALL: &str = "ncclCommInitRankConfig";
        let out_of_range =
            || Error::Argument { call: CALL, detail: format!("rank {rank} of {world_size} ranks") };
        if rank >= world_size {
            return Err(out_of_range());
        }
        let (ranks, number) = c_int::try_from(world_size)
            .and_then(|n| Ok((n, c_int::try_from(rank)?)))
            .map_err(|_| out_of_range())?;
        let mut config = Config::non_blocking();
        let mut raw: RawComm = std::ptr::null_mut();
        // SAFETY: the pointers are to live locals, and the library copies what it needs of them before it returns.
        let result = unsafe {
            (library.functions.comm_init_rank_config)(&mut raw, ranks, RawUniqueId(id.0), number, &mut config)
        };
        let raw = (!raw.is_null()).then_some(Raw(raw));
        let joined = raw.is_some();
        let communicator = Self {
            shared: Arc::new(Shared { library: library.clone(), raw: Mutex::new(raw) }),
            rank,
            world_size,
            options,
            in_group: Cell::new(false),
        };
        match result {
            SUCCESS | IN_PROGRESS if joined => communicator.settle(CALL, options.join_timeout)?,
            SUCCESS | IN_PROGRESS => {
                let detail = "the library returned no communicator".into();
                return Err(Error::Argument { call: CALL, detail });
            }
            result => return Err(library.error(CALL, result)),
        }
        Ok(communicator)
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks in the group.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// A handle with which another thread can abort.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(self.shared.clone())
    }

    /// Whether all is well so far, with what is queued and what has run.
    ///
    /// # Errors
    /// What went wrong; the communicator has been aborted.
    pub fn check(&self) -> Result<()> {
        match self.state("ncclCommGetAsyncError")? {
            SUCCESS | IN_PROGRESS => Ok(()),
            result => Err(self.fail("ncclCommGetAsyncError", result)),
        }
    }

    fn state(&self, call: &'static str) -> Result<c_int> {
        let mut state = SUCCESS;
        let result = self.shared.with(call, |raw| {
            // SAFETY: the communicator is live while the lock is held, and the pointer is to a live integer.
            unsafe { (self.shared.library.functions.comm_get_async_error)(raw, &mut state) }
        })?;
        Ok(if result == SUCCESS { state } else { result })
    }

    /// Aborts after `result` of `call`.
    fn fail(&self, call: &'static str, result: c_int) -> Error {
        let error = self.shared.library.error(call, result);
        self.shared.abort_locked(&mut self.shared.lock());
        error
    }

    /// Waits until the communicator is no longer busy with `call`.
    fn settle(&self, call: &'static str, timeout: Duration) -> Result<()> {
        let began = Instant::now();
        let mut nap = Duration::from_micros(5);
        loop {
            match self.state(call)? {
                SUCCESS => return Ok(()),
                IN_PROGRESS if began.elapsed() < timeout => {
                    std::thread::sleep(nap);
                    nap = (2 * nap).min(Duration::from_millis(2));
                }
                IN_PROGRESS => {
                    self.shared.abort_locked(&mut self.shared.lock());
                    return Err(Error::Timeout { call, after: timeout });
                }
                result => return Err(self.fail(call, result)),
            }
        }
    }

    /// Makes one call and waits until it is queued.
    fn submit(&self, call: &'static str, f: impl FnOnce(RawComm) -> c_int) -> Result<()> {
        match self.shared.with(call, f)? {
            SUCCESS => Ok(()),
            IN_PROGRESS if self.in_group.get() => Ok(()),
            IN_PROGRESS => self.settle(call, self.options.call_timeout),
            result => Err(self.fail(call, result)),
        }
    }

    fn peer(&self, call: &'static str, what: &str, rank: usize) -> Result<c_int> {
        c_int::try_from(rank).ok().filter(|_| rank < self.world_size).ok_or_else(|| Error::Argument {
            call,
            detail: format!("{what} {rank} in a group of {}", self.world_size),
        })
    }

    /// Sum over all ranks of `count` elements at `from`, to `to` (which may be `from`).
    ///
    /// # Errors
    /// Those of every operation: [`Error::Call`], [`Error::Timeout`], [`Error::Aborted`].
    ///
    /// # Safety
    /// `from` and `to` hold `count` elements in memory of this rank's device, and stay until the work queued on `stream` has
    /// run; `stream` is a stream of that device.
    pub unsafe fn all_reduce(
        &self,
        from: DeviceAddress,
        to: DeviceAddress,
        count: usize,
        data_type: DataType,
        stream: Stream,
    ) -> Result<()> {
        self.submit("ncclAllReduce", |raw| {
            // SAFETY: the communicator is live while the lock is held; the rest is the caller's promise.
            unsafe {
                (self.shared.library.functions.all_reduce)(
                    pointer(from),
                    pointer(to),
                    count,
                    data_type as c_int,
                    SUM,
                    raw,
                    handle(stream),
                )
            }
        })
    }

    /// Sum over all ranks of `world_size * count` elements at `from`, of which this rank gets its `count` at `to`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    ///
    /// # Safety
    /// As [`Communicator::all_reduce`], with these counts.
    pub unsafe fn reduce_scatter(
        &self,
        from: DeviceAddress,
        to: DeviceAddress,
        count: usize,
        data_type: DataType,
        stream: Stream,
    ) -> Result<()> {
        self.submit("ncclReduceScatter", |raw| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                (self.shared.library.functions.reduce_scatter)(
                    pointer(from),
                    pointer(to),
                    count,
                    data_type as c_int,
                    SUM,
                    raw,
                    handle(stream),
                )
            }
        })
    }

    /// All ranks' `count` elements at `from`, one rank after the other at `to`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    ///
    /// # Safety
    /// As [`Communicator::all_reduce`], with `world_size * count` elements at `to`.
    pub unsafe fn all_gather(
        &self,
        from: DeviceAddress,
        to: DeviceAddress,
        count: usize,
        data_type: DataType,
        stream: Stream,
    ) -> Result<()> {
        self.submit("ncclAllGather", |raw| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                (self.shared.library.functions.all_gather)(
                    pointer(from),
                    pointer(to),
                    count,
                    data_type as c_int,
                    raw,
                    handle(stream),
                )
            }
        })
    }

    /// Copies `count` elements at `from` of rank `root` to `to` of every rank.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`], and [`Error::Argument`].
    ///
    /// # Safety
    /// As [`Communicator::all_reduce`]; only the root's `from` is read.
    pub unsafe fn broadcast(
        &self,
        root: usize,
        from: DeviceAddress,
        to: DeviceAddress,
        count: usize,
        data_type: DataType,
        stream: Stream,
    ) -> Result<()> {
        const CALL: &str = "ncclBroadcast";
        let root = self.peer(CALL, "root", root)?;
        self.submit(CALL, |raw| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                (self.shared.library.functions.broadcast)(
                    pointer(from),
                    pointer(to),
                    count,
                    data_type as c_int,
                    root,
                    raw,
                    handle(stream),
                )
            }
        })
    }

    /// Sends `count` elements at `from` to rank `peer`, which must receive as many.
    ///
    /// # Errors
    /// As [`Communicator::broadcast`].
    ///
    /// # Safety
    /// As [`Communicator::all_reduce`].
    pub unsafe fn send(
        &self,
        peer: usize,
        from: DeviceAddress,
        count: usize,
        data_type: DataType,
        stream: Stream,
    ) -> Result<()> {
        const CALL: &str = "ncclSend";
        let peer = self.peer(CALL, "peer", peer)?;
        self.submit(CALL, |raw| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                (self.shared.library.functions.send)(
                    pointer(from),
                    count,
                    data_type as c_int,
                    peer,
                    raw,
                    handle(stream),
                )
            }
        })
    }

    /// Receives `count` elements from rank `peer` at `to`.
    ///
    /// # Errors
    /// As [`Communicator::broadcast`].
    ///
    /// # Safety
    /// As [`Communicator::all_reduce`].
    pub unsafe fn receive(
        &self,
        peer: usize,
        to: DeviceAddress,
        count: usize,
        data_type: DataType,
        stream: Stream,
    ) -> Result<()> {
        const CALL: &str = "ncclRecv";
        let peer = self.peer(CALL, "peer", peer)?;
        self.submit(CALL, |raw| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                (self.shared.library.functions.recv)(
                    pointer(to),
                    count,
                    data_type as c_int,
                    peer,
                    raw,
                    handle(stream),
                )
            }
        })
    }

    /// Starts a group: the operations until [`Group::end`] are sent together. What exchanges messages in both directions
    /// must be one.
    ///
    /// # Errors
    /// [`Error::Call`], and [`Error::Argument`] inside another group.
    pub fn group(&self) -> Result<Group<'_>> {
        const CALL: &str = "ncclGroupStart";
        if self.in_group.get() {
            return Err(Error::Argument { call: CALL, detail: "a group has been started already".into() });
        }
        self.shared.with(CALL, |_| ())?;
        // SAFETY: may be called at any time.
        match unsafe { (self.shared.library.functions.group_start)() } {
            SUCCESS => {}
            result => return Err(self.fail(CALL, result)),
        }
        self.in_group.set(true);
        Ok(Group { communicator: self, open: true, thread: PhantomData })
    }

    /// Leaves the group in order: waits for what is queued, on all ranks.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`]; the communicator is gone in any case.
    pub fn close(self) -> Result<()> {
        self.submit("ncclCommFinalize", |raw| {
            // SAFETY: the communicator is live while the lock is held.
            unsafe { (self.shared.library.functions.comm_finalize)(raw) }
        })?;
        let Some(raw) = self.shared.lock().take() else {
            return Err(Error::Aborted { call: "ncclCommDestroy" });
        };
        // SAFETY: the communicator is live, finalised, and gone from here on.
        match unsafe { (self.shared.library.functions.comm_destroy)(raw.0) } {
            SUCCESS => Ok(()),
            result => Err(self.shared.library.error("ncclCommDestroy", result)),
        }
    }
}

impl Drop for Communicator {
    /// Aborts what was not closed: destroying would wait for peers, which may be dead.
    fn drop(&mut self) {
        self.shared.abort_locked(&mut self.shared.lock());
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicator(rank {} of {})", self.rank, self.world_size)
    }
}

/// Operations that are sent together. Dropped without [`Group::end`], they are sent and their result is not looked at.
#[must_use = "operations are sent when the group ends"]
pub struct Group<'a> {
    communicator: &'a Communicator,
    open: bool,
    /// The library counts groups by thread.
    thread: PhantomData<*mut c_void>,
}

impl Group<'_> {
    /// Sends the operations and waits until they are queued.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    pub fn end(mut self) -> Result<()> {
        const CALL: &str = "ncclGroupEnd";
        let result = self.leave();
        match result {
            SUCCESS => Ok(()),
            IN_PROGRESS => self.communicator.settle(CALL, self.communicator.options.call_timeout),
            result => Err(self.communicator.fail(CALL, result)),
        }
    }

    fn leave(&mut self) -> c_int {
        self.open = false;
        self.communicator.in_group.set(false);
        // Keeps an abort from freeing what the call looks at.
        let raw = self.communicator.shared.lock();
        // SAFETY: this thread started the group.
        let result = unsafe { (self.communicator.shared.library.functions.group_end)() };
        drop(raw);
        result
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        if self.open {
            self.leave();
        }
    }
}

fn pointer(address: DeviceAddress) -> *mut c_void {
    address.0 as usize as *mut c_void
}

fn handle(stream: Stream) -> *mut c_void {
    stream.0 as *mut c_void
}

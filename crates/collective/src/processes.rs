use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use longhaul_backend::{Collective, CollectiveError, Values, ValuesMut};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, set_parent_process_death_signal};

use crate::group::{Group, JOINED, Options, Peers};
use crate::layout::{
    CONTROL_PROCESS, CONTROL_STATE, Layout, MAGIC, MAX_WORLD_SIZE, WORD_MAGIC, WORD_SLOT, WORD_WORLD,
};
use crate::mapping::Mapping;

/// The group's memory could not be made or joined.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The system refused.
    #[error("shared memory of {path}: {source}")]
    System {
        /// The memory's path, or what it is for.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The memory is not that of this group.
    #[error("shared memory of {path}: {field} is {found}, expected {expected}")]
    Mismatch {
        /// The memory's path.
        path: String,
        /// What differs.
        field: &'static str,
        /// What the memory says.
        found: String,
        /// What this rank was told.
        expected: String,
    },
    /// Another process has this rank.
    #[error("rank {rank} is taken by process {process}; start every rank once")]
    Taken {
        /// The rank.
        rank: usize,
        /// The process that has it.
        process: u32,
    },
    /// The group ended before it was complete.
    #[error(transparent)]
    Group(#[from] CollectiveError),
}

/// The memory of a group of processes: anonymous, so that it is gone with the last process that has it, however they end.
/// Whoever made it keeps it until all ranks have attached.
pub struct Segment {
    file: File,
}

impl Segment {
    /// Memory for `world_size` (1 to 64) ranks.
    ///
    /// # Errors
    /// A world size out of range, or the system's.
    pub fn create(world_size: usize, options: Options) -> Result<Self, SegmentError> {
        if !(1..=MAX_WORLD_SIZE).contains(&world_size) {
            let detail = format!("a group of {world_size} ranks; 1 to {MAX_WORLD_SIZE} are possible");
            return Err(CollectiveError::Misuse { op: "join", detail }.into());
        }
        let layout = options.layout(world_size);
        let make = || -> io::Result<File> {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = File::from(memfd_create("longhaul-collective", flags)?);
            file.set_len(layout.words() as u64 * 4)?;
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            let mapping = Mapping::new(&file)?;
            let words = mapping.as_ref();
            words[WORD_WORLD].store(world_size as u32, Ordering::Relaxed);
            words[WORD_SLOT].store(layout.slot as u32, Ordering::Relaxed);
            words[WORD_MAGIC].store(MAGIC, Ordering::Release);
            Ok(file)
        };
        let file = make().map_err(|source| SegmentError::System {
            path: format!("a group of {world_size} ({} bytes)", layout.words() * 4),
            source,
        })?;
        Ok(Self { file })
    }

    /// Where processes of the same user attach to it, for as long as `self` lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }
}

/// The other processes, watched through their pidfds: an end shows at once, also of a process nobody has waited for.
struct Watch(Vec<Option<OwnedFd>>);

impl Peers for Watch {
    fn ended(&self, rank: usize) -> Option<String> {
        let process = self.0.get(rank)?.as_ref()?;
        let mut polled = [PollFd::new(process, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut polled, Some(&now)), Ok(1..)).then(|| "its process ended".into())
    }
}

/// A rank that is a process of this machine. Dropping it leaves the group.
pub struct Processes(Group<Mapping, Watch>);

impl Processes {
    /// Joins the group of `world_size` at `path` ([`Segment::path`]) as `rank` and waits, `timeout` at the longest, until
    /// all ranks have. `timeout` is also that of later calls.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn attach(
        path: &Path,
        rank: usize,
        world_size: usize,
        timeout: Duration,
    ) -> Result<Self, SegmentError> {
        let name = path.display().to_string();
        let system = |source: io::Error| SegmentError::System { path: name.clone(), source };
        let mismatch = |field, found: String, expected: String| {
            Err(SegmentError::Mismatch { path: name.clone(), field, found, expected })
        };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(system)?;
        let mapping = Mapping::new(&file).map_err(system)?;
        let words = mapping.as_ref();
        let header = |word: usize| words.get(word).map_or(0, |word| word.load(Ordering::Acquire));
        if header(WORD_MAGIC) != MAGIC {
            return mismatch("layout", format!("{:#x}", header(WORD_MAGIC)), format!("{MAGIC:#x}"));
        }
        if header(WORD_WORLD) as usize != world_size {
            return mismatch("world size", header(WORD_WORLD).to_string(), world_size.to_string());
        }
        let layout = Layout { world_size, slot: header(WORD_SLOT) as usize };
        if words.len() < layout.words() {
            return mismatch("length", (words.len() * 4).to_string(), (layout.words() * 4).to_string());
        }
        if rank >= world_size {
            return mismatch("world size", world_size.to_string(), format!("more than rank {rank}"));
        }
        let process = &words[layout.control(rank) + CONTROL_PROCESS];
        if let Err(process) =
            process.compare_exchange(0, std::process::id(), Ordering::AcqRel, Ordering::Acquire)
        {
            return Err(SegmentError::Taken { rank, process });
        }
        words[layout.control(rank) + CONTROL_STATE].store(JOINED, Ordering::SeqCst);
        let peers = join(words, layout, rank, timeout)?;
        Ok(Processes(Group::new(mapping, layout, rank, timeout, Watch(peers))))
    }
}

/// Waits for all ranks and opens their pidfds.
fn join(
    words: &[AtomicU32],
    layout: Layout,
    rank: usize,
    timeout: Duration,
) -> Result<Vec<Option<OwnedFd>>, CollectiveError> {
    let deadline = Instant::now() + timeout;
    let mut peers: Vec<Option<OwnedFd>> = (0..layout.world_size).map(|_| None).collect();
    for (peer, watched) in peers.iter_mut().enumerate().filter(|(peer, _)| *peer != rank) {
        let process = loop {
            if let Some(error) = crate::failure::recorded(words) {
                return Err(error);
            }
            match words[layout.control(peer) + CONTROL_PROCESS].load(Ordering::Acquire) {
                0 if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                0 => {
                    let missing = (0..layout.world_size)
                        .filter(|r| words[layout.control(*r) + CONTROL_PROCESS].load(Ordering::Acquire) == 0)
                        .collect();
                    let error = CollectiveError::Timeout { op: "join", missing, after: timeout };
                    crate::failure::record(words, &error);
                    return Err(crate::failure::recorded(words).unwrap_or(error));
                }
                process => break process,
            }
        };
        let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
        match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Some(Ok(fd)) => *watched = Some(fd),
            Some(Err(rustix::io::Errno::SRCH)) | None => {
                let error = CollectiveError::RankFailed { rank: peer, message: "its process ended".into() };
                crate::failure::record(words, &error);
                return Err(crate::failure::recorded(words).unwrap_or(error));
            }
            Some(Err(error)) => {
                return Err(CollectiveError::Transport {
                    op: "join",
                    message: format!("pidfd_open: {error}"),
                });
            }
        }
    }
    Ok(peers)
}

/// Ends this process (SIGKILL, which ends a stopped process too) when the thread of process `parent` that started it ends:
/// no rank outlives its leader. To be called first thing.
///
/// # Errors
/// The parent has ended already, or the system's.
pub fn end_with_parent(parent: u32) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid().map(|pid| pid.as_raw_nonzero().get().cast_unsigned()) == Some(parent) {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("process {parent}, which started this one, has ended"),
        ))
    }
}

crate::operations::delegate!(Processes);

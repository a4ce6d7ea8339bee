//! Positioned reads from a file, or borrowed reads from bytes in the program; both know their size.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::path::Path;

use crate::{Result, WeightsError};

/// Bytes that tensors lie in.
#[derive(Debug)]
pub(crate) enum Storage {
    /// An open file and its size when it was opened.
    File { file: PositionedFile, origin: String, len: u64 },
    /// Bytes of the program itself.
    Bytes { bytes: &'static [u8], origin: String },
}

impl Storage {
    /// Opens a regular file (through symbolic links: the hub cache is made of them).
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let fail = |action, source| WeightsError::Io { path: path.to_owned(), action, source };
        // Asked before opening: opening a FIFO would wait for a writer.
        if !std::fs::metadata(path).map_err(|e| fail("open", e))?.is_file() {
            return Err(fail("open", io::Error::other("not a regular file")));
        }
        let file = File::open(path).map_err(|e| fail("open", e))?;
        let len = file.metadata().map_err(|e| fail("read the size", e))?.len();
        Ok(Storage::File { file: PositionedFile::new(file), origin: path.display().to_string(), len })
    }

    /// Path or given origin, for messages.
    pub(crate) fn origin(&self) -> &str {
        match self {
            Storage::File { origin, .. } | Storage::Bytes { origin, .. } => origin,
        }
    }

    /// Size in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Storage::File { len, .. } => *len,
            Storage::Bytes { bytes, .. } => bytes.len() as u64,
        }
    }

    /// Fills `buffer` from `offset`.
    pub(crate) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Storage::File { file, .. } => file.read_exact_at(buffer, offset),
            Storage::Bytes { bytes, .. } => {
                let part = part_of(bytes, offset, buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
                buffer.copy_from_slice(part);
                Ok(())
            }
        }
    }

    /// `len` bytes from `offset` without copying, where the storage allows it.
    pub(crate) fn borrow_at(&self, offset: u64, len: usize) -> Option<Cow<'static, [u8]>> {
        match self {
            Storage::File { .. } => None,
            Storage::Bytes { bytes, .. } => part_of(bytes, offset, len).map(Cow::Borrowed),
        }
    }
}

fn part_of(bytes: &'static [u8], offset: u64, len: usize) -> Option<&'static [u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(len)?)
}

/// A file read by offset from several threads at once.
#[derive(Debug)]
pub(crate) struct PositionedFile {
    #[cfg(unix)]
    file: File,
    // Without pread the position is shared state, so reads take turns.
    #[cfg(not(unix))]
    file: std::sync::Mutex<File>,
}

impl PositionedFile {
    #[cfg(unix)]
    fn new(file: File) -> Self {
        Self { file }
    }

    #[cfg(unix)]
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, buffer, offset)
    }

    #[cfg(not(unix))]
    fn new(file: File) -> Self {
        Self { file: std::sync::Mutex::new(file) }
    }

    #[cfg(not(unix))]
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        use std::io::{Read as _, Seek as _};
        // A poisoned lock only means that another reader panicked; the position is set anew below.
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.seek(io::SeekFrom::Start(offset))?;
        file.read_exact(buffer)
    }
}

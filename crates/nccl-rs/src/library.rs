use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::ffi::{Functions, LoadError, RawUniqueId, SUCCESS, UNIQUE_ID_BYTES};
use crate::{Error, ResultCode};

/// The environment variable that names folders with CUDA libraries, separated by colons.
pub const LIBRARIES_VARIABLE: &str = "LONGHAUL_CUDA_LIBRARIES";

/// Folders named in [`LIBRARIES_VARIABLE`].
pub fn library_folders() -> Vec<PathBuf> {
    std::env::var_os(LIBRARIES_VARIABLE)
        .map(|folders| std::env::split_paths(&folders).filter(|f| !f.as_os_str().is_empty()).collect())
        .unwrap_or_default()
}

/// A release of NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// As 2 in 2.32.3.
    pub major: u32,
    /// As 32 in 2.32.3.
    pub minor: u32,
    /// As 3 in 2.32.3.
    pub patch: u32,
}

impl Version {
    /// The oldest release this crate works with.
    pub const OLDEST: Version = Version { major: 2, minor: 18, patch: 0 };

    /// From `NCCL_VERSION_CODE`.
    fn from_code(code: c_int) -> Self {
        let code = code.unsigned_abs();
        // Up to 2.8 the code had one digit less for the minor number.
        let major = if code < 10000 { 1000 } else { 10000 };
        Version { major: code / major, minor: code % major / 100, patch: code % 100 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What the ranks of a new group have in common: made by one of them, carried to the others by other means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId(pub [u8; UNIQUE_ID_BYTES]);

impl fmt::Debug for UniqueId {
    /// Without its bytes: whoever knows them can join.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(..)")
    }
}

/// The loaded library. Cloning shares it.
#[derive(Clone)]
pub struct Library {
    pub(crate) functions: Arc<Functions>,
    path: PathBuf,
    version: Version,
}

impl Library {
    /// Loads NCCL from the first of `folders` that has it, else from where the system's loader finds it.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Symbol`] or [`Error::TooOld`].
    pub fn load(folders: &[PathBuf]) -> Result<Self, Error> {
        // The wheels and the runtime packages ship only the name with the number.
        const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
        let candidates = folders
            .iter()
            .flat_map(|folder| NAMES.map(|name| folder.join(name)))
            .chain(NAMES.map(PathBuf::from));
        let mut attempts = Vec::new();
        for path in candidates {
            match Functions::load(&path) {
                Ok(functions) => return Self::new(functions, &path),
                Err(LoadError::Lacks(error)) => return Err(error),
                Err(LoadError::Open(reason)) => attempts.push((path.display().to_string(), reason)),
            }
        }
        Err(Error::NotFound { attempts })
    }

    fn new(functions: Functions, path: &Path) -> Result<Self, Error> {
        let mut code = 0;
        // SAFETY: the pointer is to a live integer.
        let result = unsafe { (functions.get_version)(&mut code) };
        let library =
            Self { functions: Arc::new(functions), path: path.into(), version: Version::from_code(code) };
        if result != SUCCESS {
            return Err(library.error("ncclGetVersion", result));
        }
        if library.version < Version::OLDEST {
            return Err(Error::TooOld { library: path.display().to_string(), found: library.version });
        }
        Ok(library)
    }

    /// Its release.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What was loaded: a path, or a name that the system's loader resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new unique id; the calling process must live until the group stands, since the others connect to it.
    ///
    /// # Errors
    /// [`Error::Call`], for example without a network interface.
    pub fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut id = RawUniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: the pointer is to a live id.
        match unsafe { (self.functions.get_unique_id)(&mut id) } {
            SUCCESS => Ok(UniqueId(id.0)),
            result => Err(self.error("ncclGetUniqueId", result)),
        }
    }

    /// The error for `result` of `call`, in NCCL's words.
    pub(crate) fn error(&self, call: &'static str, result: c_int) -> Error {
        // SAFETY: any number is a fitting argument.
        let message = text(unsafe { (self.functions.get_error_string)(result) });
        // SAFETY: the argument is unused (nccl.h); the text is the library's own.
        let detail = text(unsafe { (self.functions.get_last_error)(std::ptr::null_mut()) });
        Error::Call { call, code: ResultCode::new(result), message, detail: detail.trim().into() }
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Library({}, {})", self.path.display(), self.version)
    }
}

fn text(words: *const c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: the library's texts end with a zero and are valid until its next call on this thread.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_codes() {
        assert_eq!(Version::from_code(23203).to_string(), "2.32.3");
        assert_eq!(Version::from_code(2804).to_string(), "2.8.4");
        assert!(Version::from_code(21703) < Version::OLDEST);
    }

    #[test]
    fn a_library_that_is_not_there_is_an_error_with_a_remedy() {
        let folder = PathBuf::from("/nonexistent/cuda");
        match Library::load(std::slice::from_ref(&folder)) {
            Err(error @ Error::NotFound { .. }) => {
                let message = error.to_string();
                for words in ["libnccl.so.2", "/nonexistent/cuda/libnccl.so", LIBRARIES_VARIABLE, "install"] {
                    assert!(message.contains(words), "{message}");
                }
            }
            // A machine that has it.
            Ok(library) => assert!(library.version() >= Version::OLDEST),
            Err(other) => panic!("{other}"),
        }
    }
}

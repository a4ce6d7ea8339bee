//! The C interface: nccl.h of NCCL 2.18 to 2.32, as far as it is called.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::Path;

use crate::Error;

/// Bytes of a unique id (`NCCL_UNIQUE_ID_BYTES`).
pub const UNIQUE_ID_BYTES: usize = 128;

pub const SUCCESS: c_int = 0;
pub const IN_PROGRESS: c_int = 7;
pub const SUM: c_int = 0;

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct RawUniqueId(pub [u8; UNIQUE_ID_BYTES]);

/// `ncclComm_t`: a pointer that only the library looks behind.
pub type RawComm = *mut c_void;

/// `NCCL_CONFIG_UNDEF_INT`: the library's default.
const UNDEFINED: c_int = c_int::MIN;

/// The head of `ncclConfig_t`, which only ever grows at its end: the library takes `size` bytes of it and its defaults for
/// the rest.
#[repr(C)]
pub struct Config {
    pub size: usize,
    pub magic: c_uint,
    pub version: c_uint,
    pub blocking: c_int,
    pub cga_cluster_size: c_int,
    pub min_ctas: c_int,
    pub max_ctas: c_int,
    pub net_name: *const c_char,
    pub split_share: c_int,
    /// Newer than the version below, where these bytes are padding.
    pub traffic_class: c_int,
}

impl Config {
    const MAGIC: c_uint = 0xcafe_beef;
    /// 2.18.0: the first release with all members up to `split_share`.
    const VERSION: c_uint = 21800;

    /// Non-blocking, all else the library's default.
    pub fn non_blocking() -> Self {
        Self {
            size: size_of::<Config>(),
            magic: Self::MAGIC,
            version: Self::VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of a loaded library, valid for as long as `_library` is.
        pub struct Functions {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            _library: libloading::Library,
        }

        impl Functions {
            /// Loads `file` and looks up every function.
            pub fn load(file: &Path) -> Result<Self, LoadError> {
                // SAFETY: loading runs the library's initialisers; that of NCCL has no demands on the caller, and the
                // folders it is loaded from are the user's choice.
                let library = unsafe { libloading::Library::new(file) }
                    .map_err(|e| LoadError::Open(e.to_string()))?;
                $(
                    // SAFETY: the type is that of nccl.h, which has not changed since 2.18.
                    let $field = *unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol.as_bytes())
                    }
                    .map_err(|_| LoadError::Lacks(Error::Symbol {
                        library: file.display().to_string(),
                        symbol: $symbol.into(),
                    }))?;
                )*
                Ok(Self { $($field,)* _library: library })
            }
        }
    };
}

/// Why a file is not the library.
pub enum LoadError {
    /// The loader's reason.
    Open(String),
    /// It is loadable but lacks a function.
    Lacks(Error),
}

functions! {
    get_version = "ncclGetVersion": fn(*mut c_int) -> c_int;
    get_unique_id = "ncclGetUniqueId": fn(*mut RawUniqueId) -> c_int;
    get_error_string = "ncclGetErrorString": fn(c_int) -> *const c_char;
    get_last_error = "ncclGetLastError": fn(RawComm) -> *const c_char;
    comm_init_rank_config = "ncclCommInitRankConfig":
        fn(*mut RawComm, c_int, RawUniqueId, c_int, *mut Config) -> c_int;
    comm_get_async_error = "ncclCommGetAsyncError": fn(RawComm, *mut c_int) -> c_int;
    comm_finalize = "ncclCommFinalize": fn(RawComm) -> c_int;
    comm_destroy = "ncclCommDestroy": fn(RawComm) -> c_int;
    comm_abort = "ncclCommAbort": fn(RawComm) -> c_int;
    all_reduce = "ncclAllReduce":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
    reduce_scatter = "ncclReduceScatter":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
    all_gather = "ncclAllGather":
        fn(*const c_void, *mut c_void, usize, c_int, RawComm, *mut c_void) -> c_int;
    broadcast = "ncclBroadcast":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
    recv = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
    group_start = "ncclGroupStart": fn() -> c_int;
    group_end = "ncclGroupEnd": fn() -> c_int;
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// Offsets that a C compiler gives the members in nccl.h of 2.32.3.
    #[test]
    fn the_config_lies_as_in_the_header() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(offset_of!(Config, magic), 8);
        assert_eq!(offset_of!(Config, version), 12);
        assert_eq!(offset_of!(Config, blocking), 16);
        assert_eq!(offset_of!(Config, max_ctas), 28);
        assert_eq!(offset_of!(Config, net_name), 32);
        assert_eq!(offset_of!(Config, split_share), 40);
        assert_eq!(offset_of!(Config, traffic_class), 44);
    }
}

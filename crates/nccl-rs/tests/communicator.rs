//! The binding against a library with NCCL's interface (`fake_nccl.c`), and against a real one where
//! `LONGHAUL_NCCL_LIBRARY` names its folder.

use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use nccl_rs::{
    Communicator, DataType, DeviceAddress, Error, Library, Options, ResultCode, Stream, UniqueId, Version,
};
use tempfile::TempDir;

/// The compiled fake library, once for all tests.
fn compiled() -> &'static Path {
    static LIBRARY: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    &LIBRARY
        .get_or_init(|| {
            let folder = TempDir::new().unwrap();
            let file = folder.path().join("libfake.so");
            let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nccl.c");
            let status = Command::new(compiler)
                .args(["-std=c11", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
                .args([&file, &source])
                .status()
                .expect("a C compiler is needed for this test");
            assert!(status.success());
            (folder, file)
        })
        .1
}

/// A copy of the fake library with its own state.
struct Fake {
    folder: TempDir,
    /// The same copy, for the variables.
    symbols: libloading::Library,
}

impl Fake {
    fn new(name: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join(name);
        std::fs::copy(compiled(), &file).unwrap();
        // SAFETY: our own library, without initialisers.
        let symbols = unsafe { libloading::Library::new(&file) }.unwrap();
        Self { folder, symbols }
    }

    fn load(&self) -> Result<Library, Error> {
        Library::load(&[self.folder.path().into()])
    }

    fn set(&self, variable: &str, value: c_int) {
        // SAFETY: the variable is an int of the library, and no call of it runs now.
        unsafe { **self.symbols.get::<*mut c_int>(variable.as_bytes()).unwrap() = value };
    }

    fn log(&self) -> String {
        // SAFETY: the variable is a zero-terminated array of the library, and no call of it runs now.
        unsafe { CStr::from_ptr(*self.symbols.get::<*const c_char>(b"fake_log").unwrap()) }
            .to_string_lossy()
            .into_owned()
    }
}

fn options(milliseconds: u64) -> Options {
    let timeout = Duration::from_millis(milliseconds);
    Options { join_timeout: timeout, call_timeout: timeout }
}

fn join(library: &Library, options: Options) -> Result<Communicator, Error> {
    Communicator::join(library, &library.unique_id().unwrap(), 0, 1, options)
}

fn address<T>(values: &mut [T]) -> DeviceAddress {
    DeviceAddress(values.as_mut_ptr() as u64)
}

fn sum(communicator: &Communicator, values: &mut [f32]) -> Result<(), Error> {
    let at = address(values);
    // SAFETY: device memory of the fake library is host memory, and the values outlive the call, which waits.
    unsafe { communicator.all_reduce(at, at, values.len(), DataType::F32, Stream(0)) }
}

#[test]
fn both_names_of_the_library_are_found() {
    for name in ["libnccl.so.2", "libnccl.so"] {
        let fake = Fake::new(name);
        let library = fake.load().unwrap();
        assert_eq!(library.version(), Version { major: 2, minor: 32, patch: 3 });
        assert_eq!(library.path(), fake.folder.path().join(name));
    }
}

#[test]
fn an_old_library_is_refused() {
    let fake = Fake::new("libnccl.so.2");
    fake.set("fake_version", 21400);
    let error = fake.load().unwrap_err();
    assert!(error.to_string().contains("is NCCL 2.14.0; 2.18.0 or newer is needed"), "{error}");
}

#[test]
fn a_library_that_is_something_else_is_named() {
    let folder = TempDir::new().unwrap();
    let (source, file) = (folder.path().join("empty.c"), folder.path().join("libnccl.so.2"));
    std::fs::write(&source, "int empty;").unwrap();
    assert!(Command::new("cc").args(["-shared", "-o"]).args([&file, &source]).status().unwrap().success());
    let error = Library::load(&[folder.path().into()]).unwrap_err();
    assert!(matches!(&error, Error::Symbol { symbol, .. } if symbol == "ncclGetVersion"), "{error}");
}

#[test]
fn every_operation_on_a_group_of_one() {
    // As fast as can be, and with some polls for each call.
    for busy in [0, 3] {
        let fake = Fake::new("libnccl.so.2");
        fake.set("fake_busy", busy);
        let library = fake.load().unwrap();
        let communicator = join(&library, options(60_000)).unwrap();
        assert_eq!((communicator.rank(), communicator.world_size()), (0, 1));
        let (mut from, mut to) = ([1u32, 2, 3, 4], [0u32; 4]);
        let (a, b, stream) = (address(&mut from), address(&mut to), Stream(7));
        let mut expect = |call: &str, result: Result<(), Error>| {
            result.unwrap_or_else(|e| panic!("{call}: {e}"));
            assert_eq!(to, [1, 2, 3, 4], "{call}");
            to = [0; 4];
        };
        // SAFETY: device memory of the fake library is host memory.
        unsafe {
            expect("all_reduce", communicator.all_reduce(a, b, 4, DataType::F32, stream));
            expect("reduce_scatter", communicator.reduce_scatter(a, b, 8, DataType::Bf16, stream));
            expect("all_gather", communicator.all_gather(a, b, 8, DataType::F16, stream));
            expect("broadcast", communicator.broadcast(0, a, b, 4, DataType::I32, stream));
            let group = communicator.group().unwrap();
            communicator.send(0, a, 4, DataType::I32, stream).unwrap();
            communicator.receive(0, b, 4, DataType::I32, stream).unwrap();
            assert!(matches!(communicator.group(), Err(Error::Argument { .. })));
            expect("send and receive", group.end());
        }
        communicator.check().unwrap();
        communicator.close().unwrap();
        assert_eq!(
            fake.log(),
            "init;all_reduce 4 7 0 7;reduce_scatter 8 9 0 7;all_gather 8 6 0 7;broadcast 4 2 0 7;\
             group_start;send 4 2 0 7;recv 4 2 0 7;group_end;finalize;destroy;"
        );
    }
}

#[test]
fn an_error_that_shows_later_aborts() {
    let fake = Fake::new("libnccl.so.2");
    let communicator = join(&fake.load().unwrap(), options(60_000)).unwrap();
    fake.set("fake_async_failure", 6);
    let error = sum(&communicator, &mut [1.0]).unwrap_err();
    assert_eq!(
        error,
        Error::Call {
            call: "ncclAllReduce",
            code: ResultCode::Remote,
            message: "remote process exited".into(),
            detail: "peer 1 closed the connection".into(),
        }
    );
    assert_eq!(error.to_string(), "ncclAllReduce: remote process exited; peer 1 closed the connection");
    assert_eq!(sum(&communicator, &mut [1.0]), Err(Error::Aborted { call: "ncclAllReduce" }));
    assert_eq!(communicator.check(), Err(Error::Aborted { call: "ncclCommGetAsyncError" }));
    drop(communicator);
    assert_eq!(fake.log(), "init;all_reduce 1 7 0 0;abort;", "aborted once, never destroyed");
}

#[test]
fn an_error_that_shows_at_once_aborts() {
    let fake = Fake::new("libnccl.so.2");
    let communicator = join(&fake.load().unwrap(), options(60_000)).unwrap();
    fake.set("fake_result", 1);
    let error = sum(&communicator, &mut [1.0]).unwrap_err();
    assert!(matches!(error, Error::Call { code: ResultCode::UnhandledCuda, .. }), "{error}");
    assert!(fake.log().ends_with("abort;"));
}

#[test]
fn a_call_that_hangs_ends_at_the_deadline() {
    let fake = Fake::new("libnccl.so.2");
    let communicator = join(&fake.load().unwrap(), options(50)).unwrap();
    fake.set("fake_busy", -1);
    let error = sum(&communicator, &mut [1.0]).unwrap_err();
    assert_eq!(error, Error::Timeout { call: "ncclAllReduce", after: Duration::from_millis(50) });
    assert!(fake.log().ends_with("abort;"));
}

#[test]
fn a_group_that_does_not_come_together_ends_at_the_deadline() {
    let fake = Fake::new("libnccl.so.2");
    fake.set("fake_busy", -1);
    let error = join(&fake.load().unwrap(), options(50)).unwrap_err();
    assert!(matches!(error, Error::Timeout { call: "ncclCommInitRankConfig", .. }), "{error}");
    assert_eq!(fake.log(), "init;abort;");
}

#[test]
fn a_wrong_id_or_rank_is_an_error() {
    let fake = Fake::new("libnccl.so.2");
    let library = fake.load().unwrap();
    let error = Communicator::join(&library, &UniqueId([0; 128]), 0, 1, options(50)).unwrap_err();
    assert!(matches!(error, Error::Call { code: ResultCode::InvalidArgument, .. }), "{error}");
    let id = library.unique_id().unwrap();
    let error = Communicator::join(&library, &id, 2, 2, options(50)).unwrap_err();
    assert!(error.to_string().contains("rank 2 of 2"), "{error}");
    let communicator = join(&library, options(50)).unwrap();
    // SAFETY: refused before the addresses are looked at.
    let error =
        unsafe { communicator.broadcast(1, DeviceAddress(0), DeviceAddress(0), 1, DataType::F32, Stream(0)) };
    assert!(matches!(error, Err(Error::Argument { .. })));
    assert!(!format!("{id:?}").contains("90"), "an id is a secret");
}

#[test]
fn a_watchdog_aborts_a_call_that_hangs() {
    let fake = Fake::new("libnccl.so.2");
    let communicator = join(&fake.load().unwrap(), options(600_000)).unwrap();
    fake.set("fake_busy", -1);
    let watchdog = communicator.abort_handle();
    std::thread::scope(|scope| {
        let hung = scope.spawn(move || sum(&communicator, &mut [1.0]));
        watchdog.abort(Duration::from_secs(60)).unwrap();
        assert_eq!(hung.join().unwrap(), Err(Error::Aborted { call: "ncclAllReduce" }));
    });
    watchdog.abort(Duration::ZERO).unwrap();
    assert_eq!(fake.log().matches("abort;").count(), 1);
}

#[test]
fn a_group_that_is_dropped_is_ended() {
    let fake = Fake::new("libnccl.so.2");
    let communicator = join(&fake.load().unwrap(), options(60_000)).unwrap();
    drop(communicator.group().unwrap());
    communicator.group().unwrap().end().unwrap();
    drop(communicator);
    assert_eq!(fake.log(), "init;group_start;group_end;group_start;group_end;abort;");
}

/// The real library: loads without a GPU, knows its version, makes an id, and says in words why it cannot go on without a
/// device.
#[test]
fn the_real_library_loads() {
    let Some(folder) = std::env::var_os("LONGHAUL_NCCL_LIBRARY") else {
        println!("LONGHAUL_NCCL_LIBRARY is not set: no real NCCL is tested");
        return;
    };
    let library = Library::load(&[folder.into()]).unwrap();
    println!("{library:?}");
    assert!(library.version() >= Version::OLDEST);
    let id = library.unique_id();
    println!("{id:?}");
    if let Ok(id) = id {
        match Communicator::join(&library, &id, 0, 1, options(60_000)) {
            Ok(communicator) => {
                communicator.check().unwrap();
                communicator.close().unwrap();
            }
            Err(error) => {
                println!("without a device: {error}");
                // Not an argument: the library took the configuration.
                assert!(!matches!(error, Error::Call { code: ResultCode::InvalidArgument, .. }), "{error}");
            }
        }
    }
}

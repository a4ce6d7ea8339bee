//! Finding a model: directories, the hub cache as huggingface_hub lays it out, and a download from a local stand-in for
//! the hub.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use longhaul_testkit::{TinyCheckpoint, TinyConfig};
use longhaul_weights::{DownloadProgress, HubOptions, Wanted, WeightsError, locate_with};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "Org/Tiny-1";

fn options(cache_dir: &Path) -> HubOptions {
    HubOptions {
        cache_dir: cache_dir.to_owned(),
        offline: true,
        endpoint: "http://127.0.0.1:9".to_owned(),
        token: None,
    }
}

fn locate_all(
    model: &str,
    options: &HubOptions,
    progress: &mut dyn DownloadProgress,
) -> Result<PathBuf, WeightsError> {
    locate_with(model, Wanted::Weights, options, progress)
}

/// Writes `files` as a cached model: a ref, a snapshot of links, blobs.
fn fill_cache(cache: &Path, files: &BTreeMap<String, Vec<u8>>, revision: &str) -> PathBuf {
    let folder = cache.join("models--Org--Tiny-1");
    let snapshot = folder.join("snapshots").join(COMMIT);
    let reference = folder.join("refs").join(revision);
    for dir in [&snapshot, &folder.join("blobs"), &reference.parent().unwrap().to_owned()] {
        std::fs::create_dir_all(dir).unwrap();
    }
    std::fs::write(reference, format!("{COMMIT}\n")).unwrap();
    for (index, (name, bytes)) in files.iter().enumerate() {
        std::fs::write(folder.join("blobs").join(index.to_string()), bytes).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(format!("../../blobs/{index}"), snapshot.join(name)).unwrap();
        #[cfg(not(unix))]
        std::fs::write(snapshot.join(name), bytes).unwrap();
    }
    snapshot
}

#[test]
fn a_directory_is_taken_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert_eq!(locate_all(path, &options(dir.path()), &mut ()).unwrap(), dir.path());
    let nowhere = format!("{path}/nowhere");
    let error = locate_all(&nowhere, &options(dir.path()), &mut ()).unwrap_err();
    assert!(matches!(error, WeightsError::NoSuchDirectory { .. }), "{error}");
    std::fs::write(dir.path().join("x.safetensors"), b"").unwrap();
    let error = locate_all(&format!("{path}/x.safetensors"), &options(dir.path()), &mut ()).unwrap_err();
    assert!(matches!(error, WeightsError::NotADirectory { .. }), "{error}");
}

#[test]
fn strange_ids_are_refused_before_anything_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    for model in [
        "",
        "gpt2",
        "a/../b",
        "../../etc",
        "a/b/../../c",
        "a/b@../../x",
        "./a",
        "~/m",
        "a/b/",
        "a\\b",
        "a/b\0",
    ] {
        let error = locate_all(model, &options(dir.path()), &mut ()).unwrap_err();
        let kind = matches!(error, WeightsError::ModelId { .. } | WeightsError::NoSuchDirectory { .. });
        assert!(kind, "{model:?}: {error}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_complete_snapshot_is_found_by_branch_tag_and_commit() {
    for shards in [1, 3] {
        let cache = tempfile::tempdir().unwrap();
        let config = TinyConfig::dense();
        let files = TinyCheckpoint::new(config.clone()).shards(shards).files();
        let snapshot = fill_cache(cache.path(), &files, "main");
        fill_cache_ref(cache.path(), "refs/pr/1");
        for id in [ID, "Org/Tiny-1@main", "Org/Tiny-1@refs/pr/1", &format!("{ID}@{COMMIT}")] {
            let found = locate_all(id, &options(cache.path()), &mut ()).unwrap();
            assert_eq!(found, snapshot, "{id}");
        }
        common::open(&snapshot, &config).unwrap();
    }
}

fn fill_cache_ref(cache: &Path, revision: &str) {
    let reference = cache.join("models--Org--Tiny-1/refs").join(revision);
    std::fs::create_dir_all(reference.parent().unwrap()).unwrap();
    std::fs::write(reference, COMMIT).unwrap();
}

#[test]
fn offline_and_absent_says_where_it_looked_and_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let error = locate_all(ID, &options(cache.path()), &mut ()).unwrap_err();
    let text = error.to_string();
    let folder = cache.path().join("models--Org--Tiny-1").display().to_string();
    for part in
        [ID, "not a directory", &folder, "not in the hub cache", "offline", "HF_HUB_CACHE", "config.json"]
    {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn an_incomplete_snapshot_says_what_is_missing() {
    for (drop, shards, expected) in [
        ("tokenizer.json", 1, "tokenizer.json"),
        ("config.json", 1, "config.json"),
        ("model.safetensors", 1, "model.safetensors or model.safetensors.index.json"),
        ("model-00002-of-00003.safetensors", 3, "model-00002-of-00003.safetensors"),
    ] {
        let cache = tempfile::tempdir().unwrap();
        fill_cache(cache.path(), &TinyCheckpoint::dense().shards(shards).remove(drop).files(), "main");
        let error = locate_all(ID, &options(cache.path()), &mut ()).unwrap_err().to_string();
        assert!(error.contains("incomplete in the hub cache") && error.contains(expected), "{drop}: {error}");
    }
    // Not needed to start.
    let cache = tempfile::tempdir().unwrap();
    fill_cache(cache.path(), &TinyCheckpoint::dense().remove("generation_config.json").files(), "main");
    assert!(locate_all(ID, &options(cache.path()), &mut ()).is_ok());
}

#[test]
fn a_ref_file_cannot_point_out_of_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    fill_cache(cache.path(), &TinyCheckpoint::dense().files(), "main");
    let outside = cache.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    TinyCheckpoint::dense().write(&outside);
    std::fs::write(cache.path().join("models--Org--Tiny-1/refs/main"), "../../outside").unwrap();
    let error = locate_all(ID, &options(cache.path()), &mut ()).unwrap_err();
    assert!(matches!(error, WeightsError::Unavailable { .. }), "{error}");
}

#[test]
fn no_network_is_explained() {
    let cache = tempfile::tempdir().unwrap();
    // Bound and dropped: nothing listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let online =
        HubOptions { offline: false, endpoint: format!("http://{address}"), ..options(cache.path()) };
    let text = locate_all(ID, &online, &mut ()).unwrap_err().to_string();
    for part in [&address.to_string(), "cannot be reached", "Remedies"] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// A stand-in for the hub: one repository over plain HTTP/1.1, with the headers that the hub sends.
struct FakeHub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

/// How a [`FakeHub`] misbehaves.
#[derive(Default, Clone)]
struct Faults {
    /// Commit reported with files, instead of [`COMMIT`].
    file_commit: Option<&'static str>,
    /// Commit reported for the repository, instead of [`COMMIT`].
    sha: Option<&'static str>,
    /// Etag of every file, instead of a good one.
    etag: Option<&'static str>,
    /// Cut the first whole transfer of this file after half of its bytes.
    cut: Option<&'static str>,
    /// Answer every request with this status.
    status: Option<u16>,
}

impl FakeHub {
    fn start(files: BTreeMap<String, Vec<u8>>, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            let cut = Mutex::new(faults.cut);
            for stream in listener.incoming() {
                // A client that goes away is not this server's concern.
                let _ = serve(&stream.unwrap(), &files, &faults, &cut, &log);
            }
        });
        Self { endpoint, requests }
    }

    fn requests_for(&self, part: &str) -> usize {
        self.requests.lock().unwrap().iter().filter(|r| r.contains(part)).count()
    }
}

fn serve(
    mut stream: &TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    faults: &Faults,
    cut: &Mutex<Option<&'static str>>,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut start = None;
    let mut end = None;
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            let (from, to) = range.split_once('-').unwrap();
            (start, end) = (from.parse::<usize>().ok(), to.parse::<usize>().ok());
        }
    }
    log.lock().unwrap().push(request.clone());
    let path = request.split(' ').nth(1).unwrap_or_default();
    let respond = |mut stream: &TcpStream, status: &str, headers: &str, body: &[u8]| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
            body.len()
        )?;
        stream.write_all(body)
    };
    if let Some(status) = faults.status {
        return respond(stream, &format!("{status} Fault"), "", b"");
    }
    if path == format!("/api/models/{ID}/revision/main") {
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let info = serde_json::json!({"siblings": siblings, "sha": faults.sha.unwrap_or(COMMIT)});
        return respond(stream, "200 OK", "Content-Type: application/json\r\n", info.to_string().as_bytes());
    }
    let name = path.strip_prefix(&format!("/{ID}/resolve/main/")).unwrap_or_default();
    let Some(bytes) = files.get(name) else {
        return respond(stream, "404 Not Found", "", b"");
    };
    let (from, to) = (start.unwrap_or(0), end.map_or(bytes.len(), |e| (e + 1).min(bytes.len())));
    let etag = faults.etag.map_or_else(|| format!("etag{}", name.replace('.', "-")), str::to_owned);
    let headers = format!(
        "ETag: \"{etag}\"\r\nX-Repo-Commit: {}\r\nContent-Range: bytes {from}-{}/{}\r\n",
        faults.file_commit.unwrap_or(COMMIT),
        to.saturating_sub(1),
        bytes.len()
    );
    let body = &bytes[from..to];
    let whole = end.is_none();
    if whole && cut.lock().unwrap().take_if(|file| *file == name).is_some() {
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
            body.len()
        )?;
        return stream.write_all(&body[..body.len() / 2]);
    }
    respond(stream, "206 Partial Content", &headers, body)
}

#[derive(Default)]
struct Recorder {
    files: Vec<(String, u64)>,
    bytes: u64,
    finished: usize,
}

impl DownloadProgress for Recorder {
    fn start(&mut self, file: &str, bytes: u64) {
        if self.files.last().is_none_or(|(last, _)| last != file) {
            self.files.push((file.to_owned(), bytes));
        }
    }

    fn advance(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    fn finish(&mut self) {
        self.finished += 1;
    }
}

fn online(cache: &Path, hub: &FakeHub) -> HubOptions {
    HubOptions { offline: false, endpoint: hub.endpoint.clone(), ..options(cache) }
}

#[test]
fn what_is_needed_is_downloaded_once_and_found_offline_afterwards() {
    for shards in [1, 3] {
        let config = TinyConfig::dense();
        let unwanted = |c: TinyCheckpoint| {
            c.edit_bytes("pytorch_model.bin", |b| b.push(0)).edit_bytes("README.md", |b| b.push(0))
        };
        let files = unwanted(TinyCheckpoint::new(config.clone()).shards(shards)).files();
        let needed = TinyCheckpoint::new(config.clone()).shards(shards).files();
        let hub = FakeHub::start(files, Faults::default());
        let cache = tempfile::tempdir().unwrap();
        let mut progress = Recorder::default();
        let dir = locate_all(ID, &online(cache.path(), &hub), &mut progress).unwrap();
        for (name, bytes) in &needed {
            assert_eq!(&std::fs::read(dir.join(name)).unwrap(), bytes, "{name}");
        }
        common::open(&dir, &config).unwrap();
        assert_eq!(hub.requests_for("pytorch_model.bin") + hub.requests_for("README"), 0);
        let expected: u64 = needed.values().map(|b| b.len() as u64).sum();
        assert_eq!(progress.files.iter().map(|(_, n)| n).sum::<u64>(), expected);
        assert_eq!((progress.bytes, progress.finished), (expected, needed.len()));

        let requests = hub.requests_for("");
        assert_eq!(locate_all(ID, &online(cache.path(), &hub), &mut ()).unwrap(), dir);
        assert_eq!(locate_all(ID, &options(cache.path()), &mut ()).unwrap(), dir);
        assert_eq!(hub.requests_for(""), requests, "a complete snapshot needs no connection");
    }
}

#[test]
fn a_description_comes_without_the_weights() {
    for shards in [1, 3] {
        let checkpoint = TinyCheckpoint::dense().shards(shards).files();
        let hub = FakeHub::start(checkpoint.clone(), Faults::default());
        let cache = tempfile::tempdir().unwrap();
        let describe = |options: &HubOptions| locate_with(ID, Wanted::Description, options, &mut ());
        let dir = describe(&online(cache.path(), &hub)).unwrap();
        for name in ["config.json", "tokenizer.json", "generation_config.json"] {
            assert_eq!(std::fs::read(dir.join(name)).unwrap(), checkpoint[name], "{name}");
        }
        assert_eq!(hub.requests_for("safetensors"), 0);
        let asked = hub.requests_for("tokenizer.json");
        assert_eq!(describe(&options(cache.path())).unwrap(), dir);
        let error = locate_all(ID, &options(cache.path()), &mut ()).unwrap_err().to_string();
        assert!(error.contains("incomplete in the hub cache"), "{error}");
        // Asked for later, they come into the same snapshot.
        assert_eq!(locate_all(ID, &online(cache.path(), &hub), &mut ()).unwrap(), dir);
        assert_eq!(hub.requests_for("tokenizer.json"), asked, "what is there is not fetched again");
    }
}

#[test]
fn an_interrupted_transfer_continues() {
    let files = TinyCheckpoint::dense().files();
    let hub = FakeHub::start(files.clone(), Faults { cut: Some("model.safetensors"), ..Faults::default() });
    let cache = tempfile::tempdir().unwrap();
    let dir = locate_all(ID, &online(cache.path(), &hub), &mut ()).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), files["model.safetensors"]);
}

#[test]
fn what_the_server_says_cannot_leave_the_cache() {
    for (faults, part) in [
        (Faults { sha: Some("../../../evil"), ..Faults::default() }, "impossible commit"),
        (Faults { etag: Some("../../../evil"), ..Faults::default() }, "impossible etag"),
        (Faults { etag: Some("/tmp/evil"), ..Faults::default() }, "impossible etag"),
        (Faults { file_commit: Some("../../../evil"), ..Faults::default() }, "changed during the download"),
    ] {
        let hub = FakeHub::start(TinyCheckpoint::dense().files(), faults);
        let outer = tempfile::tempdir().unwrap();
        let cache = outer.path().join("a/b/c");
        let error = locate_all(ID, &online(&cache, &hub), &mut ()).unwrap_err().to_string();
        assert!(error.contains(part), "`{part}` is not in: {error}");
        assert_eq!(std::fs::read_dir(outer.path()).unwrap().count(), 1, "{part}");
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 0, "{part}");
    }
}

#[test]
fn answers_of_the_hub_are_explained() {
    for (status, part) in [(401, "gated"), (404, "no such model"), (500, "answered 500")] {
        let hub = FakeHub::start(BTreeMap::new(), Faults { status: Some(status), ..Faults::default() });
        let cache = tempfile::tempdir().unwrap();
        let error = locate_all(ID, &online(cache.path(), &hub), &mut ()).unwrap_err().to_string();
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
    for (drop, part) in
        [("tokenizer.json", "has no tokenizer.json"), ("model.safetensors", "no model.safetensors")]
    {
        let hub = FakeHub::start(TinyCheckpoint::dense().remove(drop).files(), Faults::default());
        let cache = tempfile::tempdir().unwrap();
        let error = locate_all(ID, &online(cache.path(), &hub), &mut ()).unwrap_err().to_string();
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

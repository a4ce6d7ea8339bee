//! Sockets in the file system, TLS, the times of a connection, and the end of a server whose engine is lost.

mod common;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Mock, PATIENCE, Running, encode, parse_reply, read_reply, score, until};
use longhaul_server::{
    Config, Endpoint, EngineLost, Event, Failure, Limits, Server, ServerError, Serving, Tls, TlsError,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::json;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::ring};

fn exchange(client: &mut (impl Read + Write), path: &str) -> u16 {
    client.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).unwrap();
    read_head(client)
}

/// The status of an answer without a body to wait for.
fn read_head(client: &mut impl Read) -> u16 {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        assert_eq!(client.read(&mut byte).unwrap(), 1, "{:?}", String::from_utf8_lossy(&bytes));
        bytes.push(byte[0]);
    }
    parse_reply(&bytes).status
}

#[test]
fn a_pause_between_requests_is_longer_than_a_head_may_take() {
    let limits = Limits {
        header_time: Duration::from_millis(150),
        keep_alive: Duration::from_secs(3600),
        ..Limits::default()
    };
    let mock = Arc::new(Mock::saying("ok"));
    let server = Running::start(&mock, Config { limits, ..Config::default() });
    let mut client = server.connect();
    assert_eq!(exchange(&mut client, "/live"), 200);
    // Longer than a head may take: as a load balancer keeps its connections.
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(exchange(&mut client, "/live"), 200);
    // Once a request has begun, its head must come.
    client.write_all(b"GET /live HTTP/1.1\r\nHo").unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap_or(0), 0);
}

#[test]
fn a_connection_that_stays_idle_is_closed() {
    let limits = Limits {
        header_time: Duration::from_secs(3600),
        keep_alive: Duration::from_millis(150),
        ..Limits::default()
    };
    let mock = Arc::new(Mock::saying("ok"));
    let server = Running::start(&mock, Config { limits, ..Config::default() });
    let mut client = server.connect();
    assert_eq!(exchange(&mut client, "/live"), 200);
    assert_eq!(client.read(&mut [0; 1]).unwrap_or(0), 0);
    until(|| server.metric("longhaul_connections") == 1.0);
}

#[test]
fn a_request_may_take_longer_than_its_connection_may_idle() {
    let go = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&go);
    let mock = Arc::new(Mock::new(move |submission, sink| {
        sink.send(Event::Started { cached_tokens: 0 });
        until(|| told.load(Ordering::SeqCst));
        common::say(&common::ids("ok<|im_end|>"), submission, sink);
    }));
    let short = Duration::from_millis(100);
    let limits = Limits { header_time: short, keep_alive: short, ..Limits::default() };
    let server = Running::start(&mock, Config { limits, ..Config::default() });
    for stream in [false, true] {
        go.store(false, Ordering::SeqCst);
        let mut client = server.connect();
        let body = json!({"prompt": "x", "stream": stream}).to_string();
        client.write_all(&encode("POST", "/v1/completions", &[], Some(&body))).unwrap();
        until(|| mock.running.load(Ordering::SeqCst) == 1);
        std::thread::sleep(3 * short);
        go.store(true, Ordering::SeqCst);
        assert_eq!(read_reply(client).status, 200);
    }
}

#[test]
fn a_socket_in_the_file_system_serves_and_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("longhaul.sock");
    let server = Server::bind(Endpoint::Unix(path.clone()), Config::default()).unwrap();
    assert_eq!(server.url(), format!("http+unix:{}", path.display()));
    server.lifecycle().ready(Arc::new(Mock::saying("ok<|im_end|>")));
    let (stop, stops) = tokio::sync::mpsc::channel(2);
    let thread = std::thread::spawn(move || server.run_until(stops).unwrap());
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = json!({"prompt": "x"}).to_string();
    // Whatever the name is by which a client calls a socket.
    client.write_all(&encode("POST", "/v1/completions", &[("Host", "engine")], Some(&body))).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(parse_reply(&answer).status, 200);
    stop.try_send(()).unwrap();
    thread.join().unwrap();
    assert!(!path.exists());
    let nowhere = Endpoint::Unix(dir.path().join("no/such/directory/socket"));
    let error = Server::bind(nowhere, Config::default()).map(drop).unwrap_err();
    assert!(error.to_string().contains("--uds"), "{error}");
}

/// A certificate for `localhost` and its key, in files.
struct Pair {
    certificate: PathBuf,
    key: PathBuf,
    der: CertificateDer<'static>,
}

fn pair(dir: &Path, name: &str) -> Pair {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    std::fs::write(&certificate, cert.pem()).unwrap();
    std::fs::write(&key, signing_key.serialize_pem()).unwrap();
    Pair { certificate, key, der: cert.der().clone() }
}

fn client(
    server: SocketAddr,
    trusted: &CertificateDer<'static>,
) -> StreamOwned<ClientConnection, std::net::TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = std::net::TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
}

#[test]
fn tls_carries_answers_and_streams() {
    let dir = tempfile::tempdir().unwrap();
    let own = pair(dir.path(), "own");
    let tls = Some(Tls::from_files(&own.certificate, &own.key).unwrap());
    let limits = Limits { handshake_time: Duration::from_millis(300), ..Limits::default() };
    let mock = Arc::new(Mock::saying("ok<|im_end|>"));
    let server = Running::start(&mock, Config { tls, limits, ..Config::default() });
    for stream in [false, true] {
        let mut client = client(server.address, &own.der);
        let body = json!({"prompt": "x", "stream": stream}).to_string();
        client.write_all(&encode("POST", "/v1/completions", &[], Some(&body))).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        let reply = parse_reply(&answer);
        assert_eq!(reply.status, 200);
        assert!(reply.body.contains("\"finish_reason\":\"stop\""), "{reply:?}");
    }
    // Who trusts another certificate does not speak, who speaks no TLS gets no answer, and who says nothing is let go.
    let stranger = pair(dir.path(), "stranger");
    assert!(client(server.address, &stranger.der).write_all(b"GET").is_err());
    let mut plain = server.connect();
    plain.write_all(&encode("GET", "/live", &[], None)).unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{:?}", String::from_utf8_lossy(&answer));
    assert_eq!(server.connect().read(&mut [0; 1]).unwrap_or(0), 0);
    let metric = |name: &str| {
        let mut client = client(server.address, &own.der);
        client.write_all(&encode("GET", "/metrics", &[], None)).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        let page = parse_reply(&answer).body;
        let line = page.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        line.unwrap().rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    until(|| metric("longhaul_handshake_errors_total") == 3.0);
}

#[test]
fn files_that_make_no_tls_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = (pair(dir.path(), "own"), pair(dir.path(), "other"));
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let error = |certificate: &Path, key: &Path| Tls::from_files(certificate, key).unwrap_err();
    let missing = dir.path().join("missing.pem");
    assert!(matches!(error(&missing, &own.key), TlsError::Read { path, .. } if path == missing));
    assert!(matches!(error(&own.certificate, &missing), TlsError::Read { path, .. } if path == missing));
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let broken = "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n";
    let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (certificate, key, culprit, words) in [
        (&own.key, &own.key, "own.key", "has no certificate"),
        (&file("empty.crt", ""), &own.key, "empty.crt", "has no certificate"),
        (&file("broken.crt", broken), &own.key, "broken.crt", "is not a PEM file"),
        (&file("nonsense.crt", nonsense), &own.key, "nonsense.crt", "certificate"),
        (&own.certificate, &own.certificate, "own.crt", "has no private key"),
        (&own.certificate, &file("locked.key", encrypted), "locked.key", "is encrypted; decrypt it"),
        (&own.certificate, &other.key, "other.key", "does not belong to the first certificate"),
    ] {
        let message = error(certificate, key).to_string();
        assert!(message.contains(culprit) && message.contains(words), "{message}");
    }
    // Both in one file are fine.
    let both =
        std::fs::read_to_string(&own.certificate).unwrap() + &std::fs::read_to_string(&own.key).unwrap();
    let both = file("both.pem", &both);
    Tls::from_files(&both, &both).unwrap();
}

#[test]
fn a_server_whose_engine_is_lost_fails_what_runs_and_ends() {
    for is_device in [false, true] {
        let lost = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&lost);
        let mock = Arc::new(Mock::new(move |_, sink| {
            sink.send(Event::Started { cached_tokens: 0 });
            sink.send(Event::Token { choice: 0, token: score(5, None), finish: None });
            until(|| told.load(Ordering::SeqCst));
            sink.send(Event::Failed(Failure::Engine("the device fell off the bus".into())));
        }));
        let server = Running::unloaded(Config::default());
        server.lifecycle.ready(Arc::clone(&mock) as Arc<dyn Serving>);
        let mut streamed = server.connect();
        let body = |stream: bool| json!({"prompt": "x", "max_tokens": 9, "stream": stream}).to_string();
        streamed.write_all(&encode("POST", "/v1/completions", &[], Some(&body(true)))).unwrap();
        let mut begun = vec![0; 300];
        streamed.read_exact(&mut begun).unwrap();
        let mut whole = server.connect();
        whole.write_all(&encode("POST", "/v1/completions", &[], Some(&body(false)))).unwrap();
        until(|| mock.running.load(Ordering::SeqCst) == 2);
        let loss = EngineLost { reason: "the device fell off the bus".into(), is_device };
        server.lifecycle.lose(loss.clone());
        // A second loss is the echo of the first.
        server.lifecycle.lose(EngineLost { reason: "echo".into(), is_device: !is_device });
        lost.store(true, Ordering::SeqCst);
        streamed.read_to_end(&mut begun).unwrap();
        let events = parse_reply(&begun).events();
        assert!(
            events.last().unwrap()["error"]["message"].as_str().unwrap().contains("fell off"),
            "{events:?}"
        );
        assert_eq!(read_reply(whole).status, 500);
        match server.end() {
            Err(ServerError::EngineLost(found)) => assert_eq!(found, loss),
            other => panic!("{other:?}"),
        }
    }
}

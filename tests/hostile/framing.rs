//! Bytes that are no request, and requests that never end.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Status;
use crate::common::serve::{PATIENCE, get, post_to};
use crate::corpus::{Answer, Corpus, exchange, model_card, receive};

const BODY: &str = "{\"prompt\":\"x\",\"max_tokens\":1}";

/// A completion with `headers` in place of the usual ones, and `body`.
fn completion(headers: &str, body: &str) -> Vec<u8> {
    format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Connection: close\r\n{headers}\r\n{body}"
    )
    .into_bytes()
}

/// Requests that disagree with themselves: what smuggles a second request past a proxy.
pub fn raw_requests(corpus: &mut Corpus) {
    let refused: &[Status] = &[0, 400];
    let length = BODY.len();
    for (what, headers) in [
        ("both lengths", format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n")),
        ("both lengths, turned", format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n")),
        ("two lengths", format!("Content-Length: {length}\r\nContent-Length: 3\r\n")),
        ("a list of lengths", format!("Content-Length: {length}, 3\r\n")),
        ("signed length", format!("Content-Length: +{length}\r\n")),
        ("negative length", "Content-Length: -1\r\n".into()),
        ("hexadecimal length", "Content-Length: 0x1d\r\n".into()),
        ("fractional length", "Content-Length: 1.0\r\n".into()),
        ("empty length", "Content-Length: \r\n".into()),
        ("no number", "Content-Length: x\r\n".into()),
        ("too large a number", "Content-Length: 18446744073709551616\r\n".into()),
        ("chunked is not last", "Transfer-Encoding: chunked, identity\r\n".into()),
        ("an unknown coding", "Transfer-Encoding: x\r\n".into()),
        ("gzip", "Transfer-Encoding: gzip\r\n".into()),
        ("space before the colon", format!("Content-Length : {length}\r\n")),
        ("a folded header", format!("X: a\r\n b\r\nContent-Length : {length}\r\n")),
        ("a name with a space", format!("X Y: z\r\nContent-Length: {length}\r\n")),
        ("a nameless header", format!(": z\r\nContent-Length: {length}\r\n")),
        ("a NUL in a value", format!("X: a\0b\r\nContent-Length: {length}\r\n")),
        ("a NUL in a name", format!("X\0: b\r\nContent-Length: {length}\r\n")),
        ("a bare CR", format!("X: a\rb\r\nContent-Length: {length}\r\n")),
        ("no colon", format!("X\r\nContent-Length: {length}\r\n")),
    ] {
        corpus.case("framing: headers", what, &completion(&headers, BODY), refused);
    }
    for (what, line) in [
        ("HTTP/1.0", "GET /live HTTP/1.0"),
        ("HTTP/0.9", "GET /live"),
        ("HTTP/2", "GET /live HTTP/2.0"),
        ("HTTP/1.2", "GET /live HTTP/1.2"),
        ("HTTP/1.10", "GET /live HTTP/1.10"),
        ("HTTP", "GET /live HTTP"),
        ("lower case", "GET /live http/1.1"),
        ("two spaces", "GET  /live HTTP/1.1"),
        ("a tab", "GET\t/live\tHTTP/1.1"),
        ("no target", "GET HTTP/1.1"),
        ("no method", " /live HTTP/1.1"),
        ("a relative target", "GET live HTTP/1.1"),
        ("a space in the target", "GET /live /x HTTP/1.1"),
        ("a NUL in the target", "GET /li\0ve HTTP/1.1"),
        ("a method in brackets", "G{}T /live HTTP/1.1"),
        ("a method of bytes", "\u{fc}\u{fc} /live HTTP/1.1"),
    ] {
        let request = format!("{line}\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        corpus.case("framing: lines", what, request.as_bytes(), &[0, 400, 505]);
    }
    for (what, bytes) in [
        ("nothing but line ends", &b"\r\n\r\n\r\n\r\n"[..]),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("random bytes", b"\x00\xff\x80\x7f\x01\x02\x03\r\n\r\n"),
        ("SSH", b"SSH-2.0-OpenSSH_9.0\r\n"),
        ("SMTP", b"EHLO x\r\nMAIL FROM:<a@b>\r\n\r\n"),
        ("redis", b"*1\r\n$4\r\nPING\r\n\r\n"),
    ] {
        // Some of it could go on; the client ends it.
        let stream = TcpStream::connect(&corpus.server.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = (&stream).write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let answer = receive(stream);
        assert!([0, 400, 505].contains(&answer.status), "{what}: {answer:?}");
        corpus.count("framing: other protocols", &answer);
    }
    // An upgrade is no way around anything: the request is answered as one of HTTP/1.1, or refused.
    for upgrade in ["h2c", "websocket", "TLS/1.2"] {
        let request = format!(
            "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: {upgrade}\r\n\r\n"
        );
        corpus.case("framing: upgrades", upgrade, request.as_bytes(), &[200, 400]);
    }
    // A body that hides a request is a body.
    let hidden = format!("{BODY}GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let request = completion(&format!("Content-Length: {}\r\n", hidden.len()), &hidden);
    let answer = corpus.case("framing: hidden requests", "in a body", &request, &[400]);
    assert_eq!(answer.body.matches("HTTP/1.1").count(), 0, "{answer:?}");
    // Two requests at once are two answers, in their order.
    let pipelined = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\nGET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let answer = corpus.case("framing: hidden requests", "pipelined", pipelined, &[200]);
    assert_eq!(answer.body.matches("HTTP/1.1 200").count(), 1, "{answer:?}");
    // What comes after a refused request is not looked at.
    let smuggled = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n\
         0\r\n\r\nGET /version HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let answer = corpus.case("framing: hidden requests", "smuggled", smuggled.as_bytes(), &[400]);
    assert!(!answer.body.contains("version"), "{answer:?}");
}

/// Heads at their bounds.
pub fn heads(corpus: &mut Corpus) {
    let head = |headers: String, target: &str| {
        format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n").into_bytes()
    };
    let many = |n: usize| (0..n).map(|i| format!("X-{i}: y\r\n")).collect::<String>();
    // The answer to a head that is still being sent may be lost with the connection.
    let refused: &[Status] = &[0, 400, 414, 431];
    for (count, statuses) in [(61, &[200][..]), (63, refused), (1000, refused), (20_000, refused)] {
        corpus.case("framing: heads", &format!("{count} headers"), &head(many(count), "/live"), statuses);
    }
    for (bytes, statuses) in
        [(30_000, &[200][..]), (200_000, refused), (1 << 20, refused), (8 << 20, refused)]
    {
        let value = format!("X: {}\r\n", "y".repeat(bytes));
        corpus.case("framing: heads", &format!("a value of {bytes}"), &head(value, "/live"), statuses);
        let name = format!("{}: y\r\n", "x".repeat(bytes));
        let statuses = if bytes == 30_000 { &[0, 200, 400, 431][..] } else { refused };
        corpus.case("framing: heads", &format!("a name of {bytes}"), &head(name, "/live"), statuses);
    }
    for (bytes, statuses) in [(8_000, &[404][..]), (70_000, refused), (1 << 20, refused)] {
        let target = format!("/{}", "t".repeat(bytes));
        corpus.case(
            "framing: heads",
            &format!("a target of {bytes}"),
            &head(String::new(), &target),
            statuses,
        );
    }
}

/// Bodies in pieces.
pub fn chunks(corpus: &mut Corpus) {
    let chunked = |body: &[u8]| {
        let mut request = completion("Transfer-Encoding: chunked\r\n", "");
        request.extend_from_slice(body);
        request
    };
    let good = format!("{:x}\r\n{BODY}\r\n0\r\n\r\n", BODY.len());
    for (what, body, statuses) in [
        ("plain", good.clone(), &[200][..]),
        ("an extension", format!("{:x};a=b\r\n{BODY}\r\n0\r\n\r\n", BODY.len()), &[200]),
        ("a trailer", format!("{:x}\r\n{BODY}\r\n0\r\nX: y\r\n\r\n", BODY.len()), &[200, 400]),
        ("not hexadecimal", format!("{}z\r\n{BODY}\r\n0\r\n\r\n", BODY.len()), &[0, 400]),
        ("negative", format!("-{:x}\r\n{BODY}\r\n0\r\n\r\n", BODY.len()), &[0, 400]),
        ("0x", format!("0x{:x}\r\n{BODY}\r\n0\r\n\r\n", BODY.len()), &[0, 400]),
        ("too large a size", format!("fffffffffffffffff\r\n{BODY}\r\n0\r\n\r\n"), &[0, 400]),
        ("the largest size", format!("ffffffffffffffff\r\n{BODY}\r\n0\r\n\r\n"), &[0, 400, 408, 413]),
        ("no size", format!("\r\n{BODY}\r\n0\r\n\r\n"), &[0, 400]),
        ("longer than its size", format!("3\r\n{BODY}\r\n0\r\n\r\n"), &[0, 400]),
        ("no line end", format!("{:x}\r\n{BODY}0\r\n\r\n", BODY.len()), &[0, 400]),
        ("a bare line feed", format!("{:x}\n{BODY}\n0\n\n", BODY.len()), &[0, 200, 400]),
    ] {
        let stream = TcpStream::connect(&corpus.server.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = (&stream).write_all(&chunked(body.as_bytes()));
        // Whoever still waits for a byte learns that there is none.
        if !statuses.contains(&200) {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let answer = receive(stream);
        assert!(statuses.contains(&answer.status), "{what}: {answer:?}");
        corpus.count("framing: chunks", &answer);
    }
    // A million chunks of one byte each, and a hundred thousand extensions.
    let body = format!("{BODY}{}", " ".repeat(500_000));
    let mut tiny = Vec::with_capacity(body.len() * 6);
    for byte in body.bytes() {
        tiny.extend_from_slice(b"1\r\n");
        tiny.push(byte);
        tiny.extend_from_slice(b"\r\n");
    }
    tiny.extend_from_slice(b"0\r\n\r\n");
    corpus.case("framing: chunks", "one byte each", &chunked(&tiny), &[200]);
    let mut extended = Vec::new();
    for byte in body.bytes().take(100_000) {
        extended.extend_from_slice(b"1;a=bbbbbbbbbb\r\n");
        extended.push(byte);
        extended.extend_from_slice(b"\r\n");
    }
    extended.extend_from_slice(b"0\r\n\r\n");
    corpus.case("framing: chunks", "extensions", &chunked(&extended), &[0, 400]);
    let long = format!("1;{}\r\n{{\r\n0\r\n\r\n", "a".repeat(200_000));
    corpus.case("framing: chunks", "one long extension", &chunked(long.as_bytes()), &[0, 400]);
}

/// Compressed bodies are not read; other types are not guessed at.
pub fn encodings(corpus: &mut Corpus) {
    let length = format!("Content-Length: {}\r\n", BODY.len());
    for (coding, status) in [
        ("identity", 200),
        ("gzip", 415),
        ("deflate", 415),
        ("br", 415),
        ("zstd", 415),
        ("x-gzip", 415),
        ("gzip, identity", 415),
        ("identity, gzip", 415),
        ("", 415),
        ("\u{fc}", 415),
        ("unheard-of", 415),
    ] {
        let headers = format!("{length}Content-Encoding: {coding}\r\n");
        corpus.case("framing: encodings", coding, &completion(&headers, BODY), &[status]);
    }
    for (kind, status) in [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("APPLICATION/JSON", 200),
        ("text/plain", 400),
        ("application/jsonp", 400),
        ("application/x-www-form-urlencoded", 400),
        ("multipart/form-data; boundary=x", 400),
        ("", 400),
        ("application/json, text/plain", 400),
        ("application/json/x", 400),
        ("\u{fc}", 400),
    ] {
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nConnection: close\r\n{length}\r\n{BODY}"
        );
        corpus.case("framing: encodings", kind, request.as_bytes(), &[status]);
    }
}

fn limit(corpus: &Corpus) -> usize {
    let context = model_card(&corpus.server)["max_model_len"].as_u64().unwrap() as usize;
    (32 << 20).min(6 * context + (1 << 20))
}

/// Bodies of exactly the largest size, and of one byte more.
pub fn bodies(corpus: &mut Corpus) {
    let limit = limit(corpus);
    let body = |bytes: usize| format!("{BODY}{}", " ".repeat(bytes - BODY.len()));
    let declared = |bytes: usize| completion(&format!("Content-Length: {bytes}\r\n"), &body(bytes));
    let chunked = |bytes: usize| {
        let mut request = completion("Transfer-Encoding: chunked\r\n", "");
        for chunk in body(bytes).as_bytes().chunks(60_000) {
            request.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            request.extend_from_slice(chunk);
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"0\r\n\r\n");
        request
    };
    corpus.case("framing: bodies", "the largest", &declared(limit), &[200]);
    corpus.case("framing: bodies", "the largest, chunked", &chunked(limit), &[200]);
    // The answer to a body that is still being sent may be lost with the connection.
    corpus.case("framing: bodies", "a byte too large", &declared(limit + 1), &[0, 413]);
    corpus.case("framing: bodies", "a byte too large, chunked", &chunked(limit + 1), &[0, 413]);
    corpus.case("framing: bodies", "64 MiB", &declared(64 << 20), &[0, 413]);
    corpus.case("framing: bodies", "64 MiB, chunked", &chunked(64 << 20), &[0, 413]);
    for bytes in [1_u64 << 31, 1 << 32, 1 << 53, i64::MAX as u64, u64::MAX - 1] {
        // None of it is sent, and nothing is waited for.
        let request = completion(&format!("Content-Length: {bytes}\r\n"), "");
        corpus.case("framing: bodies", &format!("{bytes} declared"), &request, &[400, 413, 431]);
    }
    for path in ["/v1/chat/completions", "/tokenize", "/detokenize", "/v1/chat/completions/render"] {
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n",
            limit + 1
        );
        corpus.case("framing: bodies", path, request.as_bytes(), &[413]);
    }
    // A body where none belongs is no harm.
    for path in ["/live", "/v1/models", "/metrics"] {
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{BODY}",
            BODY.len()
        );
        corpus.case("framing: bodies", path, request.as_bytes(), &[200]);
    }
}

/// Clients that send next to nothing are let go, and the others do not notice them.
pub fn slow_clients(corpus: &mut Corpus) {
    let whole = post_to("/v1/completions", &json!({"prompt": "x", "max_tokens": 1}));
    let head = whole.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    let mut slow = Vec::new();
    for (sent, statuses) in
        [(0, &[0, 408][..]), (1, &[0, 408]), (head / 2, &[0, 408]), (head, &[408]), (head + 5, &[408])]
    {
        for _ in 0..60 {
            let stream = TcpStream::connect(&corpus.server.address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            (&stream).write_all(&whole[..sent]).unwrap();
            slow.push((stream, statuses));
        }
    }
    for _ in 0..20 {
        corpus.case("framing: slow clients", "another client", &whole, &[200]);
    }
    for (stream, statuses) in slow {
        let answer = receive(stream);
        assert!(statuses.contains(&answer.status), "{answer:?}");
        corpus.count("framing: slow clients", &answer);
    }
}

/// Large bodies of text keep the tokenizer busy, not the server.
pub fn health_under_large_bodies(corpus: &mut Corpus) {
    let limit = limit(corpus);
    let address = corpus.server.address.clone();
    let senders: Vec<_> = (0..6)
        .map(|kind| {
            let address = address.clone();
            std::thread::spawn(move || -> Vec<Answer> {
                let text = ["1234567890", "aA", " \n", "\u{4e2d}\u{6587}", "^", "a "][kind];
                let body = json!({"prompt": text.repeat((limit - 100) / json!(text).to_string().len())});
                let path = if kind % 2 == 0 { "/tokenize" } else { "/v1/completions" };
                let request = post_to(path, &body);
                let send = |_| {
                    let stream = TcpStream::connect(&address).unwrap();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    let _ = (&stream).write_all(&request);
                    receive(stream)
                };
                (0..2).map(send).collect()
            })
        })
        .collect();
    let mut times = Vec::new();
    while senders.iter().any(|sender| !sender.is_finished()) {
        let before = Instant::now();
        assert_eq!(exchange(&corpus.server, &get("/health")).status, 200);
        times.push(before.elapsed());
        std::thread::sleep(Duration::from_millis(10));
    }
    for answer in senders.into_iter().flat_map(|sender| sender.join().unwrap()) {
        // A text that is too long for the model is refused, by its length or by its tokens.
        assert!([200, 400].contains(&answer.status), "{} {}", answer.status, answer.head);
        corpus.tally("framing: large bodies", &answer);
    }
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    println!(
        "/health under {} bodies of {limit} bytes: {} probes, median {:?}, 99 % within {:?}, worst {:?}",
        12,
        times.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

//! A server, what was sent to it, and what has to be true of it afterwards.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use crate::Status;
use crate::common::serve::{Metrics, PATIENCE, Serve, get};

pub struct Corpus {
    pub server: Serve,
    name: &'static str,
    cases: BTreeMap<&'static str, usize>,
    statuses: BTreeMap<Status, usize>,
    resident: u64,
}

/// An answer, or the lack of one.
#[derive(Debug)]
pub struct Answer {
    pub status: Status,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl Corpus {
    pub fn start(name: &'static str, arguments: &[&str]) -> Self {
        let server = Serve::start(arguments);
        let resident = server.status("VmRSS");
        Self { server, name, cases: BTreeMap::new(), statuses: BTreeMap::new(), resident }
    }

    /// Sends `request` and demands one of `statuses`.
    pub fn case(&mut self, class: &'static str, what: &str, request: &[u8], statuses: &[Status]) -> Answer {
        let answer = exchange(&self.server, request);
        assert!(statuses.contains(&answer.status), "{class}: {what}: {statuses:?} was due: {answer:?}");
        self.count(class, &answer);
        answer
    }

    /// Books an answer, which has to tell nothing about the server.
    pub fn count(&mut self, class: &'static str, answer: &Answer) {
        self.tally(class, answer);
        if answer.status >= 400 {
            for leak in
                ["src/", ".rs:", "panicked", "/root", "/home", "/work", "tokenizer.json", crate::access::KEY]
            {
                assert!(!answer.body.contains(leak), "{class}: {leak} in {answer:?}");
            }
            assert!(answer.body.len() < 4096, "{class}: {} bytes of error", answer.body.len());
        }
        // 505 is the answer to another version of HTTP.
        assert!(answer.status < 500 || answer.status == 505, "{class}: {answer:?}");
    }

    /// Books an answer of any size.
    pub fn tally(&mut self, class: &'static str, answer: &Answer) {
        *self.cases.entry(class).or_default() += 1;
        *self.statuses.entry(answer.status).or_default() += 1;
    }

    /// The server is as it was; the number of cases.
    pub fn end(self) -> usize {
        let Self { server, name, cases, statuses, resident } = self;
        let metrics = server.metrics_when("everything is given back", Metrics::is_quiet);
        assert_eq!(metrics.panics(), 0, "{}", server.told());
        for outcome in ["engine_error_500", "numeric_error_500", "shed_503"] {
            assert_eq!(metrics.outcome(outcome), 0, "{outcome}");
        }
        let total: usize = cases.values().sum();
        println!(
            "{name}: {total} cases {cases:?}; statuses {statuses:?}; resident {resident} -> {} KiB",
            server.status("VmRSS")
        );
        server.signal("-TERM");
        let (code, told) = server.end();
        assert_eq!(code, Some(0), "{told}");
        assert!(!told.contains("panicked"), "{told}");
        // What clients sent does not reach a terminal.
        assert!(told.chars().all(|c| c == '\n' || !c.is_control()), "{told:?}");
        total
    }
}

/// Sends bytes; what comes back until the server closes.
pub fn exchange(server: &Serve, request: &[u8]) -> Answer {
    let stream = TcpStream::connect(&server.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The server may answer and close before it has read everything.
    let _ = (&stream).write_all(request);
    receive(stream)
}

/// What comes until the end of a connection.
pub fn receive(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let mut buffer = [0; 1 << 14];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}: {:?}", String::from_utf8_lossy(&bytes)),
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).unwrap_or(0);
    Answer { status, head: head.to_owned(), body: body.to_owned() }
}

/// The ids and names of the served model's metadata.
pub fn model_card(server: &Serve) -> Value {
    exchange(server, &get("/v1/models")).json()["data"][0].clone()
}

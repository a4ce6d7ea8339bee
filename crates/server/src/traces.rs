//! Traces: a span for every request that reached the engine, sent as OTLP over HTTP in JSON.
//!
//! Spans are collected by a thread of their own. Nothing waits for the collector: what there is no room for is dropped and
//! counted.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::log::{Level, event};

/// Spans that may wait for the collector.
const WAITING_SPANS: usize = 4096;

/// Most spans of a message.
const BATCH: usize = 512;

/// Longest time that a span waits for others.
const DELAY: Duration = Duration::from_secs(1);

/// Longest time of a message.
const SEND_TIME: Duration = Duration::from_secs(10);

/// Where traces go.
#[derive(Clone)]
pub struct Tracer {
    spans: SyncSender<Span>,
    dropped: Arc<AtomicU64>,
}

/// Why there are no traces.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Nothing that traces could be sent to.
    #[error(
        "{0}: an address such as http://collector:4318/v1/traces is expected (OTLP over HTTP; gRPC is not spoken)"
    )]
    Endpoint(String),
    /// The system has no thread left.
    #[error("traces cannot be sent: {0}")]
    System(#[from] io::Error),
}

/// The caller's span, from `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parent {
    trace: u128,
    span: u64,
    sampled: bool,
}

/// A value of a span's attribute.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Attribute {
    Text(String),
    Int(i64),
    Double(f64),
}

/// A request that is over.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) name: &'static str,
    pub(crate) parent: Option<Parent>,
    pub(crate) began: SystemTime,
    pub(crate) took: Duration,
    pub(crate) attributes: Vec<(&'static str, Attribute)>,
    pub(crate) error: Option<&'static str>,
}

impl Tracer {
    /// Sends spans to `endpoint`, an http(s) address; without a path `/v1/traces` is meant. `service` is what it calls itself.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn start(endpoint: &str, service: &str) -> Result<Self, TraceError> {
        let unusable = || TraceError::Endpoint(endpoint.to_owned());
        let uri: axum::http::Uri = endpoint.parse().map_err(|_| unusable())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(unusable());
        }
        let url = match uri.path() {
            "" | "/" => format!("{}/v1/traces", endpoint.trim_end_matches('/')),
            _ => endpoint.to_owned(),
        };
        let (spans, collected) = sync_channel(WAITING_SPANS);
        let dropped = Arc::<AtomicU64>::default();
        let (service, lost) = (service.to_owned(), Arc::clone(&dropped));
        let agent = ureq::Agent::config_builder().timeout_global(Some(SEND_TIME)).build().new_agent();
        thread::Builder::new().name("longhaul-traces".into()).spawn(move || {
            let send = |body: &Value| {
                let request = agent.post(&url).header("content-type", "application/json");
                request.send(body.to_string()).map(drop).map_err(|e| e.to_string())
            };
            collect(&collected, &service, &lost, send);
        })?;
        Ok(Self { spans, dropped })
    }

    /// Hands a span over, without waiting.
    pub(crate) fn export(&self, span: Span) {
        if span.parent.is_some_and(|parent| !parent.sampled) {
            return;
        }
        if self.spans.try_send(span).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Spans that never arrived.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tracer")
    }
}

/// Sends what comes, in batches, until nobody is left to send anything.
fn collect(
    spans: &Receiver<Span>,
    service: &str,
    dropped: &AtomicU64,
    send: impl Fn(&Value) -> Result<(), String>,
) {
    let mut reachable = true;
    while let Ok(first) = spans.recv() {
        let mut batch = vec![first];
        let end = Instant::now() + DELAY;
        while batch.len() < BATCH {
            match spans.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(span) => batch.push(span),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        match send(&message(service, &batch)) {
            Ok(()) => reachable = true,
            Err(reason) => {
                dropped.fetch_add(batch.len() as u64, Ordering::Relaxed);
                // Once, not for every batch.
                if std::mem::replace(&mut reachable, false) {
                    let message = "traces are not taken by their collector, and are lost until it takes some";
                    event(Level::Warn, message, [("reason", json!(reason))]);
                }
            }
        }
    }
}

/// An `ExportTraceServiceRequest`.
fn message(service: &str, spans: &[Span]) -> Value {
    let spans: Vec<Value> = spans.iter().map(Span::json).collect();
    json!({"resourceSpans": [{
        "resource": {"attributes": [
            {"key": "service.name", "value": {"stringValue": service}},
            {"key": "service.version", "value": {"stringValue": env!("CARGO_PKG_VERSION")}},
        ]},
        "scopeSpans": [{"scope": {"name": "longhaul"}, "spans": spans}],
    }]})
}

impl Span {
    fn json(&self) -> Value {
        let random = || getrandom::u64().unwrap_or(1).max(1);
        let trace =
            self.parent.map_or_else(|| u128::from(random()) << 64 | u128::from(random()), |p| p.trace);
        let began = self.began.duration_since(UNIX_EPOCH).unwrap_or_default();
        let attributes: Vec<Value> = self
            .attributes
            .iter()
            .map(|(key, value)| {
                let value = match value {
                    Attribute::Text(text) => json!({"stringValue": text}),
                    // 64-bit integers are strings in protobuf's JSON.
                    Attribute::Int(number) => json!({"intValue": number.to_string()}),
                    Attribute::Double(number) => json!({"doubleValue": number}),
                };
                json!({"key": key, "value": value})
            })
            .collect();
        let mut span = json!({
            "traceId": format!("{trace:032x}"),
            "spanId": format!("{:016x}", random()),
            "name": self.name,
            // A server's.
            "kind": 2,
            "startTimeUnixNano": began.as_nanos().to_string(),
            "endTimeUnixNano": (began + self.took).as_nanos().to_string(),
            "attributes": attributes,
        });
        if let Some(map) = span.as_object_mut() {
            if let Some(parent) = self.parent {
                map.insert("parentSpanId".into(), json!(format!("{:016x}", parent.span)));
            }
            if let Some(error) = self.error {
                map.insert("status".into(), json!({"code": 2, "message": error}));
            }
        }
        span
    }
}

impl Parent {
    /// The value of a `traceparent` header; one that is malformed is none, as the specification has it.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        let mut parts = value.split('-');
        let mut hex = |digits: usize| -> Option<u128> {
            let part = parts.next().filter(|part| part.len() == digits)?;
            let lower = part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            lower.then(|| u128::from_str_radix(part, 16).ok()).flatten()
        };
        let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let more = parts.next().is_some();
        if version == 0xff || (version == 0 && more) || trace == 0 || span == 0 {
            return None;
        }
        Some(Self { trace, span: u64::try_from(span).ok()?, sampled: flags & 1 == 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn only_a_whole_traceparent_is_one() {
        let parent = Parent::parse(PARENT).unwrap();
        assert_eq!(
            (parent.trace, parent.span),
            (0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0x00f0_67aa_0ba9_02b7)
        );
        assert!(parent.sampled && !Parent::parse(&PARENT.replace("-01", "-00")).unwrap().sampled);
        // A later version may have more fields.
        assert!(Parent::parse(&PARENT.replacen("00", "01", 1).replace("7-01", "7-01-more")).is_some());
        for bad in [
            "",
            "00",
            &PARENT.to_uppercase(),
            &format!("{PARENT}-more"),
            &PARENT.replacen("00", "ff", 1),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Parent::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_a_collector_does_not_take_is_counted() {
        let (spans, collected) = sync_channel(8);
        let span = |error| Span {
            name: "llm_request",
            parent: Parent::parse(PARENT),
            began: UNIX_EPOCH + Duration::from_secs(7),
            took: Duration::from_millis(1500),
            attributes: vec![
                ("a", Attribute::Int(1)),
                ("b", Attribute::Double(0.5)),
                ("c", Attribute::Text("t".into())),
            ],
            error,
        };
        spans.send(span(None)).unwrap();
        spans.send(span(Some("engine_error_500"))).unwrap();
        drop(spans);
        let dropped = AtomicU64::new(0);
        collect(&collected, "me", &dropped, |message| {
            let spans = &message["resourceSpans"][0]["scopeSpans"][0]["spans"];
            assert_eq!(spans[0]["traceId"], "4bf92f3577b34da6a3ce929d0e0e4736");
            assert_eq!(spans[0]["parentSpanId"], "00f067aa0ba902b7");
            assert_eq!(spans[0]["startTimeUnixNano"], "7000000000");
            assert_eq!(spans[0]["endTimeUnixNano"], "8500000000");
            assert_eq!(spans[0]["attributes"][0], json!({"key": "a", "value": {"intValue": "1"}}));
            assert_eq!(spans[1]["status"]["code"], 2);
            assert!(spans[0].get("status").is_none());
            Err("no".into())
        });
        assert_eq!(dropped.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn an_endpoint_is_an_http_address() {
        for bad in ["", "collector:4317", "grpc://collector:4317", "/v1/traces", "http://"] {
            let error = Tracer::start(bad, "me").unwrap_err().to_string();
            assert!(error.contains("http://collector:4318/v1/traces"), "{error}");
        }
    }
}

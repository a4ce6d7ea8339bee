//! Every request ends in exactly one outcome, and counters prove it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use crate::record::Record;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// An end-of-sequence token, a stop token or a stop string; or an answer that needs no generation.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// The model called a tool.
    ToolCalls,
    /// The client went away, or read too slowly.
    ClientGone,
    /// The deadline passed.
    Deadline,
    /// Refused: the caller's quota.
    Shed429,
    /// Refused: no room.
    Shed503,
    /// Refused or cut: shutting down.
    Drained503,
    /// The server or the engine failed.
    EngineError500,
    /// The model computed something that is not a number.
    NumericError500,
    /// The request was wrong.
    Invalid4xx,
}

impl Outcome {
    /// All of them, in the order of their counters.
    pub const ALL: [Outcome; 11] = [
        Outcome::Stop,
        Outcome::Length,
        Outcome::ToolCalls,
        Outcome::ClientGone,
        Outcome::Deadline,
        Outcome::Shed429,
        Outcome::Shed503,
        Outcome::Drained503,
        Outcome::EngineError500,
        Outcome::NumericError500,
        Outcome::Invalid4xx,
    ];

    /// The label of `longhaul_requests_finished_total`.
    pub fn label(self) -> &'static str {
        match self {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::ToolCalls => "tool_calls",
            Outcome::ClientGone => "client_gone",
            Outcome::Deadline => "deadline",
            Outcome::Shed429 => "shed_429",
            Outcome::Shed503 => "shed_503",
            Outcome::Drained503 => "drained_503",
            Outcome::EngineError500 => "engine_error_500",
            Outcome::NumericError500 => "numeric_error_500",
            Outcome::Invalid4xx => "invalid_4xx",
        }
    }
}

/// The counters. `received` = the sum of `finished` + the requests still open.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    received: AtomicU64,
    finished: [AtomicU64; Outcome::ALL.len()],
    changed: Notify,
}

impl Ledger {
    /// A request arrived.
    pub(crate) fn open(self: &Arc<Self>) -> Ticket {
        self.received.fetch_add(1, Ordering::AcqRel);
        Ticket { ledger: Arc::clone(self), open: true, record: None }
    }

    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    pub(crate) fn finished(&self) -> impl Iterator<Item = (Outcome, u64)> + '_ {
        Outcome::ALL.into_iter().zip(self.finished.iter().map(|count| count.load(Ordering::Acquire)))
    }

    /// Requests without an outcome yet.
    pub(crate) fn in_flight(&self) -> u64 {
        let finished: u64 = self.finished().map(|(_, count)| count).sum();
        self.received().saturating_sub(finished)
    }

    /// Waits until every request has its outcome.
    pub(crate) async fn idle(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.in_flight() == 0 {
                return;
            }
            changed.await;
        }
    }
}

/// An open request. Dropped without an outcome, its client went away: the connection's end drops handler and body.
#[derive(Debug)]
pub(crate) struct Ticket {
    ledger: Arc<Ledger>,
    open: bool,
    record: Option<Arc<Record>>,
}

impl Ticket {
    /// Has the outcome recorded with what else is known of the request.
    pub(crate) fn with_record(self, record: Option<Arc<Record>>) -> Self {
        // No field can be moved out of what has a `drop`.
        let mut ticket = self;
        ticket.record = record;
        ticket
    }

    /// The request's record.
    pub(crate) fn record(&self) -> Option<&Record> {
        self.record.as_deref()
    }

    /// Records how the request ended; only the first outcome counts.
    pub(crate) fn finish(&mut self, outcome: Outcome) {
        if std::mem::take(&mut self.open)
            && let Some(count) = self.ledger.finished.get(outcome as usize)
        {
            count.fetch_add(1, Ordering::AcqRel);
            if let Some(record) = &self.record {
                record.outcome(outcome);
            }
            self.ledger.changed.notify_waiters();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let panicking = std::thread::panicking();
        self.finish(if panicking { Outcome::EngineError500 } else { Outcome::ClientGone });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ticket_counts_once() {
        let ledger = Arc::new(Ledger::default());
        for outcome in Outcome::ALL {
            let mut ticket = ledger.open();
            ticket.finish(outcome);
            ticket.finish(Outcome::Stop);
        }
        drop(ledger.open());
        let open = ledger.open();
        assert_eq!((ledger.received(), ledger.in_flight()), (13, 1));
        for (outcome, count) in ledger.finished() {
            assert_eq!(count, if outcome == Outcome::ClientGone { 2 } else { 1 }, "{outcome:?}");
        }
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _open = open;
            panic!("a handler's");
        }));
        assert!(panicked.is_err());
        let failed = ledger.finished().find(|(outcome, _)| *outcome == Outcome::EngineError500);
        assert_eq!((failed.map(|(_, count)| count), ledger.in_flight()), (Some(2), 0));
    }
}

//! What other threads may know of the step loop at any time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_engine::StepDeadline;

use crate::serving::Snapshot;

/// Shared between the step loop, the device's thread and whoever asks.
#[derive(Default)]
pub(super) struct Status(Mutex<State>);

#[derive(Default)]
struct State {
    snapshot: Snapshot,
    /// Why nothing is served any more.
    dead: Option<String>,
    aborted: bool,
    deadline: StepDeadline,
    step: Option<(Instant, Duration)>,
}

impl Status {
    pub(super) fn new(step_timeout: Option<Duration>) -> Self {
        Self(Mutex::new(State { deadline: StepDeadline::new(step_timeout), ..State::default() }))
    }

    /// A state is whole after every statement, so a panic elsewhere does not spoil it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn step_begins(&self, size: u64, now: Instant) {
        let mut state = self.state();
        state.step = Some((now, state.deadline.limit(size)));
    }

    pub(super) fn step_ends(&self, size: u64, took: Duration) {
        let mut state = self.state();
        state.step = None;
        state.deadline.record(size, took);
    }

    /// # Errors
    /// Why the engine makes no progress.
    pub(super) fn health(&self) -> Result<(), String> {
        let state = self.state();
        if let Some(reason) = &state.dead {
            return Err(reason.clone());
        }
        match state.step {
            Some((began, limit)) if began.elapsed() > limit => Err(format!(
                "a step has been running for {:.0} s; steps of its size get {:.0} s",
                began.elapsed().as_secs_f64(),
                limit.as_secs_f64()
            )),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// Why nothing is taken any more.
    pub(super) fn accepts(&self) -> Result<(), String> {
        let state = self.state();
        match &state.dead {
            Some(reason) => Err(reason.clone()),
            None if state.aborted => Err("the server is shutting down".into()),
            None => Ok(()),
        }
    }

    pub(super) fn die(&self, reason: &str) {
        self.state().dead.get_or_insert_with(|| reason.to_owned());
    }

    pub(super) fn abort(&self) {
        self.state().aborted = true;
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        self.state().snapshot
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        change(&mut self.state().snapshot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_takes_too_long_is_not_healthy() {
        let status = Status::new(Some(Duration::from_millis(200)));
        status.health().unwrap();
        let now = Instant::now();
        status.step_begins(1000, now);
        status.health().unwrap();
        status.step_begins(1000, now.checked_sub(Duration::from_secs(1)).unwrap());
        let reason = status.health().unwrap_err();
        assert!(reason.contains("a step has been running for 1 s"), "{reason}");
        status.accepts().unwrap();
        status.step_ends(1000, Duration::from_secs(1));
        status.health().unwrap();
        status.die("first");
        status.die("second");
        assert_eq!((status.health(), status.accepts()), (Err("first".into()), Err("first".into())));
    }
}

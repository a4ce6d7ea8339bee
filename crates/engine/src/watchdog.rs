//! A thread that sees whether a group of ranks makes progress, and ends it when it does not.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use longhaul_backend::Collective;
use longhaul_collective::Pulse;

use crate::step_deadline::StepDeadline;

/// How often it looks.
const TICK: Duration = Duration::from_millis(50);
/// Time that is counted of a tick at most: a process that was stopped, or starved, does not blame others for it.
const MOST_OF_A_TICK: Duration = Duration::from_millis(200);
/// What the owner of a group that has ended gets to end in an orderly way.
const GRACE: Duration = Duration::from_millis(1500);

/// Ends a group in which nothing moves: no rank has published an exchange for longer than a step's limit ([`StepDeadline`]).
/// Ranks wait for each other after every half layer, so a step that is long makes progress all the time, and one stuck rank
/// soon stops all.
///
/// A group that has ended, for whatever reason, is to be dropped by its owner. If that does not happen, because the owner is
/// the one who is stuck or waits for a user, `lost` hears why the group ended.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    /// `None` once it is being taken down.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct State {
    deadline: StepDeadline,
    step: Option<Step>,
}

/// A step that is running.
struct Step {
    size: u64,
    limit: Duration,
    /// Time since anything has moved, and the longest such time.
    still: Duration,
    longest: Duration,
}

/// Ends a step when dropped.
pub(crate) struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if let Some(step) = state.step.take() {
            // What happened since the last look counts as a whole tick.
            state.deadline.record(step.size, step.longest.max(step.still) + TICK);
        }
    }
}

impl Watchdog {
    /// Watches `group`, which any rank's view of it will do for. Without a `pulse`, a step's end is the only progress.
    ///
    /// # Errors
    /// The system's, for want of a thread.
    pub(crate) fn start(
        group: Arc<dyn Collective>,
        pulse: Option<Pulse>,
        limit: Option<Duration>,
        lost: fn(&str),
    ) -> std::io::Result<Self> {
        let state = State { deadline: StepDeadline::new(limit), step: None };
        let shared = Arc::new(Shared { state: Mutex::new(state) });
        let (stop, stopped) = channel();
        let watched = shared.clone();
        let watch = move || {
            let mut eye = Eye { group, pulse, seen: Vec::new(), ended_for: Duration::ZERO };
            let mut last = Instant::now();
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(TICK) {
                let now = Instant::now();
                let passed = (now - last).min(MOST_OF_A_TICK);
                last = now;
                eye.look(&watched, passed);
                if eye.ended_for >= GRACE {
                    let message = eye.group.check().err().map(|error| error.to_string());
                    lost(&message.unwrap_or_default());
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("longhaul-watchdog".into()).spawn(watch)?;
        Ok(Self { shared, stop: Some(stop), thread: Some(thread) })
    }

    /// A step of `size` operations runs until the result is dropped.
    pub(crate) fn step(&self, size: u64) -> Running<'_> {
        let mut state = self.shared.state();
        let limit = state.deadline.limit(size);
        state.step = Some(Step { size, limit, still: Duration::ZERO, longest: Duration::ZERO });
        drop(state);
        Running(&self.shared)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It looks a last time and ends.
            let _ = thread.join();
        }
    }
}

/// What the thread sees.
struct Eye {
    group: Arc<dyn Collective>,
    pulse: Option<Pulse>,
    /// The pulse when it last changed.
    seen: Vec<u32>,
    /// How long the group has ended.
    ended_for: Duration,
}

impl Eye {
    fn look(&mut self, shared: &Shared, passed: Duration) {
        if self.group.check().is_err() {
            self.ended_for += passed;
            return;
        }
        let pulse = self.pulse.as_ref().map(Pulse::exchanges).unwrap_or_default();
        let moved = pulse != self.seen;
        self.seen = pulse;
        let mut state = shared.state();
        let Some(step) = &mut state.step else { return };
        if moved {
            step.longest = step.longest.max(step.still);
            step.still = Duration::ZERO;
            return;
        }
        step.still += passed;
        if step.still >= step.limit {
            let (still, limit) = (step.still, step.limit);
            drop(state);
            self.group.abort(&format!(
                "{} for {:.1} s in a step, the limit is {:.1} s (--step-timeout)",
                self.culprits(),
                still.as_secs_f64(),
                limit.as_secs_f64()
            ));
        }
    }

    /// The ranks that are behind the others, in words.
    fn culprits(&self) -> String {
        let foremost =
            self.seen.iter().copied().reduce(|a, b| if b.wrapping_sub(a) < 1 << 31 { b } else { a });
        let behind: Vec<String> = self
            .seen
            .iter()
            .enumerate()
            .filter(|(_, seen)| Some(**seen) != foremost)
            .map(|(rank, _)| rank.to_string())
            .collect();
        match behind.len() {
            0 => "no rank made progress".into(),
            1 => format!("rank {} made no progress", behind.join(", ")),
            _ => format!("ranks {} made no progress", behind.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use longhaul_backend::CollectiveError;
    use longhaul_collective::{Options, Threads};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    fn group(size: usize) -> (Vec<Arc<Threads>>, Pulse) {
        let options = Options { timeout: Duration::MAX, ..Options::default() };
        let ranks: Vec<_> = Threads::group(size, options).unwrap().into_iter().map(Arc::new).collect();
        let pulse = ranks[0].pulse();
        (ranks, pulse)
    }

    #[test]
    fn a_rank_that_hangs_is_named_and_the_others_go_on() {
        let (ranks, pulse) = group(3);
        let dog = Watchdog::start(ranks[0].clone(), Some(pulse), Some(LIMIT), |_| ()).unwrap();
        let _running = dog.step(1);
        let waiting: Vec<_> = [0, 2]
            .map(|rank| (ranks[rank].clone(), thread::spawn))
            .map(|(r, go)| go(move || r.barrier()))
            .into();
        for waiting in waiting {
            let error = waiting.join().unwrap().unwrap_err();
            assert!(
                matches!(&error, CollectiveError::Aborted { rank: 0, message }
                    if message.starts_with("rank 1 made no progress for 1.")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_long_step_that_moves_and_a_group_at_rest_are_left_alone() {
        let (ranks, pulse) = group(2);
        let dog = Watchdog::start(ranks[0].clone(), Some(pulse), Some(LIMIT), |_| ()).unwrap();
        let running = dog.step(1);
        let start = Instant::now();
        thread::scope(|scope| {
            for rank in &ranks {
                scope.spawn(|| {
                    for _ in 0..12 {
                        thread::sleep(LIMIT / 8);
                        rank.barrier().unwrap();
                    }
                });
            }
        });
        assert!(start.elapsed() > LIMIT);
        drop(running);
        thread::sleep(LIMIT * 3 / 2);
        ranks[0].check().unwrap();
    }

    static LOST: AtomicUsize = AtomicUsize::new(0);

    #[test]
    fn an_owner_that_does_not_end_is_told() {
        let (ranks, _) = group(2);
        let lost = |message: &str| {
            assert!(message.contains("a test's reason"), "{message}");
            LOST.fetch_add(1, Ordering::SeqCst);
        };
        let dog = Watchdog::start(ranks[0].clone(), None, None, lost).unwrap();
        ranks[1].abort("a test's reason");
        while LOST.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        drop(dog);
        assert_eq!(LOST.load(Ordering::SeqCst), 1);
    }
}

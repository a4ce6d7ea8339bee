//! Sums over the ranks beside a rank's own threads.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use longhaul_backend::{Collective, CollectiveError};

type Outcome = Result<Vec<f32>, CollectiveError>;

/// A thread that takes sums in the order in which they are asked for.
pub(crate) struct Exchanger {
    group: Arc<dyn Collective>,
    /// `None` once the thread is to end.
    requests: Option<Sender<(Vec<f32>, Sender<Outcome>)>>,
    thread: Option<JoinHandle<()>>,
}

/// A sum that has been asked for.
pub(crate) struct Sums {
    rank: usize,
    outcome: Receiver<Outcome>,
}

impl Exchanger {
    pub(crate) fn start_thread(group: Arc<dyn Collective>) -> io::Result<Self> {
        let (requests, incoming) = channel::<(Vec<f32>, Sender<Outcome>)>();
        let name = format!("longhaul-exchange-{}", group.rank());
        let exchange = {
            let group = group.clone();
            move || {
                for (mut values, outcome) in incoming {
                    let result = group.all_reduce(values.as_mut_slice().into());
                    // Nobody waits for it after a failure elsewhere in the step.
                    let _ = outcome.send(result.map(|()| values));
                }
            }
        };
        let thread = thread::Builder::new().name(name).spawn(exchange)?;
        Ok(Self { group, requests: Some(requests), thread: Some(thread) })
    }

    /// Starts to sum `values` over the ranks.
    pub(crate) fn start(&self, values: Vec<f32>) -> Result<Sums, CollectiveError> {
        let (sender, outcome) = channel();
        let sums = Sums { rank: self.group.rank(), outcome };
        let sent = self.requests.as_ref().is_some_and(|requests| requests.send((values, sender)).is_ok());
        if sent { Ok(sums) } else { Err(sums.ended()) }
    }
}

impl Sums {
    fn ended(&self) -> CollectiveError {
        let message = "its thread of exchanges ended".into();
        CollectiveError::RankFailed { rank: self.rank, message }
    }

    /// Waits for the sums.
    pub(crate) fn wait(self) -> Outcome {
        self.outcome.recv().unwrap_or_else(|_| Err(self.ended()))
    }
}

impl Drop for Exchanger {
    fn drop(&mut self) {
        if thread::panicking() {
            // The other ranks would wait for the rest of the step, and the thread below for them.
            self.group.abort("a rank panicked");
        }
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked, whoever waited for it has been told.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use longhaul_collective::{Options, Threads};

    use super::*;

    #[test]
    fn sums_are_taken_in_order_while_the_rank_goes_on() {
        let groups = Threads::group(3, Options::default()).unwrap();
        thread::scope(|scope| {
            for (rank, group) in groups.into_iter().enumerate() {
                scope.spawn(move || {
                    let exchanger = Exchanger::start_thread(Arc::new(group)).unwrap();
                    let start = |length: usize| exchanger.start(vec![rank as f32; length]).unwrap();
                    // All are started before the first is waited for.
                    let sums: Vec<Sums> = [1, 10_000, 0, 7].map(start).into();
                    let lengths = sums.into_iter().map(|sums| {
                        let values = sums.wait().unwrap();
                        assert!(values.iter().all(|&v| v == 3.0));
                        values.len()
                    });
                    assert_eq!(lengths.collect::<Vec<_>>(), [1, 10_000, 0, 7]);
                });
            }
        });
    }

    #[test]
    fn a_rank_that_panics_ends_the_sums_of_the_others() {
        let mut groups = Threads::group(2, Options::default()).unwrap().into_iter();
        let (first, second) = (groups.next().unwrap(), groups.next().unwrap());
        let waiting = thread::spawn(move || {
            let exchanger = Exchanger::start_thread(Arc::new(first)).unwrap();
            exchanger.start(vec![1.0]).unwrap().wait()
        });
        let panicking = thread::spawn(move || {
            let _exchanger = Exchanger::start_thread(Arc::new(second)).unwrap();
            panic!("a test's panic");
        });
        assert!(panicking.join().is_err());
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error, CollectiveError::Aborted { rank: 1, message: "a rank panicked".into() });
    }
}

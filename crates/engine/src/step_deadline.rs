//! How long a group may go without progress in a step.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The limit is never shorter: ranks take turns on few cores, and a machine has other things to do.
const LEAST: Duration = Duration::from_secs(5);
/// The limit before anything is known.
const FIRST: Duration = Duration::from_secs(120);
/// The limit is never longer.
const MOST: Duration = Duration::from_secs(600);
/// The limit is this many times what has been seen.
const FACTOR: u32 = 20;
/// Steps remembered of each size.
const REMEMBERED: usize = 100;

/// Longest time without progress that a step may have: 20 times the 99th percentile of what earlier steps of its size had,
/// at least 5 s. The size is in operations, so that a long prefill after a thousand decode steps is not mistaken for a hang.
///
/// A size that has not been seen (to a factor of two) is estimated from its neighbours: a larger step takes at most as much
/// longer as it is larger, a smaller one is no slower.
#[derive(Debug, Default)]
pub struct StepDeadline {
    /// What the user says instead.
    fixed: Option<Duration>,
    /// Longest times without progress by the binary logarithm of the size.
    seen: BTreeMap<u32, VecDeque<Duration>>,
}

impl StepDeadline {
    /// `fixed`: what the user says instead.
    pub fn new(fixed: Option<Duration>) -> Self {
        Self { fixed, ..Self::default() }
    }

    /// A step of `size` operations ended well; `longest` is the longest time it went without progress.
    pub fn record(&mut self, size: u64, longest: Duration) {
        let seen = self.seen.entry(size.max(1).ilog2()).or_default();
        if seen.len() == REMEMBERED {
            seen.pop_front();
        }
        seen.push_back(longest);
    }

    /// The limit of a step of `size` operations.
    pub fn limit(&self, size: u64) -> Duration {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        let class = size.max(1).ilog2();
        let below = self.seen.range(..=class).next_back().map(|(&smaller, seen)| {
            percentile_99(seen).saturating_mul(1u32.checked_shl(class - smaller).unwrap_or(u32::MAX))
        });
        let above = self.seen.range(class..).next().map(|(_, seen)| percentile_99(seen));
        let expected = below.into_iter().chain(above).min();
        expected.map_or(FIRST, |expected| expected.saturating_mul(FACTOR)).clamp(LEAST, MOST)
    }
}

/// By nearest rank.
fn percentile_99(seen: &VecDeque<Duration>) -> Duration {
    let mut sorted: Vec<Duration> = seen.iter().copied().collect();
    sorted.sort_unstable();
    let rank = (sorted.len() * 99).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_the_user_says_counts() {
        let mut deadline = StepDeadline::new(Some(ms(700)));
        deadline.record(1 << 20, ms(9000));
        assert_eq!(deadline.limit(1 << 20), ms(700));
    }

    #[test]
    fn a_first_step_may_take_long_and_short_steps_get_the_least() {
        let mut deadline = StepDeadline::default();
        assert_eq!(deadline.limit(1 << 30), FIRST);
        deadline.record(1 << 30, ms(10));
        assert_eq!(deadline.limit(1 << 30), LEAST);
        // No step has a limit that nobody would wait for.
        deadline.record(1, ms(1000));
        assert_eq!(deadline.limit(u64::MAX), MOST);
        assert_eq!(deadline.limit(0), Duration::from_secs(20));
    }

    /// A prompt that is longer than all before it, after many fast decode steps, each time twice as long.
    #[test]
    fn a_step_that_is_just_long_never_reaches_its_limit() {
        let mut deadline = StepDeadline::default();
        for _ in 0..1000 {
            deadline.record(1_000_000, ms(30));
        }
        for doubled in 0..10 {
            let (size, takes) = (512_000_000u64 << doubled, ms(600 << doubled));
            assert!(deadline.limit(size) > takes, "{doubled}");
            deadline.record(size, takes);
            // Decode steps keep their own.
            assert_eq!(deadline.limit(1_000_000), LEAST);
        }
    }

    #[test]
    fn one_outlier_of_a_hundred_does_not_count() {
        let mut deadline = StepDeadline::default();
        for n in 0..REMEMBERED {
            deadline.record(64, if n == 7 { ms(60_000) } else { ms(500) });
        }
        assert_eq!(deadline.limit(64), Duration::from_secs(10));
        deadline.record(64, ms(60_000));
        assert_eq!(deadline.limit(64), MOST);
    }
}

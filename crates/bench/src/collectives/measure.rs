//! What a rank does: every case checked once, then timed.

use std::time::Instant;

use half::{bf16, f16};
use longhaul_backend::Collective;

use super::{Case, CollectivesError, Element, ElementType, Operation, Progress};
use crate::latency::Spread;

/// Seconds of calls that make up a sample, so that neither the clock nor the barrier before it count.
const SAMPLE_SECONDS: f64 = 1e-3;
/// Least and most samples: a median wants a few, and more than that tells nothing.
const SAMPLES: (usize, usize) = (7, 101);
/// Most calls of a sample.
const MOST_CALLS: usize = 1000;
/// Calls that are timed to choose the two.
const TRIALS: usize = 3;

/// How a case was timed, and what came of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timed {
    /// Samples.
    pub samples: usize,
    /// Calls of each, one after the other.
    pub calls: usize,
    /// Microseconds of a call, that of the slowest rank.
    pub microseconds: Spread,
}

/// Measures `cases` as one rank of `group`, each for about `case_seconds`; all ranks get the same figures.
pub(super) fn rank(
    group: &dyn Collective,
    cases: &[Case],
    case_seconds: f64,
    progress: Progress<'_>,
) -> Result<Vec<Timed>, CollectivesError> {
    let mut timed = Vec::with_capacity(cases.len());
    for (index, case) in cases.iter().enumerate() {
        let result = match case.element {
            ElementType::Float32 => measure::<f32>(group, case, case_seconds),
            ElementType::Bfloat16 => measure::<bf16>(group, case, case_seconds),
            ElementType::Float16 => measure::<f16>(group, case, case_seconds),
            ElementType::Int32 => measure::<i32>(group, case, case_seconds),
        };
        if let Err(error) = &result {
            group.abort(&error.to_string());
        }
        timed.push(result?);
        progress(index + 1, cases.len());
    }
    Ok(timed)
}

/// The message of one case on one rank.
struct Message<E> {
    case: Case,
    /// The whole message.
    whole: Vec<E>,
    /// This rank's share of it.
    share: Vec<E>,
    /// Elements of every rank's share.
    counts: Vec<usize>,
}

/// What element `i` of `rank` is before the first call: small, so that sums over 64 ranks are exact in every type.
fn value(rank: usize, i: usize) -> u8 {
    ((rank + i) % 3) as u8
}

impl<E: Element> Message<E> {
    fn new(group: &dyn Collective, case: &Case) -> Result<Self, CollectivesError> {
        let (rank, ranks) = (group.rank(), group.world_size());
        let elements = case.bytes / case.element.size();
        let counts: Vec<usize> =
            (0..ranks).map(|r| elements / ranks + usize::from(r < elements % ranks)).collect();
        let filled = |length: usize| {
            let mut values: Vec<E> = Vec::new();
            let room = values.try_reserve_exact(length);
            room.map_err(|_| CollectivesError::Memory { bytes: case.bytes })?;
            values.extend((0..length).map(|i| E::small(value(rank, i))));
            Ok::<_, CollectivesError>(values)
        };
        let share = match case.operation {
            Operation::AllGather | Operation::ReduceScatter => counts.get(rank).copied().unwrap_or(0),
            _ => 0,
        };
        Ok(Self { case: *case, whole: filled(elements)?, share: filled(share)?, counts })
    }

    fn call(&mut self, group: &dyn Collective) -> Result<(), CollectivesError> {
        let Self { whole, share, counts, .. } = self;
        match self.case.operation {
            Operation::AllReduce => group.all_reduce(E::values_mut(whole))?,
            Operation::AllGather => group.all_gather(E::values(share), counts, E::values_mut(whole))?,
            Operation::ReduceScatter => {
                group.reduce_scatter(E::values(whole), counts, E::values_mut(share))?;
            }
            Operation::Broadcast => group.broadcast(0, E::values_mut(whole))?,
            Operation::Barrier => group.barrier()?,
        }
        Ok(())
    }

    /// Whether the first call did what it must.
    fn check(&self, group: &dyn Collective) -> Result<(), CollectivesError> {
        let (rank, ranks) = (group.rank(), group.world_size());
        let sum = |i: usize| (0..ranks).map(|r| f32::from(value(r, i))).sum::<f32>();
        let gathered = self.counts.iter().enumerate().flat_map(|(r, &n)| (0..n).map(move |i| value(r, i)));
        let start: usize = self.counts.iter().take(rank).sum();
        match self.case.operation {
            Operation::AllReduce => self.compare(rank, &self.whole, (0..).map(sum)),
            Operation::AllGather => self.compare(rank, &self.whole, gathered.map(f32::from)),
            Operation::ReduceScatter => self.compare(rank, &self.share, (start..).map(sum)),
            Operation::Broadcast => self.compare(rank, &self.whole, (0..).map(|i| value(0, i).into())),
            Operation::Barrier => Ok(()),
        }
    }

    fn compare(
        &self,
        rank: usize,
        found: &[E],
        expected: impl Iterator<Item = f32>,
    ) -> Result<(), CollectivesError> {
        let mut pairs = found.iter().map(|found| found.value()).zip(expected).enumerate();
        match pairs.find(|(_, (found, expected))| found != expected) {
            None => Ok(()),
            Some((index, (found, expected))) => Err(CollectivesError::Wrong {
                operation: self.case.operation.name(),
                bytes: self.case.bytes,
                element: self.case.element.name(),
                index,
                rank,
                found,
                expected,
            }),
        }
    }

    /// Seconds of `calls` calls, one after the other. Sums grow to infinity, which takes no longer.
    fn sample(&mut self, group: &dyn Collective, calls: usize) -> Result<f64, CollectivesError> {
        group.barrier()?;
        let start = Instant::now();
        for _ in 0..calls {
            self.call(group)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

fn measure<E: Element>(
    group: &dyn Collective,
    case: &Case,
    case_seconds: f64,
) -> Result<Timed, CollectivesError> {
    let mut message = Message::<E>::new(group, case)?;
    message.call(group)?;
    message.check(group)?;
    let trial = message.sample(group, TRIALS)? / TRIALS as f64;
    let mut plan = [calls(trial) as i32, samples(trial, case_seconds) as i32];
    // Rank 0's choice.
    group.broadcast(0, (&mut plan[..]).into())?;
    let [calls, samples] = plan.map(|n| n as usize);
    let seconds =
        (0..samples).map(|_| message.sample(group, calls)).collect::<Result<Vec<f64>, CollectivesError>>()?;
    Ok(Timed { samples, calls, microseconds: slowest(group, &seconds, calls)? })
}

/// Calls of a sample, when one takes `seconds`.
fn calls(seconds: f64) -> usize {
    ((SAMPLE_SECONDS / seconds) as usize).clamp(1, MOST_CALLS)
}

/// Samples in `case_seconds`, when a call takes `seconds`.
fn samples(seconds: f64, case_seconds: f64) -> usize {
    ((case_seconds / (seconds * calls(seconds) as f64)) as usize).clamp(SAMPLES.0, SAMPLES.1)
}

/// Microseconds of a call: of every sample that of the slowest rank.
fn slowest(group: &dyn Collective, seconds: &[f64], calls: usize) -> Result<Spread, CollectivesError> {
    let own: Vec<f32> = seconds.iter().map(|s| (s * 1e6 / calls as f64) as f32).collect();
    let mut all = vec![0f32; own.len() * group.world_size()];
    group.all_gather((&own[..]).into(), &vec![own.len(); group.world_size()], (&mut all[..]).into())?;
    let of_sample = |i: usize| all.iter().skip(i).step_by(own.len()).copied().fold(0f32, f32::max);
    Ok(Spread::of((0..own.len()).map(|i| f64::from(of_sample(i))).collect()))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use longhaul_backend::{CollectiveError, Values, ValuesMut};

    use super::*;

    /// A group of one that gets `at` wrong.
    struct Faulty(Mutex<usize>);

    impl Collective for Faulty {
        fn rank(&self) -> usize {
            0
        }
        fn world_size(&self) -> usize {
            1
        }
        fn all_reduce(&self, values: ValuesMut<'_>) -> Result<(), CollectiveError> {
            if let ValuesMut::F32(values) = values {
                values[7] = 9.0;
            }
            Ok(())
        }
        fn reduce_scatter(
            &self,
            _: Values<'_>,
            _: &[usize],
            _: ValuesMut<'_>,
        ) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn all_gather(&self, _: Values<'_>, _: &[usize], _: ValuesMut<'_>) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn broadcast(&self, _: usize, _: ValuesMut<'_>) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn barrier(&self) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn check(&self) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn abort(&self, _: &str) {
            *self.0.lock().unwrap() += 1;
        }
    }

    #[test]
    fn a_wrong_result_is_no_figure() {
        let group = Faulty(Mutex::new(0));
        let case = Case { operation: Operation::AllReduce, element: ElementType::Float32, bytes: 64 };
        let error = rank(&group, &[case], 0.0, &mut |_, _| {}).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("element 7 on rank 0 is 9, not 1"), "{message}");
        assert_eq!(*group.0.lock().unwrap(), 1);
    }

    #[test]
    fn short_calls_are_timed_together() {
        assert_eq!((calls(1e-9), calls(1e-5), calls(1.0)), (1000, 100, 1));
        assert_eq!([1e-5, 1e-3, 1e-2, 1.0].map(|s| samples(s, 0.2)), [101, 101, 20, 7]);
    }
}

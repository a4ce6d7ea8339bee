//! A tensor-parallel group in one process: a thread a rank, each with its own shard and KV pool, on any device.
//!
//! The leader is rank 0 on the caller's thread: it hands every step to the followers, runs its own part, and draws
//! tokens together with them: the logits of a rank stay where they are. The first failure of any rank ends the group, so
//! nobody waits for a rank that is gone.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use longhaul_backend::{Collective, CollectiveError, Error as BackendError};
use longhaul_backend::{Sampled, SamplingRow, StepInputs};
use longhaul_model::ModelError;

use crate::runner::{Goal, RankRunner, Runner};
use crate::{EngineError, Result};

/// How long a rank may take to notice that the group has ended.
const GRACE: Duration = Duration::from_millis(1500);

/// A rank that does what the leader does, on a thread of its own.
pub(crate) struct Follower {
    rank: usize,
    /// `None` once the group is being taken down.
    steps: Option<Sender<(StepInputs, Goal)>>,
    results: Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
    /// Nobody waits for a thread that did not stop.
    is_stuck: bool,
}

impl Follower {
    /// Starts the thread of `group`'s rank; `step` is its part of a step.
    pub(crate) fn spawn(
        group: Arc<dyn Collective>,
        mut step: impl FnMut(StepInputs, &Goal) -> Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let rank = group.rank();
        let (steps, orders) = channel::<(StepInputs, Goal)>();
        let (outcomes, results) = channel();
        let follow = move || {
            for (inputs, goal) in orders {
                // What failed for the request alone failed on the leader, too, which reports it.
                let result = match step(inputs, &goal) {
                    Err(error) if is_of_the_request(&error) => Ok(()),
                    result => result,
                };
                if let Err(error) = &result {
                    group.abort(&error.to_string());
                }
                if outcomes.send(result).is_err() {
                    break;
                }
            }
            // A panic drops `group` while unwinding, which ends the group.
        };
        let thread = thread::Builder::new().name(format!("longhaul-rank-{rank}")).spawn(follow)?;
        Ok(Self { rank, steps: Some(steps), results, thread: Some(thread), is_stuck: false })
    }

    fn start(&self, inputs: StepInputs, goal: Goal) {
        if let Some(steps) = &self.steps {
            // A thread that is gone shows when its result is missing.
            let _ = steps.send((inputs, goal));
        }
    }

    /// Waits for the result of the step; when the group `has_ended`, no longer than [`GRACE`].
    fn finish(&mut self, has_ended: bool) -> Result<()> {
        let received = if has_ended {
            self.results.recv_timeout(GRACE)
        } else {
            self.results.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        received.unwrap_or_else(|reason| {
            let message = match reason {
                RecvTimeoutError::Disconnected => "its thread ended".into(),
                RecvTimeoutError::Timeout => {
                    self.is_stuck = true;
                    format!("it did not stop within {GRACE:?} of the end of the group")
                }
            };
            let error = CollectiveError::RankFailed { rank: self.rank, message };
            Err(EngineError::Backend(BackendError::Collective(error)))
        })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.steps = None;
        if let Some(thread) = self.thread.take().filter(|_| !self.is_stuck) {
            // How it ended has been reported as the result of its last step.
            let _ = thread.join();
        }
    }
}

/// The [`Runner`] on a group of ranks.
pub(crate) struct RankedRunner {
    followers: Vec<Follower>,
    group: Arc<dyn Collective>,
    leader: Box<dyn RankRunner>,
}

impl Drop for RankedRunner {
    fn drop(&mut self) {
        if thread::panicking() {
            // Followers may be waiting for the leader's part.
            self.group.abort("the leader panicked");
        }
    }
}

impl RankedRunner {
    /// `group` is the leader's.
    pub(crate) fn new(
        leader: Box<dyn RankRunner>,
        group: Arc<dyn Collective>,
        followers: Vec<Follower>,
    ) -> Self {
        Self { followers, group, leader }
    }

    /// Runs a step on all ranks; `lead` is the leader's part, which has the same goal.
    fn together<R>(
        &mut self,
        inputs: StepInputs,
        goal: Goal,
        lead: impl FnOnce(&mut dyn RankRunner, StepInputs) -> Result<R>,
    ) -> Result<R> {
        // What contradicts itself is refused before anybody starts: the group outlives it.
        self.leader.check(&inputs)?;
        self.group.check().map_err(BackendError::from)?;
        for follower in &self.followers {
            follower.start(inputs.clone(), goal.clone());
        }
        let result = lead(self.leader.as_mut(), inputs);
        let has_ended = result.as_ref().is_err_and(|error| !is_of_the_request(error));
        if let Err(error) = &result
            && has_ended
        {
            self.group.abort(&error.to_string());
        }
        let mut first = None;
        for follower in &mut self.followers {
            if let Err(source) = follower.finish(has_ended)
                && first.as_ref().is_none_or(|(_, first)| is_consequence(first))
                && (first.is_none() || !is_consequence(&source))
            {
                first = Some((follower.rank, source));
            }
        }
        match (result, first) {
            // The cause says more than that the group has ended.
            (Err(error), Some((rank, source))) if is_consequence(&error) && !is_consequence(&source) => {
                Err(EngineError::Rank { rank, source: Box::new(source) })
            }
            (Ok(_), Some((rank, source))) => Err(EngineError::Rank { rank, source: Box::new(source) }),
            (result, _) => result,
        }
    }
}

/// Whether only the request failed, after all ranks had done their part.
fn is_of_the_request(error: &EngineError) -> bool {
    use BackendError::{NotFinite, NothingAllowed, Sampling};
    let (EngineError::Backend(error) | EngineError::Model(ModelError::Backend(error))) = error else {
        return false;
    };
    matches!(error, NotFinite { .. } | NothingAllowed { .. } | Sampling { .. })
}

/// Whether this says no more than that the group has ended.
fn is_consequence(error: &EngineError) -> bool {
    let (EngineError::Backend(error) | EngineError::Model(ModelError::Backend(error))) = error else {
        return false;
    };
    matches!(
        error,
        BackendError::Collective(CollectiveError::Aborted { .. } | CollectiveError::RankFailed { .. })
    )
}

impl Runner for RankedRunner {
    fn sample(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>> {
        self.together(inputs, Goal::tokens(rows), |leader, inputs| leader.sample(inputs, rows))
    }

    fn logits(&mut self, inputs: StepInputs) -> Result<Vec<f32>> {
        self.together(inputs, Goal::Logits, |leader, inputs| leader.logits(inputs))
    }

    fn max_rows(&self) -> usize {
        self.leader.max_rows()
    }

    fn default_chunk(&self) -> usize {
        self.leader.default_chunk()
    }

    fn is_on_host(&self) -> bool {
        self.leader.is_on_host()
    }

    fn max_logit_rows(&self) -> usize {
        self.leader.max_logit_rows()
    }
}

#[cfg(test)]
mod tests {
    use longhaul_backend::{DType, KvLayout, SequenceInputs};
    use longhaul_collective::{Options, Threads};
    use longhaul_cpu::{Cpu, Precision};
    use longhaul_model::{Model, ModelSpec, PositionProfile, ShardOptions, ShardPlan};
    use longhaul_weights::Checkpoint;

    use super::*;
    use crate::demo;
    use crate::runner::CpuRunner;

    /// The demo over three ranks; `fault` is what rank 1 does instead of its part from the second step on.
    fn demo_with(fault: Option<fn() -> Result<()>>) -> RankedRunner {
        let spec = ModelSpec::from_config(demo::CONFIG, "config.json").unwrap();
        let positions = PositionProfile::new(&spec, None, Some(64)).unwrap();
        let plan = ShardPlan::new(&spec, 3, &ShardOptions::default()).unwrap();
        let source = Checkpoint::from_bytes(demo::WEIGHTS, "demo", &spec.tensors(), &[]).unwrap();
        let load = |group: &Arc<dyn Collective>| {
            let cpu = Cpu::new(1, Precision::F32).unwrap().in_group(group.clone());
            let rank = group.rank();
            let model =
                Model::load_shard(cpu, &spec, &positions, (&plan, rank), &source, &mut |_, _| {}).unwrap();
            let block_size = positions.block_size();
            let layout: KvLayout = plan.ranks()[rank].kv_layout(&spec, block_size, 4, DType::F32);
            CpuRunner::new(model, layout).unwrap()
        };
        let mut groups = Threads::group(3, Options::default())
            .unwrap()
            .into_iter()
            .map(|group| Arc::new(group) as Arc<dyn Collective>);
        let leading = groups.next().unwrap();
        let followers = groups.map(|group| {
            let mut runner = load(&group);
            let faulty = fault.filter(|_| group.rank() == 1);
            let mut steps = 0;
            Follower::spawn(group, move |inputs, goal| {
                steps += 1;
                match faulty {
                    Some(fault) if steps > 1 => fault(),
                    _ => runner.follow(inputs, goal),
                }
            })
            .unwrap()
        });
        let followers = followers.collect();
        RankedRunner::new(Box::new(load(&leading)), leading, followers)
    }

    fn token(position: usize) -> StepInputs {
        StepInputs {
            ids: vec![5],
            logit_scales: vec![0.1],
            sequences: vec![SequenceInputs { rows: 1, kv_len: position + 1, block_table: vec![0, 1, 2, 3] }],
            logit_rows: vec![0],
        }
    }

    #[test]
    fn a_rank_that_fails_ends_the_step_for_all_and_says_why() {
        let mut group = demo_with(Some(|| {
            Err(EngineError::Backend(BackendError::OutOfMemory { what: "a test".into(), bytes: 7 }))
        }));
        group.logits(token(0)).unwrap();
        let error = group.logits(token(1)).unwrap_err();
        assert!(
            matches!(&error, EngineError::Rank { rank: 1, source }
            if matches!(**source, EngineError::Backend(BackendError::OutOfMemory { .. }))),
            "{error}"
        );
        // The group has ended; nobody waits.
        let error = group.logits(token(2)).unwrap_err();
        assert!(is_consequence(&error), "{error}");
    }

    #[test]
    fn a_rank_that_panics_is_named() {
        let mut group = demo_with(Some(|| panic!("a test's panic")));
        group.logits(token(0)).unwrap();
        let error = group.logits(token(1)).unwrap_err();
        assert!(is_consequence(&error), "{error}");
        assert!(error.to_string().contains("rank 1"), "{error}");
    }

    #[test]
    fn a_plan_that_contradicts_itself_harms_nobody() {
        let mut group = demo_with(None);
        let before = group.logits(token(0)).unwrap();
        let broken = StepInputs { logit_scales: Vec::new(), ..token(1) };
        assert!(matches!(group.logits(broken), Err(EngineError::Backend(BackendError::Step(_)))));
        assert_eq!(group.logits(token(0)).unwrap(), before);
    }

    #[test]
    fn ranks_draw_from_their_slices_and_outlive_a_row_that_fails() {
        let mut group = demo_with(None);
        let logits = group.logits(token(0)).unwrap();
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let best = logits.iter().position(|logit| *logit == largest).unwrap() as u32;
        let greedy = SamplingRow::default();
        let nothing = vec![0; logits.len().div_ceil(32)];
        let masked = SamplingRow { allowed: Some(&nothing), ..SamplingRow::default() };
        for _ in 0..2 {
            let error = group.sample(token(0), std::slice::from_ref(&masked)).unwrap_err();
            assert!(is_of_the_request(&error), "{error}");
            assert_eq!(group.sample(token(0), std::slice::from_ref(&greedy)).unwrap()[0].id, best);
        }
        let banned = [best];
        let row = SamplingRow { banned: &banned, temperature: 1.0, seed: 3, ..SamplingRow::default() };
        assert_ne!(group.sample(token(0), &[row]).unwrap()[0].id, best);
    }
}

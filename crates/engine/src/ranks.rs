//! A tensor-parallel group: a thread a rank, each with its own shard and KV pool, on any device; and ranks on other nodes.
//!
//! The leader is rank 0 on the caller's thread: it hands every step to the other members, runs its own part, and draws
//! tokens together with them: the logits of a rank stay where they are. The first failure of any rank ends the group, so
//! nobody waits for a rank that is gone, and not for long for one that hangs.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use longhaul_backend::{Collective, CollectiveError, Error as BackendError};
use longhaul_backend::{SamplingRow, StepInputs};
use longhaul_model::ModelSpec;

use crate::runner::{BlockChanges, Goal, Order, Outcome, RankRunner, Runner, WholeLogits};
use crate::watchdog::{Running, Watchdog};
use crate::{EngineError, Result};

/// How often a wait looks whether the group still stands.
const LOOK: Duration = Duration::from_millis(20);

/// What members get to end their part of a step once the group has ended: a rank in a long operation, or one that hangs, is
/// not waited for.
pub(crate) struct Grace {
    allowed: Duration,
    since: Option<Instant>,
}

impl Default for Grace {
    fn default() -> Self {
        Self { allowed: Duration::from_millis(500), since: None }
    }
}

impl Grace {
    /// Whether it is used up; it begins when this is first asked.
    pub(crate) fn is_over(&mut self) -> bool {
        self.since.get_or_insert_with(Instant::now).elapsed() >= self.allowed
    }
}

/// One or more ranks that do what the leader does.
pub(crate) trait Member: Send {
    /// The (first) rank.
    fn rank(&self) -> usize;

    /// Starts its part of what all do.
    fn start(&mut self, order: &Order);

    /// Waits for the end of that part; when the group has ended, as long as `grace` lasts.
    fn finish(&mut self, grace: &mut Grace) -> Result<()>;
}

/// Watches the steps of a group.
pub(crate) struct Watch {
    pub watchdog: Watchdog,
    /// Says how many operations a step has.
    pub spec: ModelSpec,
}

impl Watch {
    /// What all do runs until the result is dropped.
    pub(crate) fn watch(&self, order: &Order) -> Running<'_> {
        self.watchdog.step(match order {
            Order::Step(inputs, _) => self.spec.step_flops(&inputs.sequences),
            Order::Blocks(_) => 0,
        })
    }
}

const PANICKED: &str = "its thread panicked";

fn rank_failed(group: &dyn Collective, message: &str) -> EngineError {
    let error = CollectiveError::RankFailed { rank: group.rank(), message: message.into() };
    EngineError::Backend(BackendError::Collective(error))
}

/// Ends the group when its thread panics.
struct PanicEnds(Arc<dyn Collective>);

impl Drop for PanicEnds {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.abort(PANICKED);
        }
    }
}

/// A rank that does what the leader does, on a thread of its own.
pub(crate) struct Follower {
    group: Arc<dyn Collective>,
    /// `None` once the group is being taken down.
    orders: Option<Sender<Order>>,
    results: Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Starts the thread of `group`'s rank; `obey` is its part of what all do.
    pub(crate) fn spawn(
        group: Arc<dyn Collective>,
        mut obey: impl FnMut(Order) -> Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, orders) = channel();
        let (outcomes, results) = channel();
        let ends = PanicEnds(group.clone());
        let follow = move || {
            let group = &ends.0;
            for order in orders {
                // What failed for the request alone failed on the leader, too, which reports it.
                let result = match obey(order) {
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
        };
        let name = format!("longhaul-rank-{}", group.rank());
        let thread = thread::Builder::new().name(name).spawn(follow)?;
        Ok(Self { group, orders: Some(sender), results, thread: Some(thread) })
    }
}

impl Member for Follower {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn start(&mut self, order: &Order) {
        if let Some(orders) = &self.orders {
            // A thread that is gone shows when its result is missing.
            let _ = orders.send(order.clone());
        }
    }

    fn finish(&mut self, grace: &mut Grace) -> Result<()> {
        loop {
            match self.results.recv_timeout(LOOK) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(rank_failed(&*self.group, "its thread ended"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Err(error) = self.group.check()
                && grace.is_over()
            {
                return Err(EngineError::Backend(BackendError::Collective(error)));
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.orders = None;
        let Some(thread) = self.thread.take() else { return };
        let mut grace = Grace::default();
        // A thread that hangs ends with the process.
        while !thread.is_finished() {
            if grace.is_over() {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        // How it ended has been reported as the result of its last step.
        let _ = thread.join();
    }
}

/// The [`Runner`] on a group of ranks.
pub(crate) struct RankedRunner {
    /// First of all: while members leave one by one, the group does not look well.
    watch: Option<Watch>,
    members: Vec<Box<dyn Member>>,
    group: Arc<dyn Collective>,
    leader: Box<dyn RankRunner>,
}

impl RankedRunner {
    /// `group` is the leader's.
    pub(crate) fn new(
        leader: Box<dyn RankRunner>,
        group: Arc<dyn Collective>,
        followers: Vec<Follower>,
    ) -> Self {
        let members = followers.into_iter().map(|follower| Box::new(follower) as Box<dyn Member>).collect();
        Self { watch: None, members, group, leader }
    }

    /// The same group with `nodes`, the ranks of other nodes, which leave it first.
    pub(crate) fn with_nodes(mut self, nodes: impl Member + 'static) -> Self {
        self.members.insert(0, Box::new(nodes));
        self
    }

    /// The same group under the eyes of a watchdog.
    pub(crate) fn watched(mut self, watch: Watch) -> Self {
        self.watch = Some(watch);
        self
    }

    /// Has all ranks do the same; `lead` is the leader's part.
    fn together<R>(
        &mut self,
        order: Order,
        lead: impl FnOnce(&mut dyn RankRunner, Order) -> Result<R>,
    ) -> Result<R> {
        // What contradicts itself is refused before anybody starts: the group outlives it.
        if let Order::Step(inputs, _) = &order {
            self.leader.check(inputs)?;
        }
        self.group.check().map_err(BackendError::from)?;
        let _running = self.watch.as_ref().map(|watch| watch.watch(&order));
        for member in &mut self.members {
            member.start(&order);
        }
        // A rank that panics ends the group, also when it is the caller's.
        let led = catch_unwind(AssertUnwindSafe(|| lead(self.leader.as_mut(), order)));
        let result = led.unwrap_or_else(|_| Err(rank_failed(&*self.group, PANICKED)));
        if let Err(error) = &result
            && !is_of_the_request(error)
        {
            self.group.abort(&error.to_string());
        }
        let mut first = None;
        let mut grace = Grace::default();
        for member in &mut self.members {
            if let Err(source) = member.finish(&mut grace)
                && first.as_ref().is_none_or(|(_, first)| is_consequence(first))
                && (first.is_none() || !is_consequence(&source))
            {
                first = Some((member.rank(), source));
            }
        }
        match (result, first) {
            // The cause says more than that the group has ended.
            (Err(error), Some((rank, source))) if is_consequence(&error) && !is_consequence(&source) => {
                Err(EngineError::Rank { rank, source: Box::new(source) })
            }
            // That the group has ended says whose fault it is.
            (Ok(_), Some((_, source))) if is_consequence(&source) => Err(source),
            (Ok(_), Some((rank, source))) => Err(EngineError::Rank { rank, source: Box::new(source) }),
            (result, _) => result,
        }
    }
}

/// Whether only the request failed, after all ranks had done their part.
fn is_of_the_request(error: &EngineError) -> bool {
    matches!(error.of_backend(), Some(BackendError::Sampling { .. }))
}

/// Whether this says no more than that the group has ended.
pub(crate) fn is_consequence(error: &EngineError) -> bool {
    if let EngineError::Rank { source, .. } = error {
        return is_consequence(source);
    }
    use CollectiveError::{Aborted, RankFailed};
    matches!(error.of_backend(), Some(BackendError::Collective(Aborted { .. } | RankFailed { .. })))
}

impl Runner for RankedRunner {
    fn run(&mut self, inputs: StepInputs, rows: &[SamplingRow<'_>], logits: WholeLogits) -> Result<Outcome> {
        let order = Order::Step(inputs, Goal::new(rows, logits));
        self.together(order, |leader, order| match order {
            Order::Step(inputs, _) => leader.run(inputs, rows, logits),
            Order::Blocks(_) => Ok(Outcome::default()),
        })
    }

    fn change_blocks(&mut self, changes: &BlockChanges) -> Result<()> {
        self.together(Order::Blocks(changes.clone()), |leader, _| leader.change_blocks(changes))
    }

    fn max_rows(&self) -> usize {
        self.leader.max_rows()
    }

    fn max_sequences(&self) -> usize {
        self.leader.max_sequences()
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

/// All results, or the first failure, preferably one that is not the consequence of another.
pub(crate) fn first_cause<T>(results: impl IntoIterator<Item = Result<T>>) -> Result<Vec<T>> {
    let mut first: Option<EngineError> = None;
    let mut all = Vec::new();
    for result in results {
        match result {
            Ok(value) => all.push(value),
            Err(error)
                if first.as_ref().is_none_or(|first| is_consequence(first) && !is_consequence(&error)) =>
            {
                first = Some(error);
            }
            Err(_) => {}
        }
    }
    first.map_or(Ok(all), Err)
}

#[cfg(test)]
mod tests {
    use longhaul_backend::{DType, KvLayout, RowError, SequenceInputs};
    use longhaul_collective::{Options, Threads};
    use longhaul_cpu::{Cpu, Precision};
    use longhaul_model::{Model, PositionProfile, ShardOptions, ShardPlan};
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
            Follower::spawn(group, move |order| {
                steps += 1;
                match (faulty, order) {
                    (Some(fault), _) if steps > 1 => fault(),
                    (_, Order::Step(inputs, goal)) => runner.follow(inputs, &goal),
                    (_, Order::Blocks(changes)) => runner.change_blocks(&changes),
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
            let outcome = group.run(token(0), std::slice::from_ref(&masked), WholeLogits::Stay).unwrap();
            assert_eq!(outcome.draws, [Err(RowError::NothingAllowed)]);
            assert_eq!(group.sample(token(0), std::slice::from_ref(&greedy)).unwrap()[0].id, best);
        }
        let banned = [best];
        let row = SamplingRow { banned: &banned, temperature: 1.0, seed: 3, ..SamplingRow::default() };
        assert_ne!(group.sample(token(0), &[row]).unwrap()[0].id, best);
    }
}

//! The ranks of a group that live in this process, whatever their devices: loaded together, a thread each, and then led or
//! following a leader on another node.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use longhaul_backend::Collective;
use longhaul_collective::{Options as GroupOptions, Pulse, Threads};
use longhaul_model::{ModelSpec, PositionProfile, ShardPlan};
use longhaul_weights::TensorSource;

use crate::device::{DeviceOptions, Placed};
use crate::nodes::{RemoteNodes, Worker};
use crate::ranks::{Follower, RankedRunner, Watch, first_cause};
use crate::runner::{Order, RankRunner, Runner};
use crate::watchdog::Watchdog;
use crate::{EngineError, Result};

/// A model on its way to ranks.
#[derive(Clone, Copy)]
pub(crate) struct Loading<'a> {
    pub options: &'a DeviceOptions,
    pub spec: &'a ModelSpec,
    pub positions: &'a PositionProfile,
    /// KV blocks of the pool.
    pub blocks: usize,
    pub plan: &'a ShardPlan,
    pub source: &'a (dyn TensorSource + Sync),
}

impl Loading<'_> {
    pub(crate) fn placed(&self, runner: Box<dyn Runner>, description: String) -> Placed {
        Placed { runner, blocks: self.blocks, block_size: self.positions.block_size(), description }
    }
}

/// A group's ranks that live here, and the pulse of what they exchange through the host.
pub(crate) struct LocalRanks {
    pub ranks: Vec<Arc<dyn Collective>>,
    pub pulse: Pulse,
}

impl LocalRanks {
    /// A group of `ranks`, all of which live here.
    ///
    /// # Errors
    /// [`EngineError::Parameter`] for a number that no group has.
    pub(crate) fn alone(ranks: usize) -> Result<Self> {
        // Ranks wait without end: the watchdog ends a step in which nothing moves.
        let options = GroupOptions { timeout: Duration::MAX, ..GroupOptions::default() };
        let of_tp = |message: String| EngineError::Parameter { name: "--tp", message };
        let threads = Threads::group(ranks, options).map_err(|e| of_tp(e.to_string()))?;
        let pulse = threads.first().map(Threads::pulse).ok_or_else(|| of_tp("must be at least 1".into()))?;
        let ranks = threads.into_iter().map(|rank| Arc::new(rank) as Arc<dyn Collective>).collect();
        Ok(Self { ranks, pulse })
    }
}

/// A rank's place in the group, and the rank.
type Loaded<R> = (Arc<dyn Collective>, R);

/// Ranks on devices of one kind.
pub(crate) trait Ranks: Sync {
    /// A rank before its shard is loaded.
    type Rank: Send;
    /// A rank with its shard.
    type Runner: RankRunner + 'static;

    /// The model.
    fn loading(&self) -> Loading<'_>;

    /// The devices, as the user would name them.
    fn name(&self) -> &str;

    /// Gives each rank its device.
    ///
    /// # Errors
    /// The device's.
    fn place_ranks(&self, ranks: Vec<Arc<dyn Collective>>) -> Result<Vec<Self::Rank>>;

    /// The rank's place in the group.
    fn collective<'a>(&self, rank: &'a Self::Rank) -> &'a Arc<dyn Collective>;

    /// Loads the rank's shard; `progress` hears (bytes read, bytes in all).
    ///
    /// # Errors
    /// The checkpoint's and the device's.
    fn load(&self, rank: Self::Rank, progress: &mut dyn FnMut(u64, u64)) -> Result<Self::Runner>;

    /// The group in words.
    fn describe(&self, leader: &Self::Runner) -> String {
        leader.description()
    }

    /// Longest time without progress in a step; `None` = what earlier steps suggest.
    fn step_timeout(&self) -> Option<Duration> {
        self.loading().options.step_timeout
    }

    /// Loads this node's ranks, of which the first is the leader, and waits for those of other nodes.
    ///
    /// # Errors
    /// A rank that cannot be loaded, by its number; that the group has ended meanwhile.
    fn lead(
        &self,
        local: LocalRanks,
        nodes: Option<RemoteNodes>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Placed> {
        let loading = self.loading();
        let (loaded, watch) = self.load_all(local, progress).inspect_err(|error| {
            if let Some(nodes) = &nodes {
                nodes.abort(&error.to_string());
            }
        })?;
        let mut loaded = loaded.into_iter();
        let Some((group, leader)) = loaded.next() else {
            return Err(EngineError::Parameter { name: "--tp", message: "must be at least 1".into() });
        };
        let followers = loaded.map(|(group, runner)| self.follower(group, runner)).collect::<Result<_>>()?;
        let description = self.describe(&leader);
        let mut runner = RankedRunner::new(Box::new(leader), group, followers).watched(watch);
        if let Some(nodes) = nodes {
            nodes.wait_until_ready()?;
            runner = runner.with_nodes(nodes);
        }
        Ok(loading.placed(Box::new(runner), description))
    }

    /// Loads this node's ranks and does what the leader says until it ends the group.
    ///
    /// # Errors
    /// A rank that cannot be loaded, by its number; why the group ended.
    fn work(&self, local: LocalRanks, worker: &Worker, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let (loaded, watch) =
            self.load_all(local, progress).inspect_err(|error| worker.abort(&error.to_string()))?;
        let followers: Vec<Follower> =
            loaded.into_iter().map(|(group, runner)| self.follower(group, runner)).collect::<Result<_>>()?;
        worker.run(followers, &watch)
    }

    /// Loads every rank on a thread of its own but the first. One that cannot load ends the group: nobody waits for it.
    fn load_all(
        &self,
        local: LocalRanks,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Vec<Loaded<Self::Runner>>, Watch)> {
        let mut ranks = self.place_ranks(local.ranks)?;
        let groups: Vec<_> = ranks.iter().map(|rank| self.collective(rank).clone()).collect();
        let watch = self.watch(groups.first(), local.pulse)?;
        let load = |rank: Self::Rank, progress: &mut dyn FnMut(u64, u64)| {
            let group = self.collective(&rank).clone();
            self.load(rank, progress).map_err(|source| {
                group.abort(&source.to_string());
                EngineError::Rank { rank: group.rank(), source: Box::new(source) }
            })
        };
        let others = ranks.split_off(ranks.len().min(1));
        let loaded: Vec<Result<Self::Runner>> = thread::scope(|scope| {
            let load = &load;
            let others: Vec<_> =
                others.into_iter().map(|rank| scope.spawn(move || load(rank, &mut |_, _| {}))).collect();
            let first: Vec<_> = ranks.into_iter().map(|rank| load(rank, progress)).collect();
            let others = others
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            first.into_iter().chain(others).collect()
        });
        Ok((groups.into_iter().zip(first_cause(loaded)?).collect(), watch))
    }

    /// Watches the steps of the group. Where sums do not pass the host, the end of a step is the only progress it sees.
    fn watch(&self, group: Option<&Arc<dyn Collective>>, pulse: Pulse) -> Result<Watch> {
        let Loading { options, spec, .. } = self.loading();
        let group = group
            .ok_or_else(|| EngineError::Device { device: self.name().into(), message: "no ranks".into() })?;
        let watchdog = Watchdog::start(group.clone(), Some(pulse), self.step_timeout(), options.group_lost)
            .map_err(|e| EngineError::Device {
            device: self.name().into(),
            message: format!("the watchdog could not be started: {e}"),
        })?;
        Ok(Watch { watchdog, spec: spec.clone() })
    }

    /// The rank on its thread.
    fn follower(&self, group: Arc<dyn Collective>, mut runner: Self::Runner) -> Result<Follower> {
        let rank = group.rank();
        let follower = Follower::spawn(group, move |order| match order {
            Order::Step(inputs, goal) => {
                // The step may come from another node.
                runner.check(&inputs)?;
                runner.follow(inputs, &goal)
            }
            Order::Blocks(changes) => runner.change_blocks(&changes),
        });
        follower.map_err(|e| EngineError::Device {
            device: self.name().into(),
            message: format!("the thread of rank {rank} could not be started: {e}"),
        })
    }
}

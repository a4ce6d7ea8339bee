//! The ranks of a tensor-parallel group on CUDA devices, one device a rank: how their partial sums come together.
//!
//! Three ways, chosen once for a group: our kernels over memory that the devices have mapped of each other, NCCL, or the host's
//! memory and a [`Collective`]. Sums are taken in rank order except NCCL's.

mod ending;
mod nccl;
mod transport;

use std::fmt;
use std::sync::Arc;

use longhaul_backend::{Collective, Single};

pub use self::nccl::{Nccl, NcclRank};

use self::ending::{Ending, Member};
use self::transport::{PeerRank, Transport};
use crate::context::Context;
use crate::driver::Driver;
use crate::ops::comm::{MOST_RANKS, PeerOptions, Region};
use crate::ops::norm::add_rms_norm;
use crate::tensor::Tensor;
use crate::weights::Vector;
use crate::{CudaError, Result};

/// How partial sums of the ranks come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AllReduce {
    /// Peer to peer where all devices map each other's memory, else NCCL where it is installed, else the host.
    #[default]
    Auto,
    /// Our kernels, over memory that the devices have mapped of each other.
    Peer,
    /// NVIDIA's library.
    Nccl,
    /// Through the host's memory: works everywhere, slow.
    Host,
}

impl fmt::Display for AllReduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AllReduce::Auto => "auto",
            AllReduce::Peer => "peer",
            AllReduce::Nccl => "nccl",
            AllReduce::Host => "host",
        })
    }
}

/// One rank's place in a group.
pub struct Group {
    collective: Arc<dyn Collective>,
    transport: Transport,
}

impl Group {
    /// A group of one rank: every sum is there already.
    pub fn single() -> Self {
        Self { collective: Arc::new(Single), transport: Transport::Host }
    }

    /// The ranks of a group, or those that live on this node: `collectives[i]` runs on `drivers[i]`.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] when the way that was asked for is not possible here, with the reason; the driver's.
    pub fn connect(
        drivers: &[Arc<dyn Driver>],
        collectives: Vec<Arc<dyn Collective>>,
        all_reduce: AllReduce,
    ) -> Result<Vec<Group>> {
        let blocks = drivers.iter().map(|d| PeerOptions::for_device(d.properties()).blocks).min();
        let options = PeerOptions { blocks: blocks.unwrap_or(1), ..PeerOptions::default() };
        Self::connect_with(drivers, collectives, all_reduce, options)
    }

    /// As [`Group::connect`] with other settings of peer-to-peer exchanges.
    ///
    /// # Errors
    /// As [`Group::connect`].
    pub fn connect_with(
        drivers: &[Arc<dyn Driver>],
        collectives: Vec<Arc<dyn Collective>>,
        all_reduce: AllReduce,
        options: PeerOptions,
    ) -> Result<Vec<Group>> {
        if drivers.len() != collectives.len() || drivers.is_empty() {
            let detail = format!("{} devices for {} ranks", drivers.len(), collectives.len());
            return Err(CudaError::shape("group", detail));
        }
        let spans_nodes = collectives.iter().any(|rank| rank.world_size() > drivers.len());
        let all_reduce = if spans_nodes { between_nodes(drivers, all_reduce)? } else { all_reduce };
        if drivers.len() == 1 && !spans_nodes {
            let over_host = |collective| Group { collective, transport: Transport::Host };
            return Ok(collectives.into_iter().map(over_host).collect());
        }
        let transports = match all_reduce {
            AllReduce::Host => hosts(drivers.len()),
            AllReduce::Peer => match peers(drivers, options)? {
                Ok(transports) => transports,
                Err(message) => return Err(unavailable(all_reduce, &message)),
            },
            AllReduce::Nccl => match nccl(drivers) {
                Ok(transports) => transports,
                Err(message) => return Err(unavailable(all_reduce, &message)),
            },
            AllReduce::Auto => match peers(drivers, options)? {
                Ok(transports) => transports,
                Err(_) => nccl(drivers).unwrap_or_else(|_| hosts(drivers.len())),
            },
        };
        let word = transports.iter().find_map(Transport::abort_word);
        let ending = Arc::new(Ending::new(word));
        let join = |(collective, transport): (Arc<dyn Collective>, Transport)| Group {
            collective: Arc::new(Member::new(collective, ending.clone())),
            transport: transport.watched_by(&ending),
        };
        Ok(collectives.into_iter().zip(transports).map(join).collect())
    }

    /// The group on the host's side. Its `abort` also ends waits of kernels and of NCCL.
    pub fn collective(&self) -> &Arc<dyn Collective> {
        &self.collective
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// Ranks in the group.
    pub fn world_size(&self) -> usize {
        self.collective.world_size()
    }

    /// The way that was chosen.
    pub fn all_reduce_way(&self) -> AllReduce {
        match self.transport {
            Transport::Host => AllReduce::Host,
            Transport::Peer(_) => AllReduce::Peer,
            Transport::Nccl(_) => AllReduce::Nccl,
        }
    }

    /// Whether sums can be part of a recording.
    pub fn can_be_recorded(&self) -> bool {
        self.world_size() == 1 || !matches!(self.transport, Transport::Host)
    }

    /// Meets the other ranks where the chosen way needs that (NCCL). Each rank calls it on its own thread, before anything else.
    ///
    /// # Errors
    /// [`CudaError::Collective`].
    pub fn join(&self, driver: &dyn Driver) -> Result<()> {
        match &self.transport {
            Transport::Nccl(rank) => {
                let id = rank.agree(&*self.collective)?;
                rank.join(driver, &id, self.rank(), self.world_size())
            }
            Transport::Host | Transport::Peer(_) => Ok(()),
        }
    }

    /// Sum of `x` over the ranks, in place.
    ///
    /// # Errors
    /// A rank that failed, or the device's. Peer to peer and with NCCL, failures of other ranks show in [`Group::check`].
    pub fn all_reduce(&self, ctx: &Context, x: Tensor) -> Result<Tensor> {
        if self.world_size() > 1 {
            match &self.transport {
                Transport::Host => transport::all_reduce_on_host(ctx, &*self.collective, &x)?,
                Transport::Peer(rank) => rank.all_reduce(ctx, &x)?,
                Transport::Nccl(rank) => rank.all_reduce(&*ctx.driver, &x)?,
            }
        }
        Ok(x)
    }

    /// [`add_rms_norm`] of the sum of `x` over the ranks.
    ///
    /// # Errors
    /// As [`Group::all_reduce`], and shapes that do not fit.
    pub fn all_reduce_add_rms_norm(
        &self,
        ctx: &Context,
        x: Tensor,
        residual: Option<&Tensor>,
        weight: &Vector,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        if let Transport::Peer(rank) = &self.transport
            && rank.fuses(&x)
        {
            return rank.all_reduce_add_rms_norm(ctx, &x, residual, weight, eps);
        }
        add_rms_norm(ctx, &self.all_reduce(ctx, x)?, residual, weight, eps)
    }

    /// Every rank's `x` (f32 `[rows, shares[rank]]`) side by side, through the host's memory: logits, once a step.
    ///
    /// # Errors
    /// Shapes that do not fit, a rank that failed, no room in the arena.
    pub fn all_gather(&self, ctx: &Context, x: Tensor, shares: &[usize]) -> Result<Tensor> {
        if shares.len() != self.world_size() || shares.get(self.rank()) != Some(&x.cols) {
            let detail = format!("{} columns on rank {} for shares {shares:?}", x.cols, self.rank());
            return Err(CudaError::shape("all_gather", detail));
        }
        if shares.len() == 1 {
            return Ok(x);
        }
        transport::all_gather_on_host(ctx, &*self.collective, &x, shares)
    }

    /// Whether all sums so far were complete. Waits for the device.
    ///
    /// # Errors
    /// [`CudaError::Collective`]: a rank that failed or did not come; the group has ended then.
    pub fn check(&self, ctx: &Context) -> Result<()> {
        let checked = match &self.transport {
            Transport::Host => Ok(()),
            Transport::Peer(rank) => rank.check(ctx),
            Transport::Nccl(rank) => rank.check(),
        };
        let Err(error) = checked else { return Ok(()) };
        // Who ended the group knows why.
        self.collective.check()?;
        self.collective.abort(&error.to_string());
        Err(error)
    }
}

/// The way that ranks on several nodes go: all nodes must come to the same one.
///
/// # Errors
/// [`CudaError::Unavailable`] when the way that was asked for is not possible.
pub fn between_nodes(drivers: &[Arc<dyn Driver>], all_reduce: AllReduce) -> Result<AllReduce> {
    match all_reduce {
        AllReduce::Host => Ok(AllReduce::Host),
        AllReduce::Peer => {
            Err(unavailable(all_reduce, "devices of several nodes cannot map each other's memory"))
        }
        AllReduce::Nccl => match nccl(drivers) {
            Ok(_) => Ok(AllReduce::Nccl),
            Err(message) => Err(unavailable(all_reduce, &message)),
        },
        AllReduce::Auto => Ok(if nccl(drivers).is_ok() { AllReduce::Nccl } else { AllReduce::Host }),
    }
}

fn unavailable(way: AllReduce, reason: &str) -> CudaError {
    CudaError::Unavailable {
        message: format!(
            "--all-reduce {way}: {reason}; use --all-reduce auto, or host, which works everywhere"
        ),
    }
}

fn hosts(ranks: usize) -> Vec<Transport> {
    (0..ranks).map(|_| Transport::Host).collect()
}

/// Peer-to-peer ranks, or why there are none.
fn peers(
    drivers: &[Arc<dyn Driver>],
    options: PeerOptions,
) -> Result<std::result::Result<Vec<Transport>, String>> {
    if drivers.len() > MOST_RANKS {
        return Ok(Err(format!("{} ranks are more than {MOST_RANKS}", drivers.len())));
    }
    for (rank, driver) in drivers.iter().enumerate() {
        for (other, peer) in drivers.iter().enumerate() {
            if rank != other && !driver.map_peer(&peer.peer_handle())? {
                return Ok(Err(format!(
                    "the device of rank {rank} cannot access the memory of rank {other}'s"
                )));
            }
        }
    }
    let regions: Arc<[Region]> = drivers
        .iter()
        .map(|driver| Region::new(driver, options.slice_bytes))
        .collect::<Result<Vec<_>>>()?
        .into();
    let Some(first) = drivers.first() else { return Ok(Err("no ranks".into())) };
    let word = Arc::from(first.host_word()?);
    let rank = |(rank, driver): (usize, &Arc<dyn Driver>)| {
        let rank = PeerRank::new(driver.clone(), rank, regions.clone(), options, Arc::clone(&word))?;
        Ok(Transport::Peer(rank))
    };
    drivers.iter().enumerate().map(rank).collect::<Result<_>>().map(Ok)
}

/// Ranks that will meet through NCCL, or why they cannot.
fn nccl(drivers: &[Arc<dyn Driver>]) -> std::result::Result<Vec<Transport>, String> {
    for driver in drivers {
        if driver.raw_stream().map_err(|e| e.to_string())?.is_none() {
            return Err(format!("{} is no device of NCCL's", driver.properties().name));
        }
    }
    let nccl = Nccl::load(&nccl_rs::library_folders()).map_err(|e| e.to_string())?;
    Ok(drivers.iter().map(|_| Transport::Nccl(NcclRank::new(nccl.clone()))).collect())
}

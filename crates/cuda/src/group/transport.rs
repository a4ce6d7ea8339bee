//! The ways that sums travel.

use std::sync::Arc;

use half::bf16;
use longhaul_backend::{Collective, ValuesMut};

use super::ending::Ending;
use super::nccl::NcclRank;
use crate::context::Context;
use crate::driver::{Driver, Element, HostWord};
use crate::ops::comm::{self, Algorithm, PeerOptions, Peers, Region};
use crate::tensor::Tensor;
use crate::weights::Vector;
use crate::{CudaError, Result};

/// Most rows of a message that is summed, added and normed in one kernel: a round of exchanges each, where longer messages
/// are cut into larger pieces (not measured yet).
const FUSED_ROWS: usize = 64;

pub(super) enum Transport {
    Host,
    Peer(PeerRank),
    Nccl(NcclRank),
}

impl Transport {
    /// The word at which kernels of the group look while they wait.
    pub(super) fn abort_word(&self) -> Option<Arc<dyn HostWord>> {
        match self {
            Transport::Peer(rank) => Some(rank.word.clone()),
            Transport::Host | Transport::Nccl(_) => None,
        }
    }

    pub(super) fn watched_by(self, ending: &Arc<Ending>) -> Self {
        match self {
            Transport::Nccl(rank) => Transport::Nccl(rank.watched_by(ending)),
            other => other,
        }
    }
}

/// A rank of a group whose devices map each other's memory.
pub(super) struct PeerRank {
    peers: Peers,
    driver: Arc<dyn Driver>,
    word: Arc<dyn HostWord>,
    /// Of all ranks: the last one gives them back.
    _regions: Arc<[Region]>,
}

impl PeerRank {
    pub(super) fn new(
        driver: Arc<dyn Driver>,
        rank: usize,
        regions: Arc<[Region]>,
        options: PeerOptions,
        word: Arc<dyn HostWord>,
    ) -> Result<Self> {
        let addresses = regions.iter().map(Region::address).collect();
        let peers = Peers::new(addresses, rank..rank + 1, options)?.with_abort(word.address());
        Ok(Self { peers, driver, word, _regions: regions })
    }

    pub(super) fn all_reduce(&self, ctx: &Context, x: &Tensor) -> Result<()> {
        let bytes = x.rows * x.stride * x.element.size();
        comm::all_reduce(ctx, &self.peers, x, Algorithm::pick(bytes, self.peers.ranks()))
    }

    /// Whether the sum and the norm of `x` are one kernel.
    pub(super) fn fuses(&self, x: &Tensor) -> bool {
        let row_bytes = x.stride * x.element.size();
        let algorithm = Algorithm::pick(x.rows * row_bytes, self.peers.ranks());
        x.rows <= FUSED_ROWS && algorithm == Algorithm::OneShot && row_bytes <= self.peers.slice_bytes()
    }

    pub(super) fn all_reduce_add_rms_norm(
        &self,
        ctx: &Context,
        x: &Tensor,
        residual: Option<&Tensor>,
        weight: &Vector,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        comm::all_reduce_add_rms_norm(ctx, &self.peers, x, residual, weight, eps)
    }

    pub(super) fn check(&self, ctx: &Context) -> Result<()> {
        self.peers.check(ctx)
    }
}

impl Drop for PeerRank {
    fn drop(&mut self) {
        // The regions may go with this rank: nothing of its device may use them any more.
        let _ = self.driver.synchronise();
    }
}

/// Sum of `x` over the ranks through the host's memory, padding included.
pub(super) fn all_reduce_on_host(ctx: &Context, collective: &dyn Collective, x: &Tensor) -> Result<()> {
    let count = x.rows * x.stride;
    match x.element {
        Element::F32 => {
            let mut values = vec![0f32; count];
            through_host(ctx, x, &mut values, |values| collective.all_reduce(ValuesMut::F32(values)))
        }
        Element::Bf16 => {
            let mut values = vec![bf16::ZERO; count];
            through_host(ctx, x, &mut values, |values| collective.all_reduce(ValuesMut::Bf16(values)))
        }
        other => Err(CudaError::Unsupported(format!("all_reduce of {other:?}"))),
    }
}

fn through_host<T: bytemuck::Pod>(
    ctx: &Context,
    x: &Tensor,
    values: &mut [T],
    sum: impl FnOnce(&mut [T]) -> std::result::Result<(), longhaul_backend::CollectiveError>,
) -> Result<()> {
    ctx.driver.download(x.address(), bytemuck::cast_slice_mut(values))?;
    sum(values)?;
    ctx.driver.upload(x.address(), bytemuck::cast_slice(values))
}

/// The ranks' columns side by side; `shares` has been checked.
pub(super) fn all_gather_on_host(
    ctx: &Context,
    collective: &dyn Collective,
    x: &Tensor,
    shares: &[usize],
) -> Result<Tensor> {
    let (rows, width) = (x.rows, shares.iter().sum::<usize>());
    let ours = ctx.tensor_to_f32(x)?;
    let counts: Vec<usize> = shares.iter().map(|share| rows * share).collect();
    let mut by_rank = vec![0f32; rows * width];
    collective.all_gather(ours.as_slice().into(), &counts, by_rank.as_mut_slice().into())?;
    let out = ctx.tensor("all_gather", rows, width, Element::F32)?;
    let mut lines = vec![0f32; rows * out.stride];
    let (mut first_column, mut rest) = (0, by_rank.as_slice());
    for &share in shares.iter().filter(|share| **share > 0) {
        let (part, later) = rest.split_at(rows * share);
        for (line, values) in lines.chunks_exact_mut(out.stride).zip(part.chunks_exact(share)) {
            line[first_column..first_column + share].copy_from_slice(values);
        }
        (first_column, rest) = (first_column + share, later);
    }
    ctx.driver.upload(out.address(), bytemuck::cast_slice(&lines))?;
    Ok(out)
}

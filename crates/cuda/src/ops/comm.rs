//! All-reduce through memory that the ranks' devices have mapped of each other (`cuda/comm/`): one-shot, two-shot, and fused
//! with the residual add and RMSNorm that follow it.
//!
//! Every rank sums in rank order, so all hold the same bits, and both algorithms give the same.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longhaul_backend::CollectiveError;

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DeviceProperties, DevicePtr, Driver, Element, Geometry, Memory};
use crate::tensor::Tensor;
use crate::weights::Vector;
use crate::{CudaError, Result};

/// Ranks at most (`kMostRanks` of `cuda/comm/peer_exchange.h`).
pub const MOST_RANKS: usize = 16;
/// Blocks of a rank at most that a region has slices for (`kMostBlocks`).
pub const MOST_BLOCKS: usize = 64;
/// Words of a region before its slices (`kDataWord`).
const DATA_WORD: usize = 16 + MOST_BLOCKS + MOST_BLOCKS * MOST_RANKS;
const THREADS: usize = 512;
/// Bytes of a unit.
const UNIT: usize = 16;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PeerParams {
    regions: [DevicePtr; MOST_RANKS],
    ranks: u32,
    first_rank: u32,
    slice_bytes: u32,
    most_polls: u32,
    abort: DevicePtr,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AllReduceParams {
    peers: PeerParams,
    x: DevicePtr,
    out: DevicePtr,
    units: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AllReduceAddRmsNormParams {
    peers: PeerParams,
    x: DevicePtr,
    residual: DevicePtr,
    weight: DevicePtr,
    out: DevicePtr,
    residual_out: DevicePtr,
    rows: u32,
    cols: u32,
    x_stride: u32,
    residual_stride: u32,
    eps: f32,
    out_stride: u32,
}

const ONE_SHOT_BF16: Kernel<AllReduceParams> = Kernel::new("all_reduce_one_shot_bf16");
const ONE_SHOT_F32: Kernel<AllReduceParams> = Kernel::new("all_reduce_one_shot_f32");
const TWO_SHOT_BF16: Kernel<AllReduceParams> = Kernel::new("all_reduce_two_shot_bf16");
const TWO_SHOT_F32: Kernel<AllReduceParams> = Kernel::new("all_reduce_two_shot_f32");
/// By element of x, then of what is normed.
const NORM_BF16_BF16: Kernel<AllReduceAddRmsNormParams> = Kernel::new("all_reduce_add_rms_norm_bf16_bf16");
const NORM_F32_BF16: Kernel<AllReduceAddRmsNormParams> = Kernel::new("all_reduce_add_rms_norm_f32_bf16");
const NORM_F32_F32: Kernel<AllReduceAddRmsNormParams> = Kernel::new("all_reduce_add_rms_norm_f32_f32");

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[
    ONE_SHOT_BF16.info(),
    ONE_SHOT_F32.info(),
    TWO_SHOT_BF16.info(),
    TWO_SHOT_F32.info(),
    NORM_BF16_BF16.info(),
    NORM_F32_BF16.info(),
    NORM_F32_F32.info(),
];

/// How a sum travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// Every rank reads everything: one round, for small messages.
    OneShot,
    /// Every rank sums its share and passes it on: two rounds, and less to read, for large messages.
    TwoShot,
}

impl Algorithm {
    /// The faster one for a message of `bytes`, after the sizes at which others' kernels of both kinds cross on NVLink
    /// (not measured with ours).
    pub fn pick(bytes: usize, ranks: usize) -> Self {
        let one_shot_up_to = match ranks {
            // Both read the same amount.
            ..=2 => usize::MAX,
            3..=4 => 1 << 20,
            _ => 256 << 10,
        };
        if bytes <= one_shot_up_to { Algorithm::OneShot } else { Algorithm::TwoShot }
    }
}

/// A rank's memory for exchanges, zeroed. The other ranks map it; it must live until all of them are done.
#[derive(Debug)]
pub struct Region(Memory);

impl Region {
    /// Bytes of a region with slices of `slice_bytes`.
    pub const fn bytes(slice_bytes: usize) -> usize {
        DATA_WORD * 4 + MOST_BLOCKS * 2 * slice_bytes
    }

    /// Takes a region with slices of `slice_bytes` (a multiple of 16, the same on all ranks) from the rank's device.
    ///
    /// # Errors
    /// No memory, or a size that is not a multiple of 16.
    pub fn new(driver: &Arc<dyn Driver>, slice_bytes: usize) -> Result<Self> {
        check_slice(slice_bytes)?;
        let bytes = Self::bytes(slice_bytes);
        let memory = Memory::new(driver, bytes, "region of peer-to-peer exchanges")?;
        driver.fill(memory.address(), 0, bytes)?;
        driver.synchronise()?;
        Ok(Self(memory))
    }

    /// Where it is on its own device.
    pub fn address(&self) -> DevicePtr {
        self.0.address()
    }
}

fn check_slice(bytes: usize) -> Result<()> {
    if bytes == 0 || !bytes.is_multiple_of(UNIT) || u32::try_from(bytes).is_err() {
        let detail = format!("slices of {bytes} bytes; a multiple of {UNIT} is needed");
        return Err(CudaError::shape("peer region", detail));
    }
    Ok(())
}

/// How exchanges work; the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerOptions {
    /// Bytes of a slice: a piece of a message that a block exchanges at once.
    pub slice_bytes: usize,
    /// Blocks of a rank at most, 1 to [`MOST_BLOCKS`].
    pub blocks: usize,
    /// How often a block looks for another rank before it gives up.
    pub most_polls: u32,
}

impl PeerOptions {
    /// For the blocks of `properties`, so that all are resident: at most one a multiprocessor.
    pub fn for_device(properties: &DeviceProperties) -> Self {
        let default = Self::default();
        Self { blocks: default.blocks.min(properties.multiprocessors as usize).max(1), ..default }
    }
}

impl Default for PeerOptions {
    /// 36 blocks are enough to saturate NVLink and leave the device to others. A poll takes about a microsecond on a GPU, so
    /// a block gives up after some ten seconds.
    fn default() -> Self {
        Self { slice_bytes: 64 << 10, blocks: 36, most_polls: 10_000_000 }
    }
}

/// The regions of all ranks as this device has them mapped, and the ranks that its launches run: one, or all of a group that
/// shares a device (tests).
#[derive(Debug, Clone)]
pub struct Peers {
    regions: Vec<DevicePtr>,
    local: Range<usize>,
    options: PeerOptions,
    abort: DevicePtr,
}

/// In a region's status word: the host has ended the group (`kAborted` of `cuda/comm/peer_exchange.h`).
const ABORTED: u32 = u32::MAX;

impl Peers {
    /// `regions` in rank order; launches run the ranks `local`.
    ///
    /// # Errors
    /// No or more than [`MOST_RANKS`] regions, ranks that are not there, options out of range.
    pub fn new(regions: Vec<DevicePtr>, local: Range<usize>, options: PeerOptions) -> Result<Self> {
        const OP: &str = "peers";
        check_slice(options.slice_bytes)?;
        if regions.is_empty() || regions.len() > MOST_RANKS {
            let detail = format!("{} ranks; 1 to {MOST_RANKS} are possible", regions.len());
            return Err(CudaError::shape(OP, detail));
        }
        if local.is_empty() || local.end > regions.len() {
            return Err(CudaError::shape(OP, format!("ranks {local:?} of {}", regions.len())));
        }
        if !(1..=MOST_BLOCKS).contains(&options.blocks) {
            let detail = format!("{} blocks; 1 to {MOST_BLOCKS} are possible", options.blocks);
            return Err(CudaError::shape(OP, detail));
        }
        Ok(Self { regions, local, options, abort: DevicePtr::NULL })
    }

    /// Lets the host end waits: `word` is that of [`crate::driver::Driver::host_word`], not 0 once the group has ended.
    pub fn with_abort(self, word: DevicePtr) -> Self {
        Self { abort: word, ..self }
    }

    /// Bytes that a row may have in [`all_reduce_add_rms_norm`].
    pub fn slice_bytes(&self) -> usize {
        self.options.slice_bytes
    }

    /// Ranks in the group.
    pub fn ranks(&self) -> usize {
        self.regions.len()
    }

    /// Whether every exchange of this device's ranks so far was complete. Waits for the device.
    ///
    /// # Errors
    /// [`CudaError::Collective`] when a rank did not arrive or the host ended the group, after which results are wrong and the
    /// group is of no use.
    pub fn check(&self, ctx: &Context) -> Result<()> {
        for region in &self.regions[self.local.clone()] {
            let mut status = [0u8; 4];
            ctx.driver.download(*region, &mut status)?;
            let rank = match u32::from_le_bytes(status) {
                0 => continue,
                ABORTED => {
                    let message = "the host ended the group during an exchange".into();
                    return Err(CollectiveError::Aborted { rank: self.local.start, message }.into());
                }
                status => status as usize - 1,
            };
            let message = format!("it did not arrive within {} polls", self.options.most_polls);
            return Err(CollectiveError::RankFailed { rank, message }.into());
        }
        Ok(())
    }

    fn params(&self) -> PeerParams {
        let mut regions = [DevicePtr::NULL; MOST_RANKS];
        regions[..self.regions.len()].copy_from_slice(&self.regions);
        PeerParams {
            regions,
            ranks: self.regions.len() as u32,
            first_rank: self.local.start as u32,
            slice_bytes: self.options.slice_bytes as u32,
            most_polls: self.options.most_polls,
            abort: self.abort,
        }
    }

    /// Rows of one rank in a tensor that holds those of all ranks of a launch.
    fn rows(&self, op: &'static str, x: &Tensor) -> Result<usize> {
        if !x.rows.is_multiple_of(self.local.len()) {
            return Err(CudaError::shape(op, format!("{} rows of {} ranks", x.rows, self.local.len())));
        }
        Ok(x.rows / self.local.len())
    }

    /// `blocks` a rank, at most those that may run at once. All ranks must come to the same number.
    fn geometry(&self, blocks: usize, units_a_block: usize) -> Geometry {
        let local = self.local.len();
        // Several ranks on one device: all must be resident.
        let most = if local == 1 { self.options.blocks } else { self.options.blocks.min(128 / local) };
        let threads = units_a_block.next_multiple_of(32).clamp(32, THREADS);
        let grid = [blocks.clamp(1, most) as u32, local as u32, 1];
        let across_devices = local < self.ranks();
        Geometry { cooperative: true, across_devices, ..Geometry::grid(grid, threads as u32) }
    }
}

fn is_f32(op: &'static str, x: &Tensor) -> Result<bool> {
    match x.element {
        Element::F32 => Ok(true),
        Element::Bf16 => Ok(false),
        other => Err(CudaError::Unsupported(format!("{op} of {other:?}"))),
    }
}

/// Replaces `x` by its sum over all ranks. The ranks of the launch lie in `x` one after the other.
///
/// # Errors
/// Rows that are not whole ranks, or the driver's. A rank that does not arrive shows in [`Peers::check`].
pub fn all_reduce(ctx: &Context, peers: &Peers, x: &Tensor, algorithm: Algorithm) -> Result<()> {
    const OP: &str = "all_reduce";
    let is_f32 = is_f32(OP, x)?;
    let units = peers.rows(OP, x)? * x.stride * x.element.size() / UNIT;
    if units == 0 {
        return Ok(());
    }
    let kernel = match (algorithm, is_f32) {
        (Algorithm::OneShot, false) => ONE_SHOT_BF16,
        (Algorithm::OneShot, true) => ONE_SHOT_F32,
        (Algorithm::TwoShot, false) => TWO_SHOT_BF16,
        (Algorithm::TwoShot, true) => TWO_SHOT_F32,
    };
    let piece = units.min(peers.options.slice_bytes / UNIT);
    let geometry = peers.geometry(units.div_ceil(piece.min(THREADS)), piece);
    let params =
        AllReduceParams { peers: peers.params(), x: x.address(), out: x.address(), units: units as u64 };
    ctx.launch(&kernel, geometry, params)
}

/// `residual += sum of x over all ranks` (or `=`), `normed = residual / rms(residual) * weight`: `(normed, residual)`, as
/// [`crate::ops::norm::add_rms_norm`] after [`all_reduce`]; the residual has the same bits. What is normed is of the context's
/// element; x is, too, or f32. A row must fit a slice.
///
/// # Errors
/// Shapes that do not fit, no room in the arena, or the driver's. A rank that does not arrive shows in [`Peers::check`].
pub fn all_reduce_add_rms_norm(
    ctx: &Context,
    peers: &Peers,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Vector,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "all_reduce_add_rms_norm";
    let kernel = match (x.element, ctx.element) {
        (Element::Bf16, Element::Bf16) => NORM_BF16_BF16,
        (Element::F32, Element::Bf16) => NORM_F32_BF16,
        (Element::F32, Element::F32) => NORM_F32_F32,
        (from, to) => return Err(CudaError::Unsupported(format!("{OP}: {from:?} to {to:?}"))),
    };
    let rows = peers.rows(OP, x)?;
    let fits = residual.is_none_or(|r| (r.rows, r.cols, r.element) == (x.rows, x.cols, Element::F32));
    let row_bytes = x.stride * x.element.size();
    if !fits || weight.len != x.cols || row_bytes > peers.options.slice_bytes {
        return Err(CudaError::shape(
            OP,
            format!(
                "x [{}, {}], residual {:?}, weight [{}], rows of {row_bytes} bytes, slices of {}",
                x.rows,
                x.cols,
                residual.map(|r| (r.rows, r.cols, r.element)),
                weight.len,
                peers.options.slice_bytes
            ),
        ));
    }
    let out = ctx.tensor(OP, x.rows, x.cols, ctx.element)?;
    let residual_out = match residual {
        Some(r) => r.clone(),
        None => ctx.tensor(OP, x.rows, x.cols, Element::F32)?,
    };
    if rows == 0 {
        return Ok((out, residual_out));
    }
    let params = AllReduceAddRmsNormParams {
        peers: peers.params(),
        x: x.address(),
        residual: Context::optional(residual),
        weight: weight.address(),
        out: out.address(),
        residual_out: residual_out.address(),
        rows: rows as u32,
        cols: x.cols as u32,
        x_stride: x.stride as u32,
        residual_stride: residual_out.stride as u32,
        eps,
        out_stride: out.stride as u32,
    };
    ctx.launch(&kernel, peers.geometry(rows, row_bytes / UNIT), params)?;
    Ok((out, residual_out))
}

//! Copies of whole KV blocks (`cuda/kv/copy_blocks.cu`): within the pool, and to the host and back.

use bytemuck::{Pod, Zeroable};
use longhaul_backend::{Error, KvLayout};

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::kv::KvCache;
use crate::tensor::Tensor;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct CopyBlocksParams {
    source: DevicePtr,
    destination: DevicePtr,
    pairs: DevicePtr,
    source_plane: u64,
    source_block: u64,
    destination_plane: u64,
    destination_block: u64,
    units: u64,
}

const COPY_16: Kernel<CopyBlocksParams> = Kernel::new("copy_blocks_16");
const COPY_1: Kernel<CopyBlocksParams> = Kernel::new("copy_blocks_1");
const THREADS: u32 = 256;
/// Units of a block of threads.
const PART: usize = 4 * THREADS as usize;

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[COPY_16.info(), COPY_1.info()];

/// Blocks go to the host through a buffer of about this size, at least one block.
const STAGING_BYTES: usize = 16 << 20;

/// Where blocks lie: byte distances between planes and between blocks of a plane.
#[derive(Clone, Copy)]
struct Place {
    address: DevicePtr,
    plane: usize,
    block: usize,
}

impl Place {
    fn pool(kv: &KvCache) -> Self {
        let block = kv.block_bytes();
        Self { address: kv.address(), plane: kv.layout().blocks * block, block }
    }

    fn staging(kv: &KvCache, buffer: &Tensor) -> Self {
        let block = kv.block_bytes();
        Self { address: buffer.address(), plane: block, block: kv.planes() * block }
    }
}

/// Bytes of the buffer through which blocks go to the host.
fn staging_bytes(layout: &KvLayout, element: Element) -> usize {
    let block = 2 * layout.layers * layout.kv_heads * layout.block_size * layout.head_dim * element.size();
    (STAGING_BYTES / block.max(1)).max(1) * block
}

/// Copies K and V of all layers from the first to the second block of each pair, in one launch.
///
/// # Errors
/// [`Error::Blocks`] ([`KvLayout::check_copies`]), or no room in the arena.
pub fn copy_blocks(ctx: &Context, kv: &mut KvCache, pairs: &[(u32, u32)]) -> Result<(), Error> {
    kv.layout().check_copies(pairs)?;
    Ok(launch(ctx, kv, Place::pool(kv), Place::pool(kv), pairs)?)
}

/// The contents of `blocks`, one after the other: for each its planes (K, then V, of each layer) in the pool's element.
///
/// # Errors
/// [`Error::Blocks`] for a block outside the pool, no room in the arena, or the driver's.
pub fn read_blocks(ctx: &Context, kv: &KvCache, blocks: &[u32]) -> Result<Vec<u8>, Error> {
    kv.layout().check_blocks(blocks)?;
    let bytes_per_block = kv.planes() * kv.block_bytes();
    let mut out = vec![0; blocks.len() * bytes_per_block];
    let at_once = staging_bytes(kv.layout(), kv.element()) / bytes_per_block.max(1);
    for (blocks, out) in blocks.chunks(at_once).zip(out.chunks_mut(at_once * bytes_per_block)) {
        let staging = ctx.tensor("read_blocks", 1, out.len().div_ceil(4), Element::U32)?;
        let pairs: Vec<(u32, u32)> = blocks.iter().copied().zip(0..).collect();
        launch(ctx, kv, Place::pool(kv), Place::staging(kv, &staging), &pairs)?;
        ctx.driver.download(staging.address(), out)?;
    }
    Ok(out)
}

/// Writes what [`read_blocks`] returned to `blocks`, which need not be those that were read.
///
/// # Errors
/// As [`read_blocks`]; [`Error::Blocks`] for a block named twice or a wrong number of bytes.
pub fn write_blocks(ctx: &Context, kv: &mut KvCache, blocks: &[u32], bytes: &[u8]) -> Result<(), Error> {
    let bytes_per_block = kv.planes() * kv.block_bytes();
    kv.layout().check_writes(blocks, bytes.len(), bytes_per_block)?;
    let at_once = staging_bytes(kv.layout(), kv.element()) / bytes_per_block.max(1);
    for (blocks, bytes) in blocks.chunks(at_once).zip(bytes.chunks(at_once * bytes_per_block)) {
        let staging = ctx.tensor("write_blocks", 1, bytes.len().div_ceil(4), Element::U32)?;
        ctx.driver.upload(staging.address(), bytes)?;
        let pairs: Vec<(u32, u32)> = (0..).zip(blocks.iter().copied()).collect();
        launch(ctx, kv, Place::staging(kv, &staging), Place::pool(kv), &pairs)?;
    }
    Ok(())
}

fn launch(ctx: &Context, kv: &KvCache, from: Place, to: Place, pairs: &[(u32, u32)]) -> crate::Result<()> {
    const OP: &str = "copy_blocks";
    if pairs.is_empty() || kv.block_bytes() == 0 {
        return Ok(());
    }
    let words: Vec<u32> = pairs.iter().flat_map(|&(from, to)| [from, to]).collect();
    let list = ctx.tensor(OP, 1, words.len(), Element::U32)?;
    ctx.driver.upload(list.address(), bytemuck::cast_slice(&words))?;
    let (kernel, unit) = if kv.block_bytes().is_multiple_of(16) { (COPY_16, 16) } else { (COPY_1, 1) };
    let units = kv.block_bytes() / unit;
    let params = CopyBlocksParams {
        source: from.address,
        destination: to.address,
        pairs: list.address(),
        source_plane: (from.plane / unit) as u64,
        source_block: (from.block / unit) as u64,
        destination_plane: (to.plane / unit) as u64,
        destination_block: (to.block / unit) as u64,
        units: units as u64,
    };
    let grid = [pairs.len() as u32, kv.planes() as u32, units.div_ceil(PART) as u32];
    ctx.launch(&kernel, Geometry::grid(grid, THREADS), params)
}

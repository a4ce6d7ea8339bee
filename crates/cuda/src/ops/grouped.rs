//! The experts' products with mma.sync (`cuda/moe/moe_grouped_mma.cu`, `moe_grouped_wide_mma.cu`).

use bytemuck::{Pod, Zeroable};

use crate::Result;
use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::ops::moe::{ExpertsParams, Routing};
use crate::weights::Experts;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GroupedParams {
    /// Its last member says whether blocks share a tile.
    experts: ExpertsParams,
    partials: DevicePtr,
    counters: DevicePtr,
}

type K = Kernel<GroupedParams>;
const GATE_UP: [K; 5] = [
    K::new("moe_gate_up_mma_8"),
    K::new("moe_gate_up_mma_16"),
    K::new("moe_gate_up_mma_32"),
    K::new("moe_gate_up_mma_64"),
    K::new("moe_gate_up_mma_128"),
];
const DOWN: [K; 5] = [
    K::new("moe_down_mma_8"),
    K::new("moe_down_mma_16"),
    K::new("moe_down_mma_32"),
    K::new("moe_down_mma_64"),
    K::new("moe_down_mma_128"),
];

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[
    GATE_UP[0].info(),
    GATE_UP[1].info(),
    GATE_UP[2].info(),
    GATE_UP[3].info(),
    GATE_UP[4].info(),
    DOWN[0].info(),
    DOWN[1].info(),
    DOWN[2].info(),
    DOWN[3].info(),
    DOWN[4].info(),
];

const THREADS: u32 = 128;
/// Weight rows of a tile: of each half, in the first product, the gate's and the up product's.
const TILE_ROWS: usize = 128;
/// Rows of an expert in a tile, and shared memory of the ring, of each instance: stages of k by 64 (the widest: by 32).
const INSTANCES: [(usize, usize); 5] = [
    (8, 4 * (TILE_ROWS + 8) * 128),
    (16, 4 * (TILE_ROWS + 16) * 128),
    (32, 4 * (TILE_ROWS + 32) * 128),
    (64, 3 * (TILE_ROWS + 64) * 128),
    (128, 4 * (TILE_ROWS + 128) * 64),
];
/// Elements of k of a part at most.
const PART: usize = 640;
const MOST_EXPERTS: usize = 512;
/// Static shared memory of a block, in whole KiB as the dynamic part begins at a multiple of 1024.
const STATIC_SHARED: usize = (4 * (MOST_EXPERTS + 1)).next_multiple_of(1024);
/// Most blocks of a multiprocessor: what the registers of the wide instances allow, and enough bytes in flight.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 2;
/// Tiles of a block from which on whole waves of tiles fill the device well enough.
const TILES_PER_BLOCK: usize = 4;
/// Most memory for the parts of tiles that blocks share.
const PARTIALS_BYTES: usize = 32 << 20;

/// Whether these kernels take the experts on this device.
pub(crate) fn takes(ctx: &Context, experts: &Experts) -> bool {
    ctx.allows_mma()
        && experts.element == Element::Bf16
        && experts.hidden > 0
        && experts.intermediate > 0
        && experts.count <= MOST_EXPERTS
}

/// First product: gathered rows, gate and up, SiLU.
pub(crate) fn gate_up(ctx: &Context, routing: &Routing, params: ExpertsParams) -> Result<()> {
    run(ctx, &GATE_UP, routing, params, TILE_ROWS / 2)
}

/// Second product.
pub(crate) fn down(ctx: &Context, routing: &Routing, params: ExpertsParams) -> Result<()> {
    run(ctx, &DOWN, routing, params, TILE_ROWS)
}

fn run(
    ctx: &Context,
    kernels: &[K; 5],
    routing: &Routing,
    params: ExpertsParams,
    width: usize,
) -> Result<()> {
    // Tiles as wide as an expert's rows would be if they were dealt evenly. Any width serves any counts.
    let average = routing.slots().div_ceil(routing.router_experts);
    let index = INSTANCES.iter().position(|(tokens, _)| average <= *tokens).unwrap_or(INSTANCES.len() - 1);
    let (tokens, shared) = INSTANCES[index];
    // At most: every expert may end with a tile that is not full.
    let token_tiles = routing.slots().min(routing.slots().div_ceil(tokens) + routing.experts);
    let tiles = token_tiles * (params.n as usize).div_ceil(width);
    let properties = ctx.driver.properties();
    let resident = properties.resident_blocks(shared + STATIC_SHARED).min(BLOCKS_PER_MULTIPROCESSOR);
    let most = (properties.multiprocessors * resident) as usize;
    // Few tiles are cut along k, to the same bits.
    let parts = (params.k as usize).div_ceil(PART);
    let partials = tiles * parts * THREADS as usize * tokens;
    let split = index < 2
        && parts > 1
        && tiles <= TILES_PER_BLOCK * most
        && tiles <= Context::COUNTERS
        && 4 * partials <= PARTIALS_BYTES;
    let partials = if split { Some(ctx.tensor("experts", 1, partials, Element::F32)?) } else { None };
    let tasks = if split { tiles * parts } else { tiles };
    let params = GroupedParams {
        experts: ExpertsParams { split: split.into(), ..params },
        partials: Context::optional(partials.as_ref()),
        counters: ctx.counters(),
    };
    ctx.launch(&kernels[index], Geometry::linear(tasks.min(most).max(1), THREADS).shared(shared), params)
}

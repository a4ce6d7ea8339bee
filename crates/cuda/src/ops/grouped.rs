//! The experts' products with mma.sync (`cuda/moe/moe_grouped_mma.cu`).

use crate::Result;
use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{Element, Geometry};
use crate::ops::moe::{ExpertsParams, Routing};
use crate::weights::Experts;

type K = Kernel<ExpertsParams>;
const GATE_UP: [K; 4] = [
    K::new("moe_gate_up_mma_8"),
    K::new("moe_gate_up_mma_16"),
    K::new("moe_gate_up_mma_32"),
    K::new("moe_gate_up_mma_64"),
];
const DOWN: [K; 4] = [
    K::new("moe_down_mma_8"),
    K::new("moe_down_mma_16"),
    K::new("moe_down_mma_32"),
    K::new("moe_down_mma_64"),
];

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[
    GATE_UP[0].info(),
    GATE_UP[1].info(),
    GATE_UP[2].info(),
    GATE_UP[3].info(),
    DOWN[0].info(),
    DOWN[1].info(),
    DOWN[2].info(),
    DOWN[3].info(),
];

const THREADS: u32 = 128;
const TILE_ROWS: usize = 64;
const STAGE_K_BYTES: usize = 128;
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;

/// Whether these kernels take the experts on this device.
pub(crate) fn takes(ctx: &Context, experts: &Experts) -> bool {
    ctx.allows_mma()
        && experts.element == Element::Bf16
        && experts.hidden > 0
        && experts.intermediate > 0
        && experts.count <= 512
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
    kernels: &[K; 4],
    routing: &Routing,
    params: ExpertsParams,
    width: usize,
) -> Result<()> {
    // Tiles as wide as an expert's rows would be if they were dealt evenly. Any width serves any counts.
    let (kernel, tokens, stages) = match routing.slots().div_ceil(routing.experts) {
        0..=8 => (&kernels[0], 8, 6),
        9..=16 => (&kernels[1], 16, 6),
        17..=32 => (&kernels[2], 32, 5),
        _ => (&kernels[3], 64, 4),
    };
    // At most: every expert may end with a tile that is not full.
    let token_tiles = routing.slots().min(routing.slots().div_ceil(tokens) + routing.experts);
    let tiles = token_tiles * (params.n as usize).div_ceil(width);
    let most = ctx.driver.properties().multiprocessors as usize * BLOCKS_PER_MULTIPROCESSOR;
    let ring = stages * (TILE_ROWS + tokens) * STAGE_K_BYTES;
    let out_tile = tokens * (TILE_ROWS + 4) * 4;
    ctx.launch(kernel, Geometry::linear(tiles.min(most).max(1), THREADS).shared(ring + out_tile), params)
}

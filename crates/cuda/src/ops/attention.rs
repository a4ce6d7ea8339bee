//! Causal attention over the paged cache (`cuda/attention/`).

use bytemuck::{Pod, Zeroable};

use crate::context::{Context, Kernel, KernelInfo};
use crate::driver::{DevicePtr, Element, Geometry};
use crate::kv::{KvCache, KvParams};
use crate::rope::{Rope, RopeParams};
use crate::step::Step;
use crate::tensor::Tensor;
use crate::{CudaError, Result};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AttentionParams {
    step: DevicePtr,
    q: DevicePtr,
    out: DevicePtr,
    partials: DevicePtr,
    counters: DevicePtr,
    rope: RopeParams,
    kv: KvParams,
    q_stride: u32,
    out_stride: u32,
    most_splits: u32,
    pairs: u32,
}

type K = Kernel<AttentionParams>;
const PLAIN_BF16_BF16: K = K::new("attention_plain_bf16_bf16");
const PLAIN_BF16_E4M3: K = K::new("attention_plain_bf16_e4m3");
const PLAIN_BF16_F32: K = K::new("attention_plain_bf16_f32");
const PLAIN_F32_BF16: K = K::new("attention_plain_f32_bf16");
const PLAIN_F32_E4M3: K = K::new("attention_plain_f32_e4m3");
const PLAIN_F32_F32: K = K::new("attention_plain_f32_f32");
/// By packed query rows of a block: 64, 128.
const PREFILL_HD64: [K; 2] =
    [K::new("attention_prefill_mma_hd64_64_bf16"), K::new("attention_prefill_mma_hd64_128_bf16")];
const PREFILL_HD128: [K; 2] =
    [K::new("attention_prefill_mma_hd128_64_bf16"), K::new("attention_prefill_mma_hd128_128_bf16")];
const DECODE_64: K = K::new("attention_decode_mma_hd64_bf16");
const DECODE_128: K = K::new("attention_decode_mma_hd128_bf16");

/// Kernels of this module.
pub(crate) const KERNELS: &[KernelInfo] = &[
    PLAIN_BF16_BF16.info(),
    PLAIN_BF16_E4M3.info(),
    PLAIN_BF16_F32.info(),
    PLAIN_F32_BF16.info(),
    PLAIN_F32_E4M3.info(),
    PLAIN_F32_F32.info(),
    PREFILL_HD64[0].info(),
    PREFILL_HD64[1].info(),
    PREFILL_HD128[0].info(),
    PREFILL_HD128[1].info(),
    DECODE_64.info(),
    DECODE_128.info(),
];

const THREADS: u32 = 128;
/// Largest head the plain kernels take.
const MOST_HEAD_DIM: usize = 256;
/// Packed query rows of a prefill block: the narrow and the wide kernel.
const PREFILL_ROWS: [usize; 2] = [64, 128];
/// Keys of a tile.
const TILE_TOKENS: usize = 64;
/// Keys that must lie in one block of the pool, and in one chunk of the positions.
const PIECE: usize = 16;
/// Query heads of a KV head that a decode block takes.
const DECODE_GROUP: usize = 8;
/// Decode sequences that the work list in shared memory holds.
const DECODE_SEQUENCES: usize = 1024;
/// Keys of a decode split, as long as there are few of them.
const LEAST_SPLIT: usize = 128;
/// Most splits of a sequence: enough to fill the largest device at batch 1.
pub(crate) const MOST_SPLITS: usize = 64;
/// Most decode blocks of a multiprocessor: what the registers allow.
const DECODE_BLOCKS_PER_MULTIPROCESSOR: u32 = 3;
/// Static shared memory of a decode block: the work list, in whole KiB as the dynamic part begins at a multiple of 1024.
const DECODE_STATIC_SHARED: usize = (4 * (DECODE_SEQUENCES + 1)).next_multiple_of(1024);

/// Causal attention of the step's rows over the cache of `layer`: GQA, plain or dual-chunk positions, prefill and decode
/// rows mixed. `q` is unrotated, `[rows, query_heads * head_dim]`; so is the result's shape.
///
/// # Errors
/// Shapes that do not fit, a position beyond the tables, a head size no kernel takes, or no room in the arena.
pub fn attention(
    ctx: &Context,
    q: &Tensor,
    rope: &Rope,
    step: &Step,
    kv: &KvCache,
    layer: usize,
) -> Result<Tensor> {
    const OP: &str = "attention";
    let layout = kv.layout();
    if q.cols != layout.query_heads * layout.head_dim || q.rows != step.rows() || layer >= layout.layers {
        return Err(CudaError::shape(
            OP,
            format!("q [{}, {}], layer {layer} for {layout:?}, {} rows", q.rows, q.cols, step.rows()),
        ));
    }
    if layout.head_dim > MOST_HEAD_DIM || !layout.head_dim.is_multiple_of(2) {
        return Err(CudaError::Unsupported(format!(
            "{OP}: heads of {} elements; even sizes up to {MOST_HEAD_DIM} are supported",
            layout.head_dim
        )));
    }
    rope.check(step, layout.head_dim, OP)?;
    let out = ctx.tensor(OP, q.rows, q.cols, q.element)?;
    if q.rows == 0 || q.cols == 0 {
        return Ok(out);
    }
    let params = AttentionParams {
        step: step.address(),
        q: q.address(),
        out: out.address(),
        partials: DevicePtr::NULL,
        counters: DevicePtr::NULL,
        rope: rope.params,
        kv: kv.layer(layer),
        q_stride: q.stride as u32,
        out_stride: out.stride as u32,
        most_splits: 0,
        pairs: 0,
    };
    let group = layout.group();
    let fast = ctx.allows_mma()
        && (q.element, kv.element()) == (Element::Bf16, Element::Bf16)
        && matches!(layout.head_dim, 64 | 128)
        && layout.block_size.is_multiple_of(PIECE)
        && (rope.params.chunk_len as usize).is_multiple_of(PIECE)
        && group <= DECODE_GROUP
        && step.decode_sequences <= DECODE_SEQUENCES
        && step.decode_sequences * layout.kv_heads <= Context::COUNTERS;
    if !fast {
        let kernel = plain(q.element, kv.element())?;
        let grid = [q.rows as u32, layout.query_heads as u32, 1];
        ctx.launch(&kernel, Geometry::grid(grid, THREADS), params)?;
        return Ok(out);
    }
    let tile_bytes = TILE_TOKENS * layout.head_dim * 2;
    let (prefill, decode) =
        if layout.head_dim == 64 { (&PREFILL_HD64, DECODE_64) } else { (&PREFILL_HD128, DECODE_128) };
    let properties = ctx.driver.properties();
    if !step.prefill_rows.is_empty() {
        let tiles = |rows: usize| -> usize {
            step.prefill_rows.iter().map(|sequence| (sequence * group).div_ceil(rows)).sum()
        };
        let shared = |rows: usize| rows * layout.head_dim * 2 + 2 * tile_bytes;
        // Wide blocks read less shared memory for a product. They serve where two fit on a multiprocessor and all
        // multiprocessors get one. Both give the same bits.
        let [narrow, wide] = PREFILL_ROWS;
        let fills = tiles(wide) * layout.kv_heads >= properties.multiprocessors as usize;
        let index = usize::from(fills && properties.resident_blocks(shared(wide)) >= 2);
        let rows = [narrow, wide][index];
        let grid = [tiles(rows) as u32, layout.kv_heads as u32, 1];
        ctx.launch(&prefill[index], Geometry::grid(grid, THREADS).shared(shared(rows)), params)?;
    }
    if step.decode_sequences > 0 {
        // From capacities, not from this step's lengths: a recorded launch serves longer sequences, too.
        let pool_tokens = layout.blocks * layout.block_size;
        let most_splits = pool_tokens.div_ceil(LEAST_SPLIT).clamp(1, MOST_SPLITS);
        let pairs = step.decode_sequences * layout.kv_heads;
        let partials =
            ctx.tensor(OP, 1, pairs * most_splits * group * (layout.head_dim + 2), Element::F32)?;
        let shared = 3 * DECODE_GROUP * layout.head_dim * 2 + 4 * tile_bytes;
        let resident = properties.resident_blocks(shared + DECODE_STATIC_SHARED);
        let most_blocks = properties.multiprocessors * resident.min(DECODE_BLOCKS_PER_MULTIPROCESSOR);
        let blocks = most_blocks.min((pairs * most_splits) as u32);
        let params = AttentionParams {
            partials: partials.address(),
            counters: ctx.counters(),
            most_splits: most_splits as u32,
            pairs: pairs as u32,
            ..params
        };
        ctx.launch(&decode, Geometry::linear(blocks as usize, THREADS).shared(shared), params)?;
    }
    Ok(out)
}

fn plain(q: Element, cache: Element) -> Result<K> {
    Ok(match (q, cache) {
        (Element::Bf16, Element::Bf16) => PLAIN_BF16_BF16,
        (Element::Bf16, Element::E4m3) => PLAIN_BF16_E4M3,
        (Element::Bf16, Element::F32) => PLAIN_BF16_F32,
        (Element::F32, Element::Bf16) => PLAIN_F32_BF16,
        (Element::F32, Element::E4m3) => PLAIN_F32_E4M3,
        (Element::F32, Element::F32) => PLAIN_F32_F32,
        (q, cache) => return Err(CudaError::Unsupported(format!("attention of {q:?} over {cache:?}"))),
    })
}

//! Paged attention over mixed prefill and decode rows: cuts a step into tiles and runs them on the pool.

mod kernel;
#[cfg(test)]
mod tests;
mod tile;
mod tile_bf16;
mod tile_f32;

use longhaul_backend::{Error, Result, RopeTables, StepInputs};
use rayon::prelude::*;

use crate::kv::KvCache;
use crate::simd::Isa;
use kernel::{Attend, PARTITION, Partial, QueryTile};

/// Query rows of a tile: enough to reuse a block of keys from the first-level cache many times.
const TILE_ROWS: usize = 96;
/// Tiles of at most this many tokens are cut along the keys as well, so that decoding one sequence uses all threads.
const SPLIT_TOKENS: usize = 4;

/// Attention of the step's rows in `layer`: q is `[rows][query_heads * head_dim]`, unrotated, as is the result.
pub(crate) fn attention(
    isa: Isa,
    q: &[f32],
    step: &StepInputs,
    rope: &RopeTables,
    kv: &KvCache,
    layer: usize,
) -> Result<Vec<f32>> {
    let layout = kv.layout();
    let width = layout.query_heads * layout.head_dim;
    if q.len() != step.rows() * width {
        return Err(Error::shape(
            "attention",
            format!("q has {} values for {} rows of {width}", q.len(), step.rows()),
        ));
    }
    if width == 0 {
        return Ok(Vec::new());
    }
    let tiles = tiles(q, step, kv, layer);
    let results: Vec<Vec<f32>> = tiles
        .par_iter()
        .map(|tile| {
            let last = tile.first_position + tile.tokens;
            let partitions = last.div_ceil(PARTITION);
            let run = |partitions| isa.dispatch(Attend { tile: *tile, kv, rope, partitions });
            let partial = if tile.tokens <= SPLIT_TOKENS && partitions > 1 {
                let parts: Vec<Result<Partial>> =
                    (0..partitions).into_par_iter().map(|p| run(p..p + 1)).collect();
                // Same merges in the same order as the sequential loop of the kernel.
                let mut parts = parts.into_iter();
                let mut total = parts.next().ok_or_else(|| Error::shape("attention", "no keys"))??;
                for part in parts {
                    total.merge(&part?);
                }
                total
            } else {
                run(0..partitions)?
            };
            let mut out = vec![0.0; tile.tokens * tile.group * layout.head_dim];
            partial.finish(layout.head_dim, &mut out);
            Ok(out)
        })
        .collect::<Result<_>>()?;

    let mut out = vec![0.0; q.len()];
    let mut rows = out.chunks_exact_mut(width);
    // Tiles come in row order, all KV heads of a run of tokens together.
    for (tiles, results) in tiles.chunks(layout.kv_heads).zip(results.chunks(layout.kv_heads)) {
        let tokens = tiles.first().map_or(0, |t| t.tokens);
        for token in 0..tokens {
            let Some(row) = rows.next() else { break };
            for (tile, result) in tiles.iter().zip(results) {
                let width = tile.group * layout.head_dim;
                let columns = &mut row[tile.first_head * layout.head_dim..][..width];
                columns.copy_from_slice(&result[token * width..][..width]);
            }
        }
    }
    Ok(out)
}

fn tiles<'a>(q: &'a [f32], step: &'a StepInputs, kv: &KvCache, layer: usize) -> Vec<QueryTile<'a>> {
    let layout = kv.layout();
    let width = layout.query_heads * layout.head_dim;
    let tile_tokens = (TILE_ROWS / layout.group()).max(1);
    let mut tiles = Vec::new();
    let mut first_row = 0;
    for sequence in &step.sequences {
        for start in (0..sequence.rows).step_by(tile_tokens) {
            let tokens = tile_tokens.min(sequence.rows - start);
            let row = first_row + start;
            for kv_head in 0..layout.kv_heads {
                let heads = layout.query_heads_of(kv_head);
                tiles.push(QueryTile {
                    q: &q[row * width..(row + tokens) * width],
                    scales: &step.logit_scales[row..row + tokens],
                    first_position: sequence.first_position() + start,
                    tokens,
                    kv_head,
                    first_head: heads.start,
                    group: heads.len(),
                    layer,
                    block_table: &sequence.block_table,
                });
            }
        }
        first_row += sequence.rows;
    }
    tiles
}

// The experts' products of many rows with mma.sync: tiles of 128 rows of one expert by 128 of its weight rows
// (gemm/wide_tile.h), for prefill.
//
// With `Silu`, a tile is 64 gate rows and their 64 up rows, the rows of x are gathered, and out = silu(gate) * up; without,
// rows are read in place order. Blocks are persistent; those in flight together work on neighbouring columns of an
// expert, whose rows stay in L2. Each result is one sum over k in order: it does not depend on the other rows.
#include "../common/gated.h"
#include "../common/kernel.h"
#include "../gemm/wide_tile.h"
#include "grouped.h"

namespace longhaul {
namespace {

using namespace wide;

template <bool Silu>
__device__ __forceinline__ void moe_grouped_wide(const GroupedParams& p) {
    constexpr uint32_t width = Silu ? kHalf : kTile;  // result columns of a tile
    PTX_SHARED_ARRAY(uint32_t, starts, kMostExperts + 1);
    list_tiles<kTile>(p.routing, starts);
    const uint32_t ring = ptx::shared_address(ptx::dynamic_shared<unsigned char>());
    const uint32_t n_tiles = (p.n + width - 1) / width, tiles = starts[p.routing.experts] * n_tiles;
    const uint32_t row = threadIdx.x / 4, chunk = threadIdx.x % 4 * kChunk;
    for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const GroupedTile t = grouped_tile<kTile>(p.routing, starts, index, n_tiles, width);
        const Bf16* weight = grouped_weight<Silu>(p, t.expert);
        Source source;
        source.x_mask = source.weight_mask = 0;
#pragma unroll
        for (uint32_t i = 0; i < kCopies; ++i) {
            const uint32_t local = row + i * kRowsAtOnce, column = t.column + (Silu ? local % kHalf : local);
            const bool there = local < t.places;
            source.x[i] = there ? grouped_row<Silu>(p, t.first_place + local) + chunk : p.x;
            const uint64_t weight_row = Silu && local >= kHalf ? static_cast<uint64_t>(p.n) + column : column;
            source.weight[i] = weight + weight_row * p.weight_stride + chunk;
            source.x_mask |= (there ? 1u : 0u) << i;
            source.weight_mask |= (column < p.n ? 1u : 0u) << i;
        }
        Sums sums;
        product(source, p.k, ring, sums);
        for_each(sums, [&](uint32_t local, uint32_t column, const float* low, const float* high) {
            if (local >= t.places) return;
            const uint64_t to = static_cast<uint64_t>(t.first_place + local) * p.out_stride;
            column += t.column;
            if constexpr (Silu) {
                put(static_cast<Bf16*>(p.out) + to, column, p.n, gated(low[0], high[0]), gated(low[1], high[1]));
            } else {
                put(static_cast<float*>(p.out) + to, column, p.n, low[0], low[1]);
                put(static_cast<float*>(p.out) + to, column + kHalf, p.n, high[0], high[1]);
            }
        });
    }
}

}  // namespace

LONGHAUL_KERNEL(moe_gate_up_mma_128, GroupedParams, kThreads, moe_grouped_wide<true>)
LONGHAUL_KERNEL(moe_down_mma_128, GroupedParams, kThreads, moe_grouped_wide<false>)

}  // namespace longhaul

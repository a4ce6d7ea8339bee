// What the experts' grouped products share: their operands, and the tiles of an expert's rows, found on the device.
#pragma once

#include "../common/element.h"
#include "../common/reduce.h"
#include "moe.h"

namespace longhaul {

struct GroupedParams {
    const Bf16* x;       // [rows or places, x_stride]
    const Bf16* weight;  // [experts, weight_rows, weight_stride]; with Silu gate rows, then up rows
    void* out;           // bf16 (Silu) or f32 [places, out_stride]
    Routing routing;
    uint32_t n;  // columns of the result
    uint32_t k;
    uint32_t x_stride;
    uint32_t weight_stride;
    uint32_t out_stride;
    uint32_t split;      // streamers: whether blocks share a tile
    float* partials;     // streamers that share: [tiles, parts, 128 * Tokens]
    uint32_t* counters;  // streamers that share: [tiles], zero before and after
};

inline constexpr uint32_t kMostExperts = 512;

// A tile: an expert, a run of its places, and the first column of the result.
struct GroupedTile {
    uint32_t expert, first_place, places, column;
};

// Puts the first token tile of each expert, and after the last one their number, into `starts` (shared,
// [kMostExperts + 1]): one warp's running sum. All threads see it.
template <uint32_t Tokens>
__device__ __forceinline__ void list_tiles(const Routing& routing, uint32_t* starts) {
    if (threadIdx.x < 32) {
        uint32_t carried = 0;
        for (uint32_t base = 0; base < routing.experts; base += 32) {
            const uint32_t expert = base + threadIdx.x;
            uint32_t tiles = 0;
            if (expert < routing.experts)
                tiles = (routing.offsets[expert + 1] - routing.offsets[expert] + Tokens - 1) / Tokens;
            uint32_t before = tiles;
#pragma unroll
            for (uint32_t distance = 1; distance < 32; distance *= 2) {
                const uint32_t other = ptx::shfl_up(kFullWarp, before, distance);
                if (threadIdx.x >= distance) before += other;
            }
            if (expert < routing.experts) starts[expert] = carried + before - tiles;
            carried += ptx::shfl_idx(kFullWarp, before, 31);
        }
        if (threadIdx.x == 0) starts[routing.experts] = carried;
    }
    __syncthreads();
}

// Tile `index` in the order of token tiles, then columns, `width` of which make up a tile.
template <uint32_t Tokens>
__device__ __forceinline__ GroupedTile grouped_tile(const Routing& routing, const uint32_t* starts, uint32_t index,
                                                    uint32_t n_tiles, uint32_t width) {
    const uint32_t token_tile = index / n_tiles;
    uint32_t low = 0, high = routing.experts;  // the last expert that starts at or before the token tile
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (starts[middle] <= token_tile)
            low = middle;
        else
            high = middle;
    }
    const uint32_t first = routing.offsets[low] + (token_tile - starts[low]) * Tokens;
    const uint32_t left = routing.offsets[low + 1] - first;
    return {low, first, left < Tokens ? left : Tokens, index % n_tiles * width};
}

// Row of x that `place` of the experts' order multiplies: the first product gathers, the second reads in order.
template <bool Silu>
__device__ __forceinline__ const Bf16* grouped_row(const GroupedParams& p, uint32_t place) {
    const uint32_t row = Silu ? p.routing.permuted_slot[place] / p.routing.top_k : place;
    return p.x + static_cast<uint64_t>(row) * p.x_stride;
}

// The first weight row of an expert.
template <bool Silu>
__device__ __forceinline__ const Bf16* grouped_weight(const GroupedParams& p, uint32_t expert) {
    return p.weight + static_cast<uint64_t>(expert) * (Silu ? 2 : 1) * p.n * p.weight_stride;
}

}  // namespace longhaul

// The experts' products with mma.sync: grouped weight streamers.
//
// A tile is 64 weight rows of one expert by up to `Tokens` of the rows routed to it; experts without rows have no tile.
// Blocks are persistent and take tiles in turn, neighbours in weight rows at the same time; the copies of the next tile
// start while the last one is still multiplied. Each result is one sum over k in order: it does not depend on the other
// rows. The first product gathers its rows and applies SiLU(gate) * up, the second reads them in place order.
#include "../common/kernel.h"
#include "../common/reduce.h"
#include "../gemm/skinny_tile.h"
#include "moe.h"

namespace longhaul {
namespace {

using namespace skinny;

struct GroupedParams {
    const Bf16* x;       // [rows or places, x_stride]
    const Bf16* weight;  // [experts, weight_rows, weight_stride]; with Silu gate rows, then up rows
    void* out;           // bf16 (Silu) or f32 [places, out_stride]
    Routing routing;
    uint32_t n;          // columns of the result
    uint32_t k;
    uint32_t x_stride;
    uint32_t weight_stride;
    uint32_t out_stride;
    uint32_t reserved;
};

constexpr uint32_t kMostExperts = 512;

template <uint32_t Tokens, bool Silu>
struct Grouped {
    static constexpr uint32_t kWidth = Silu ? kTileRows / 2 : kTileRows;  // result columns of a tile
    static constexpr uint32_t kTokenCopies = (Tokens * 8 + kThreads - 1) / kThreads;

    // One tile: an expert, a run of its places, a run of weight rows.
    struct Tile {
        uint32_t expert, first_place, places, column;
    };

    const GroupedParams& p;
    const uint32_t* starts;  // first token tile of each expert
    uint32_t n_tiles;

    __device__ __forceinline__ Tile tile(uint32_t index) const {
        const uint32_t token_tile = index / n_tiles;
        uint32_t low = 0, high = p.routing.experts;
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (starts[middle] <= token_tile)
                low = middle;
            else
                high = middle;
        }
        const uint32_t first = p.routing.offsets[low] + (token_tile - starts[low]) * Tokens;
        const uint32_t left = p.routing.offsets[low + 1] - first;
        return {low, first, left < Tokens ? left : Tokens, index % n_tiles * kWidth};
    }

    __device__ __forceinline__ void load(const Tile& t, uint32_t k0, uint32_t stage) const {
        const uint64_t weight_rows = Silu ? 2 * static_cast<uint64_t>(p.n) : p.n;
        const Bf16* weight = p.weight + t.expert * weight_rows * p.weight_stride;
#pragma unroll
        for (uint32_t i = 0; i < kTileRows * 8 / kThreads; ++i) {
            const uint32_t at = i * kThreads + threadIdx.x, row = at / 8, chunk = at % 8;
            const uint32_t column = t.column + row % kWidth;
            const bool inside = column < p.n && k0 + chunk * kChunk < p.k;
            const uint64_t index = row < kWidth ? column : static_cast<uint64_t>(p.n) + column;
            const Bf16* source = inside ? weight + index * p.weight_stride + k0 + chunk * kChunk : p.weight;
            ptx::cp_async_cg_16_zfill(stage + swizzled(row, chunk), source, inside ? 16 : 0);
        }
        const uint32_t tokens = stage + kTileRows * kRowBytes;
#pragma unroll
        for (uint32_t i = 0; i < kTokenCopies; ++i) {
            const uint32_t at = i * kThreads + threadIdx.x, token = at / 8, chunk = at % 8;
            if (at >= Tokens * 8) break;
            const uint32_t k = k0 + chunk * kChunk;
            const uint32_t bytes = token >= t.places || k >= p.k ? 0 : p.k - k >= kChunk ? 16 : (p.k - k) * 2;
            const Bf16* source = p.x;
            if (bytes != 0) {
                const uint32_t place = t.first_place + token;
                const uint32_t row = Silu ? p.routing.permuted_slot[place] / p.routing.top_k : place;
                source = p.x + static_cast<uint64_t>(row) * p.x_stride + k;
            }
            ptx::cp_async_cg_16_zfill(tokens + swizzled(token, chunk), source, bytes);
        }
    }

    __device__ __forceinline__ void write(const Tile& t, const float* out_tile) const {
        for (uint32_t at = threadIdx.x; at < kWidth * t.places; at += kThreads) {
            const uint32_t token = at / kWidth, column = at % kWidth;
            if (t.column + column >= p.n) continue;
            const uint64_t to = static_cast<uint64_t>(t.first_place + token) * p.out_stride + t.column + column;
            const float value = out_tile[token * kOutPitch + column];
            if constexpr (Silu)
                static_cast<Bf16*>(p.out)[to] =
                    from_float<Bf16>(gated(value, out_tile[token * kOutPitch + kWidth + column]));
            else
                static_cast<float*>(p.out)[to] = value;
        }
    }
};

template <uint32_t Tokens, bool Silu>
__device__ __forceinline__ void moe_grouped(const GroupedParams& p) {
    using Work = Grouped<Tokens, Silu>;
    PTX_SHARED_ARRAY(uint32_t, starts, kMostExperts + 1);
    constexpr uint32_t stages = kStages<Tokens>;
    // First token tile of each expert: one warp's running sum.
    if (threadIdx.x < 32) {
        uint32_t carried = 0;
        for (uint32_t base = 0; base < p.routing.experts; base += 32) {
            const uint32_t expert = base + threadIdx.x;
            uint32_t tiles = 0;
            if (expert < p.routing.experts)
                tiles = (p.routing.offsets[expert + 1] - p.routing.offsets[expert] + Tokens - 1) / Tokens;
            uint32_t before = tiles;
#pragma unroll
            for (uint32_t distance = 1; distance < 32; distance *= 2) {
                const uint32_t other = ptx::shfl_up(kFullWarp, before, distance);
                if (threadIdx.x >= distance) before += other;
            }
            if (expert < p.routing.experts) starts[expert] = carried + before - tiles;
            carried += ptx::shfl_idx(kFullWarp, before, 31);
        }
        if (threadIdx.x == 0) starts[p.routing.experts] = carried;
    }
    __syncthreads();

    unsigned char* shared = ptx::dynamic_shared<unsigned char>();
    const uint32_t ring = ptx::shared_address(shared);
    float* out_tile = reinterpret_cast<float*>(shared + stages * kStageBytes<Tokens>);
    const Work work{p, starts, (p.n + Work::kWidth - 1) / Work::kWidth};
    const uint32_t total = starts[p.routing.experts] * work.n_tiles, k_blocks = (p.k + kBlock - 1) / kBlock;
    if (blockIdx.x >= total) return;
    const uint32_t units = (total - blockIdx.x + gridDim.x - 1) / gridDim.x * k_blocks;

    uint32_t load_tile = blockIdx.x, load_block = 0, load_stage = 0, loaded = 0;
    typename Work::Tile ahead = work.tile(load_tile);
    const auto load_next = [&] {
        if (loaded < units) {
            work.load(ahead, load_block * kBlock, ring + load_stage * kStageBytes<Tokens>);
            ++loaded;
            load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
            if (++load_block == k_blocks) {
                load_block = 0;
                load_tile += gridDim.x;
                if (load_tile < total) ahead = work.tile(load_tile);
            }
        }
        ptx::cp_async_commit_group();
    };
#pragma unroll
    for (uint32_t s = 0; s < stages - 1; ++s) load_next();

    float sum[kAccumulators<Tokens>][4];
    clear<Tokens>(sum);
    uint32_t stage = 0, block = 0, index = blockIdx.x;
    for (uint32_t unit = 0; unit < units; ++unit) {
        ptx::cp_async_wait_group<static_cast<int>(stages) - 2>();
        __syncthreads();
        load_next();
        multiply<Tokens>(ring + stage * kStageBytes<Tokens>, sum);
        stage = stage + 1 == stages ? 0 : stage + 1;
        if (++block < k_blocks) continue;
        block = 0;
        spill<Tokens>(out_tile, sum);
        __syncthreads();
        work.write(work.tile(index), out_tile);
        clear<Tokens>(sum);
        index += gridDim.x;
    }
}

}  // namespace

LONGHAUL_KERNEL(moe_gate_up_mma_8, GroupedParams, kThreads, moe_grouped<8, true>)
LONGHAUL_KERNEL(moe_gate_up_mma_16, GroupedParams, kThreads, moe_grouped<16, true>)
LONGHAUL_KERNEL(moe_gate_up_mma_32, GroupedParams, kThreads, moe_grouped<32, true>)
LONGHAUL_KERNEL(moe_gate_up_mma_64, GroupedParams, kThreads, moe_grouped<64, true>)
LONGHAUL_KERNEL(moe_down_mma_8, GroupedParams, kThreads, moe_grouped<8, false>)
LONGHAUL_KERNEL(moe_down_mma_16, GroupedParams, kThreads, moe_grouped<16, false>)
LONGHAUL_KERNEL(moe_down_mma_32, GroupedParams, kThreads, moe_grouped<32, false>)
LONGHAUL_KERNEL(moe_down_mma_64, GroupedParams, kThreads, moe_grouped<64, false>)

}  // namespace longhaul

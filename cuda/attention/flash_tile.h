// A warp's share of flash attention with mma.m16n8k16: 16 query rows against tiles of keys in shared memory.
//
// Source: Dao, arXiv 2307.08691. Rows of K, V and Q tiles are head_dim bf16 values, 16-byte chunks XOR-swizzled by the row,
// so that ldmatrix meets no bank conflicts. Scores are kept in units of log2, one FMA each before exp2.
#pragma once

#include "../common/element.h"
#include "../common/reduce.h"
#include "../ptx/cp_async.h"
#include "../ptx/matrix_move.h"
#include "../ptx/mma.h"
#include "attention.h"

namespace longhaul {

inline constexpr uint32_t kTileTokens = 64;
inline constexpr float kLog2E = 1.4426950408889634f;

template <uint32_t HeadDim>
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * HeadDim * 2 + ((chunk ^ (row & 7u)) << 4);
}

// Copies keys [begin, begin + count) of a KV head to `keys`, and their values to `values`; rows from `count` are zero.
template <uint32_t HeadDim, uint32_t Threads>
__device__ __forceinline__ void load_tile(const AttentionParams& p, const SequenceInfo& sequence, uint32_t kv_head,
                                          uint32_t begin, uint32_t count, uint32_t keys, uint32_t values) {
    constexpr uint32_t chunks = HeadDim / 8;
    const uint32_t* table = p.step->block_table(sequence);
#pragma unroll 4
    for (uint32_t i = 0; i < kTileTokens * chunks / Threads; ++i) {
        const uint32_t at = i * Threads + threadIdx.x, row = at / chunks, chunk = at % chunks;
        const bool inside = row < count;
        const uint32_t token = begin + (inside ? row : 0);
        const uint64_t index =
            p.kv.index(table[token / p.kv.block_size], kv_head, token % p.kv.block_size) + chunk * 8;
        const uint32_t bytes = inside ? 16 : 0, to = swizzled<HeadDim>(row, chunk);
        ptx::cp_async_cg_16_zfill(keys + to, static_cast<const Bf16*>(p.kv.keys) + index, bytes);
        ptx::cp_async_cg_16_zfill(values + to, static_cast<const Bf16*>(p.kv.values) + index, bytes);
    }
}

// Writes one rotated pair (j, j + HeadDim / 2) of a query row of the tile at `tile` (generic pointer).
template <uint32_t HeadDim>
__device__ __forceinline__ void store_rotated(unsigned char* tile, uint32_t row, uint32_t j, float low, float high) {
    const uint32_t k = j + HeadDim / 2;
    *reinterpret_cast<Bf16*>(tile + swizzled<HeadDim>(row, j / 8) + j % 8 * 2) = from_float<Bf16>(low);
    *reinterpret_cast<Bf16*>(tile + swizzled<HeadDim>(row, k / 8) + k % 8 * 2) = from_float<Bf16>(high);
}

// Rotates pair j of the query at `q` against keys of chunk `key_chunk` into row `row` of the tile.
template <uint32_t HeadDim>
__device__ __forceinline__ void rotate_pair(const AttentionParams& p, const Bf16* q, uint32_t position,
                                            uint32_t key_chunk, unsigned char* tile, uint32_t row, uint32_t j) {
    constexpr uint32_t half = HeadDim / 2;
    const uint64_t entry = static_cast<uint64_t>(p.rope.query_row(position, key_chunk)) * half + j;
    const float c = p.rope.cos[entry], s = p.rope.sin[entry];
    const float a = to_float(q[j]), b = to_float(q[j + half]);
    store_rotated<HeadDim>(tile, row, j, a * c - b * s, b * c + a * s);
}

// The running softmax of a warp's 16 rows. A thread holds parts of rows lane / 4 and lane / 4 + 8.
template <uint32_t HeadDim>
struct FlashState {
    uint32_t q[HeadDim / 16][4];    // A operand: the rotated queries
    float out[HeadDim / 8][4];      // unnormalised
    float largest[2], sum[2];       // per row; the sum is this thread's part
    float scale[2];                 // logit scale times log2(e)
    uint32_t last_key[2];           // the row's own position

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (uint32_t n = 0; n < HeadDim / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) out[n][i] = 0.0f;
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) {
            largest[r] = __uint_as_float(0xff800000u);
            sum[r] = 0.0f;
        }
    }

    // Reads the queries of rows `first_row`... of the tile at shared address `tile`.
    __device__ __forceinline__ void load_queries(uint32_t tile, uint32_t first_row) {
        const uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t k = 0; k < HeadDim / 16; ++k)
            ptx::ldmatrix_x4(q[k], tile + swizzled<HeadDim>(first_row + lane % 16, 2 * k + lane / 16));
    }

    // Attends to `Tokens` rows of the tiles from row `first` on, which hold keys `begin`...; keys from `end` on, or beyond
    // a row's own position where `Masked`, do not count.
    template <uint32_t Tokens, bool Masked>
    __device__ __forceinline__ void attend(uint32_t keys, uint32_t values, uint32_t first, uint32_t begin, uint32_t end) {
        const uint32_t lane = threadIdx.x % 32;
        float score[Tokens / 8][4];
#pragma unroll
        for (uint32_t n = 0; n < Tokens / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) score[n][i] = 0.0f;
#pragma unroll
        for (uint32_t k = 0; k < HeadDim / 16; ++k)
#pragma unroll
            for (uint32_t pair = 0; pair < Tokens / 16; ++pair) {
                uint32_t b[4];
                const uint32_t row = first + pair * 16 + lane / 16 * 8 + lane % 8;
                ptx::ldmatrix_x4(b, keys + swizzled<HeadDim>(row, 2 * k + lane / 8 % 2));
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                ptx::mma_m16n8k16_bf16(score[2 * pair], q[k], low);
                ptx::mma_m16n8k16_bf16(score[2 * pair + 1], q[k], high);
            }
        const float minus_infinity = __uint_as_float(0xff800000u);
        float tile_largest[2] = {minus_infinity, minus_infinity};
#pragma unroll
        for (uint32_t n = 0; n < Tokens / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                float value = score[n][i] * scale[i / 2];
                if constexpr (Masked) {
                    const uint32_t key = begin + n * 8 + lane % 4 * 2 + i % 2;
                    if (key > last_key[i / 2] || key >= end) value = minus_infinity;
                }
                score[n][i] = value;
                tile_largest[i / 2] = Max{}(tile_largest[i / 2], value);
            }
        float correction[2], base[2];
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) {
            float value = tile_largest[r];
            value = Max{}(value, __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(value), 1)));
            value = Max{}(value, __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(value), 2)));
            value = Max{}(value, largest[r]);
            // A row that has met no key yet: any finite base will do, all its weights are 0.
            base[r] = value == minus_infinity ? 0.0f : value;
            correction[r] = exp2f(largest[r] - base[r]);
            largest[r] = value;
            sum[r] *= correction[r];
        }
#pragma unroll
        for (uint32_t n = 0; n < Tokens / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                score[n][i] = exp2f(score[n][i] - base[i / 2]);
                sum[i / 2] += score[n][i];
            }
#pragma unroll
        for (uint32_t n = 0; n < HeadDim / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) out[n][i] *= correction[i / 2];
#pragma unroll
        for (uint32_t k = 0; k < Tokens / 16; ++k) {
            const uint32_t a[4] = {
                ptx::cvt_bf16x2(score[2 * k][0], score[2 * k][1]), ptx::cvt_bf16x2(score[2 * k][2], score[2 * k][3]),
                ptx::cvt_bf16x2(score[2 * k + 1][0], score[2 * k + 1][1]),
                ptx::cvt_bf16x2(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
            for (uint32_t pair = 0; pair < HeadDim / 16; ++pair) {
                uint32_t b[4];
                const uint32_t row = first + k * 16 + lane / 8 % 2 * 8 + lane % 8;
                ptx::ldmatrix_x4_trans(b, values + swizzled<HeadDim>(row, 2 * pair + lane / 16));
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                ptx::mma_m16n8k16_bf16(out[2 * pair], a, low);
                ptx::mma_m16n8k16_bf16(out[2 * pair + 1], a, high);
            }
        }
    }

    // Adds up the threads' parts of the row sums.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) {
            sum[r] += __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(sum[r]), 1));
            sum[r] += __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(sum[r]), 2));
        }
    }
};

}  // namespace longhaul

// A warp's share of flash attention with mma.m16n8k16: tiles of 16 query rows against tiles of keys in shared memory.
//
// Source: Dao, arXiv 2307.08691. Rows of K, V and Q tiles are head_dim bf16 values, 16-byte chunks XOR-swizzled by the row,
// so that ldmatrix meets no bank conflicts. Queries are rotated, scaled by the logit scale times log2(e) and then rounded
// once, so that scores are exponents of 2 as they come.
#pragma once

#include "../common/element.h"
#include "../common/reduce.h"
#include "../ptx/cp_async.h"
#include "../ptx/load_store.h"
#include "../ptx/math.h"
#include "../ptx/matrix_move.h"
#include "../ptx/mma.h"
#include "attention.h"

namespace longhaul {

inline constexpr uint32_t kTileTokens = 64;
inline constexpr uint32_t kPiece = 16;  // keys that lie in one block of the pool and in one chunk
inline constexpr float kLog2E = 1.4426950408889634f;

// Byte offset of 16-byte chunk `chunk` of row `row`. Bits 4 to 6 hold the chunk's low bits XOR the row's: going 2 k chunks
// further from an even chunk is an XOR with 32 k.
template <uint32_t HeadDim>
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * HeadDim * 2 + ((chunk ^ (row & 7u)) << 4);
}

// A place in a sequence's cache: its block table's entry, in words from the step's header, and the slot. It moves on by
// additions only.
struct KvCursor {
    uint32_t entry, slot;

    __device__ __forceinline__ void advance(uint32_t tokens, uint32_t block_size) {
        slot += tokens;
        while (slot >= block_size) {
            slot -= block_size;
            ++entry;
        }
    }
};

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Rotates elements [8 chunk, 8 chunk + 8) and their partners head_dim / 2 further of the query at `q` against keys of chunk
// `key_chunk`, scales them, and writes them to row `row` of the tile at `tile` (generic pointer).
template <uint32_t HeadDim>
__device__ __forceinline__ void rotate_chunk(const RopeParams& rope, const Bf16* q, uint32_t position, uint32_t key_chunk,
                                             float scale, unsigned char* tile, uint32_t row, uint32_t chunk) {
    constexpr uint32_t half = HeadDim / 2;
    const uint64_t entry = static_cast<uint64_t>(rope.query_row(position, key_chunk)) * half + chunk * 8;
    const uint4 a = *reinterpret_cast<const uint4*>(q + chunk * 8);
    const uint4 b = *reinterpret_cast<const uint4*>(q + chunk * 8 + half);
    const uint32_t first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
    uint32_t low[4], high[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
        const float2 c = *reinterpret_cast<const float2*>(rope.cos + entry + 2 * i);
        const float2 s = *reinterpret_cast<const float2*>(rope.sin + entry + 2 * i);
        const float x0 = low_half(first[i]), x1 = high_half(first[i]);
        const float y0 = low_half(second[i]), y1 = high_half(second[i]);
        low[i] = ptx::cvt_bf16x2((x0 * c.x - y0 * s.x) * scale, (x1 * c.y - y1 * s.y) * scale);
        high[i] = ptx::cvt_bf16x2((y0 * c.x + x0 * s.x) * scale, (y1 * c.y + x1 * s.y) * scale);
    }
    *reinterpret_cast<uint4*>(tile + swizzled<HeadDim>(row, chunk)) = make_uint4(low[0], low[1], low[2], low[3]);
    *reinterpret_cast<uint4*>(tile + swizzled<HeadDim>(row, chunk + half / 8)) =
        make_uint4(high[0], high[1], high[2], high[3]);
}

// The same chunk of a row that is not there.
template <uint32_t HeadDim>
__device__ __forceinline__ void clear_chunk(unsigned char* tile, uint32_t row, uint32_t chunk) {
    *reinterpret_cast<uint4*>(tile + swizzled<HeadDim>(row, chunk)) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(tile + swizzled<HeadDim>(row, chunk + HeadDim / 16)) = make_uint4(0, 0, 0, 0);
}

// The running softmax of `Tiles` tiles of query rows. A thread holds parts of rows lane / 4 and, with `Halves` = 2,
// lane / 4 + 8 of each; with `Halves` = 1 only the first 8 rows of a tile are there.
//
// Every row meets a key that counts in its first tile (key 0, or the first of a split), so maxima are finite from then on
// and nothing here looks out for rows without keys. Keys that do not count add exact zeros: what a row sums up, and in which
// order, depends on its keys only.
template <uint32_t HeadDim, uint32_t Tiles, uint32_t Halves>
struct FlashState {
    float out[Tiles][HeadDim / 8][4];            // unnormalised
    float largest[Tiles][Halves], sum[Tiles][Halves];  // per row; the sum is this thread's part

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (uint32_t t = 0; t < Tiles; ++t) {
#pragma unroll
            for (uint32_t n = 0; n < HeadDim / 8; ++n)
#pragma unroll
                for (uint32_t i = 0; i < 4; ++i) out[t][n][i] = 0.0f;
#pragma unroll
            for (uint32_t r = 0; r < Halves; ++r) {
                largest[t][r] = __uint_as_float(0xff800000u);
                sum[t][r] = 0.0f;
            }
        }
    }

    // Scores of `Tokens` keys. `keys` is the shared address of row 0, and `queries(k, a)` puts the A operand of step k of
    // 16 elements into a[Tiles][4].
    template <uint32_t Tokens, class Queries>
    __device__ __forceinline__ void multiply(uint32_t keys, Queries queries, float (&score)[Tiles][Tokens / 8][4]) const {
        const uint32_t lane = threadIdx.x % 32;
        const uint32_t base = keys + swizzled<HeadDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (uint32_t t = 0; t < Tiles; ++t)
#pragma unroll
            for (uint32_t n = 0; n < Tokens / 8; ++n)
#pragma unroll
                for (uint32_t i = 0; i < 4; ++i) score[t][n][i] = 0.0f;
#pragma unroll
        for (uint32_t k = 0; k < HeadDim / 16; ++k) {
            uint32_t a[Tiles][4];
            queries(k, a);
#pragma unroll
            for (uint32_t pair = 0; pair < Tokens / 16; ++pair) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, (base ^ (k * 32)) + pair * 16 * HeadDim * 2);
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
                for (uint32_t t = 0; t < Tiles; ++t) {
                    ptx::mma_m16n8k16_bf16(score[t][2 * pair], a[t], low);
                    ptx::mma_m16n8k16_bf16(score[t][2 * pair + 1], a[t], high);
                }
            }
        }
    }

    // Drops the scores of keys beyond `last(t, r)`, the last key that counts for a row, counted from the tile's first.
    template <uint32_t Tokens, class Last>
    __device__ __forceinline__ void mask(float (&score)[Tiles][Tokens / 8][4], Last last) const {
#pragma unroll
        for (uint32_t t = 0; t < Tiles; ++t)
#pragma unroll
            for (uint32_t r = 0; r < Halves; ++r) {
                // Negative when all keys of the tile lie behind the row.
                const int32_t limit = last(t, r) - static_cast<int32_t>(threadIdx.x % 4 * 2);
#pragma unroll
                for (uint32_t n = 0; n < Tokens / 8; ++n)
#pragma unroll
                    for (uint32_t i = 0; i < 2; ++i)
                        if (static_cast<int32_t>(n * 8 + i) > limit) score[t][n][2 * r + i] = __uint_as_float(0xff800000u);
            }
    }

    // Turns scores into weights, and brings sums and results to the new maxima. They change rarely once many keys are
    // past; a factor of 1 is as good as none, so leaving it out changes no bit.
    template <uint32_t Tokens>
    __device__ __forceinline__ void weigh(float (&score)[Tiles][Tokens / 8][4]) {
        float before[Tiles][Halves];
        bool grew = false;
#pragma unroll
        for (uint32_t t = 0; t < Tiles; ++t)
#pragma unroll
            for (uint32_t r = 0; r < Halves; ++r) {
                float value = fmaxf(score[t][0][2 * r], score[t][0][2 * r + 1]);
#pragma unroll
                for (uint32_t n = 1; n < Tokens / 8; ++n)
                    value = fmaxf(value, fmaxf(score[t][n][2 * r], score[t][n][2 * r + 1]));
                value = fmaxf(value, __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(value), 1)));
                value = fmaxf(value, __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(value), 2)));
                before[t][r] = largest[t][r];
                largest[t][r] = fmaxf(value, before[t][r]);
                grew = grew || largest[t][r] != before[t][r];
            }
        if (__any_sync(kFullWarp, grew)) {
#pragma unroll
            for (uint32_t t = 0; t < Tiles; ++t)
#pragma unroll
                for (uint32_t r = 0; r < Halves; ++r) {
                    const float factor = ptx::ex2_approx_ftz(before[t][r] - largest[t][r]);
                    sum[t][r] *= factor;
#pragma unroll
                    for (uint32_t n = 0; n < HeadDim / 8; ++n) {
                        out[t][n][2 * r] *= factor;
                        out[t][n][2 * r + 1] *= factor;
                    }
                }
        }
#pragma unroll
        for (uint32_t t = 0; t < Tiles; ++t)
#pragma unroll
            for (uint32_t n = 0; n < Tokens / 8; ++n)
#pragma unroll
                for (uint32_t i = 0; i < 2 * Halves; ++i) {
                    score[t][n][i] = ptx::ex2_approx_ftz(score[t][n][i] - largest[t][i / 2]);
                    sum[t][i / 2] += score[t][n][i];
                }
    }

    // Adds the weighted values, whose row 0 is at shared address `values`.
    template <uint32_t Tokens>
    __device__ __forceinline__ void accumulate(uint32_t values, const float (&weight)[Tiles][Tokens / 8][4]) {
        const uint32_t lane = threadIdx.x % 32;
        const uint32_t base = values + swizzled<HeadDim>(lane % 16, lane / 16);
#pragma unroll
        for (uint32_t k = 0; k < Tokens / 16; ++k) {
            uint32_t a[Tiles][4];
#pragma unroll
            for (uint32_t t = 0; t < Tiles; ++t)
#pragma unroll
                for (uint32_t i = 0; i < 4; ++i) {
                    const float* pair = weight[t][2 * k + i / 2] + i % 2 * 2;
                    a[t][i] = i % 2 < Halves ? ptx::cvt_bf16x2(pair[0], pair[1]) : 0;
                }
#pragma unroll
            for (uint32_t pair = 0; pair < HeadDim / 16; ++pair) {
                uint32_t b[4];
                ptx::ldmatrix_x4_trans(b, (base ^ (pair * 32)) + k * 16 * HeadDim * 2);
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
                for (uint32_t t = 0; t < Tiles; ++t) {
                    ptx::mma_m16n8k16_bf16(out[t][2 * pair], a[t], low);
                    ptx::mma_m16n8k16_bf16(out[t][2 * pair + 1], a[t], high);
                }
            }
        }
    }

    // Adds up the threads' parts of the row sums.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (uint32_t t = 0; t < Tiles; ++t)
#pragma unroll
            for (uint32_t r = 0; r < Halves; ++r) {
                float& value = sum[t][r];
                value += __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(value), 1));
                value += __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(value), 2));
            }
    }
};

}  // namespace longhaul

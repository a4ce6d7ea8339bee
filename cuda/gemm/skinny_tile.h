// Tiles of weight streamers: 64 weight rows (the M operand of mma.m16n8k16) by up to 64 tokens (the N operand), 64 of k a
// stage, four warps of 16 weight rows each.
#pragma once

#include "../common/element.h"
#include "../ptx/cp_async.h"
#include "../ptx/matrix_move.h"
#include "../ptx/mma.h"

namespace longhaul {
namespace skinny {

using ptx::uint32_t;
using ptx::uint64_t;

inline constexpr uint32_t kThreads = 128;
inline constexpr uint32_t kTileRows = 64;  // weight rows of a tile
inline constexpr uint32_t kBlock = 64;     // of k: 128 bytes, the span of the swizzle
inline constexpr uint32_t kChunk = 8;      // elements of a 16-byte copy
inline constexpr uint32_t kRowBytes = kBlock * 2;
inline constexpr uint32_t kOutPitch = kTileRows + 4;  // floats between tokens of the output tile

template <uint32_t Tokens>
inline constexpr uint32_t kStages = Tokens <= 16 ? 6 : Tokens == 32 ? 5 : 4;
template <uint32_t Tokens>
inline constexpr uint32_t kStageBytes = (kTileRows + Tokens) * kRowBytes;
template <uint32_t Tokens>
inline constexpr uint32_t kAccumulators = Tokens / 8;  // of 4 floats

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows: bank conflict free for ldmatrix.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7u)) << 4);
}

// sum += weights tile * token tile, for the stage at shared address `stage` (weights first, then tokens).
template <uint32_t Tokens>
__device__ __forceinline__ void multiply(uint32_t stage, float (&sum)[kAccumulators<Tokens>][4]) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t tokens = stage + kTileRows * kRowBytes;
#pragma unroll
    for (uint32_t step = 0; step < kBlock / 16; ++step) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, stage + swizzled(warp * 16 + lane % 16, step * 2 + lane / 16));
        if constexpr (Tokens == 8) {
            uint32_t b[2];
            ptx::ldmatrix_x2(b, tokens + swizzled(lane % 8, step * 2 + lane / 8 % 2));
            ptx::mma_m16n8k16_bf16(sum[0], a, b);
        } else {
#pragma unroll
            for (uint32_t pair = 0; pair < Tokens / 16; ++pair) {
                uint32_t b[4];
                const uint32_t row = pair * 16 + lane / 16 * 8 + lane % 8;
                ptx::ldmatrix_x4(b, tokens + swizzled(row, step * 2 + lane / 8 % 2));
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                ptx::mma_m16n8k16_bf16(sum[2 * pair], a, low);
                ptx::mma_m16n8k16_bf16(sum[2 * pair + 1], a, high);
            }
        }
    }
}

// Puts the accumulators into the output tile [token][weight row]; a barrier must follow.
template <uint32_t Tokens>
__device__ __forceinline__ void spill(float* out_tile, const float (&sum)[kAccumulators<Tokens>][4]) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (uint32_t i = 0; i < kAccumulators<Tokens>; ++i)
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
            const uint32_t row = warp * 16 + lane / 4 + j / 2 * 8, token = i * 8 + lane % 4 * 2 + j % 2;
            out_tile[token * kOutPitch + row] = sum[i][j];
        }
}

// The gated activation of one output element. As the unfused kernels do, both products are rounded to bf16 first.
__device__ __forceinline__ float gated(float gate, float up) {
    gate = to_float(from_float<Bf16>(gate));
    return gate / (1.0f + expf(-gate)) * to_float(from_float<Bf16>(up));
}

template <uint32_t Tokens>
__device__ __forceinline__ void clear(float (&sum)[kAccumulators<Tokens>][4]) {
#pragma unroll
    for (uint32_t i = 0; i < kAccumulators<Tokens>; ++i)
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) sum[i][j] = 0.0f;
}

}  // namespace skinny
}  // namespace longhaul

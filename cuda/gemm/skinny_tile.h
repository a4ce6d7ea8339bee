// Tiles of weight streamers: 128 weight rows (the M operand of mma.m16n8k16) by up to 64 tokens (the N operand), 64 of k a
// stage. Each of four warps takes 16 rows of the tile's first half and 16 of its second, so that a gate and its up
// product meet in one thread, and each token fragment serves two products.
#pragma once

#include "../common/element.h"
#include "../common/gated.h"
#include "../ptx/cp_async.h"
#include "../ptx/load_store.h"
#include "../ptx/matrix_move.h"
#include "../ptx/mma.h"

namespace longhaul {
namespace skinny {

using ptx::uint32_t;
using ptx::uint64_t;

inline constexpr uint32_t kThreads = 128;
inline constexpr uint32_t kTileRows = 128;  // weight rows of a tile
inline constexpr uint32_t kHalfRows = kTileRows / 2;
inline constexpr uint32_t kBlock = 64;  // of k: 128 bytes, the span of the swizzle
inline constexpr uint32_t kChunk = 8;   // elements of a 16-byte copy
inline constexpr uint32_t kRowBytes = kBlock * 2;
inline constexpr uint32_t kRowsAtOnce = kThreads / (kBlock / kChunk);  // rows that one copy of every thread fills

template <uint32_t Tokens>
inline constexpr uint32_t kStages = Tokens <= 32 ? 4 : 3;
template <uint32_t Tokens>
inline constexpr uint32_t kStageBytes = (kTileRows + Tokens) * kRowBytes;
template <uint32_t Tokens>
inline constexpr uint32_t kTokenCopies = (Tokens + kRowsAtOnce - 1) / kRowsAtOnce;

// A thread's sums: [half of the tile][8 tokens][of the fragment].
template <uint32_t Tokens>
using Sums = float[2][Tokens / 8][4];

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows: bank conflict free for ldmatrix. Two chunks
// further from an even one is an XOR with 32.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7u)) << 4);
}

// Where a thread's copies of one weight tile come from: its chunk of its first row in each half, and how many rows of each
// half are there from that row on.
struct WeightSource {
    const Bf16* half[2];
    uint32_t rows[2];
};

// Copies 64 of k of a weight tile to `stage`. `inside` is false where the thread's chunk lies beyond k; what is not there
// is zero.
__device__ __forceinline__ void load_weights(const WeightSource& source, uint32_t k0, bool inside, uint32_t stride,
                                             uint32_t stage, uint64_t policy) {
    const uint32_t row = threadIdx.x / 8, to = stage + swizzled(row, threadIdx.x % 8);
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half)
#pragma unroll
        for (uint32_t r = 0; r < kHalfRows; r += kRowsAtOnce)
            ptx::cp_async_cg_16_zfill(to + (half * kHalfRows + r) * kRowBytes,
                                      source.half[half] + k0 + static_cast<uint64_t>(r) * stride,
                                      inside && r < source.rows[half] ? 16 : 0, policy);
}

// sums += weight tile * token tile, for the stage at shared address `stage` (weights first, then tokens).
template <uint32_t Tokens>
__device__ __forceinline__ void multiply(uint32_t stage, Sums<Tokens>& sums) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t weights = stage + swizzled(warp * 16 + lane % 16, lane / 16);
    const uint32_t token_row = Tokens == 8 ? lane % 8 : lane / 16 * 8 + lane % 8;
    const uint32_t tokens = stage + kTileRows * kRowBytes + swizzled(token_row, lane / 8 % 2);
#pragma unroll
    for (uint32_t step = 0; step < kBlock / 16; ++step) {
        uint32_t a[2][4];
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half)
            ptx::ldmatrix_x4(a[half], (weights ^ (step * 32)) + half * kHalfRows * kRowBytes);
        if constexpr (Tokens == 8) {
            uint32_t b[2];
            ptx::ldmatrix_x2(b, tokens ^ (step * 32));
#pragma unroll
            for (uint32_t half = 0; half < 2; ++half) ptx::mma_m16n8k16_bf16(sums[half][0], a[half], b);
        } else {
#pragma unroll
            for (uint32_t pair = 0; pair < Tokens / 16; ++pair) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, (tokens ^ (step * 32)) + pair * 16 * kRowBytes);
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
                for (uint32_t half = 0; half < 2; ++half) {
                    ptx::mma_m16n8k16_bf16(sums[half][2 * pair], a[half], low);
                    ptx::mma_m16n8k16_bf16(sums[half][2 * pair + 1], a[half], high);
                }
            }
        }
    }
}

// Calls visit(row of the half, token, sum in the first half, sum in the second) for the thread's sums.
template <uint32_t Tokens, class Visit>
__device__ __forceinline__ void for_each(const Sums<Tokens>& sums, Visit visit) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (uint32_t i = 0; i < Tokens / 8; ++i)
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j)
            visit(warp * 16 + lane / 4 + j / 2 * 8, i * 8 + lane % 4 * 2 + j % 2, sums[0][i][j], sums[1][i][j]);
}

template <uint32_t Tokens>
__device__ __forceinline__ void clear(Sums<Tokens>& sums) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half)
#pragma unroll
        for (uint32_t i = 0; i < Tokens / 8; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) sums[half][i][j] = 0.0f;
}

// total += sums.
template <uint32_t Tokens>
__device__ __forceinline__ void accumulate(Sums<Tokens>& total, const Sums<Tokens>& sums) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half)
#pragma unroll
        for (uint32_t i = 0; i < Tokens / 8; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) total[half][i][j] += sums[half][i][j];
}

// Puts the thread's sums where `mine` and every kThreads'th float behind it are, or adds them from there.
template <uint32_t Tokens>
__device__ __forceinline__ void put(const Sums<Tokens>& sums, float* mine) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half)
#pragma unroll
        for (uint32_t i = 0; i < Tokens / 8; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) mine[((half * (Tokens / 8) + i) * 4 + j) * kThreads] = sums[half][i][j];
}
template <uint32_t Tokens>
__device__ __forceinline__ void add(Sums<Tokens>& sums, const float* theirs) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half)
#pragma unroll
        for (uint32_t i = 0; i < Tokens / 8; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) sums[half][i][j] += theirs[((half * (Tokens / 8) + i) * 4 + j) * kThreads];
}

}  // namespace skinny
}  // namespace longhaul

// Tiles of products of many rows: 128 rows of x (the M operand of mma.m16n8k16) by 128 weight rows (the N operand), 32 of k
// a stage, four warps of 64 x 64.
//
// A warp takes 32 rows of the weight tile's first half and the same 32 of its second, so that a gate and its up product
// meet in one thread. Derived: 16 KB copied and 256 mma a stage; ldmatrix moves 128 B an mma, one cycle of shared
// memory where an mma takes about 1.4 (H100) to 2 (A100). 4 stages, 64 KB, all but one in flight; 128 sums a thread and at
// most 255 registers: 2 blocks a multiprocessor on sm_80 and sm_90, 1 on sm_89.
#pragma once

#include "../common/element.h"
#include "../ptx/cp_async.h"
#include "../ptx/matrix_move.h"
#include "../ptx/mma.h"

namespace longhaul {
namespace wide {

using ptx::uint32_t;
using ptx::uint64_t;

inline constexpr uint32_t kThreads = 128;
inline constexpr uint32_t kTile = 128;  // rows of x, and weight rows
inline constexpr uint32_t kHalf = kTile / 2;
inline constexpr uint32_t kBlock = 32;  // of k
inline constexpr uint32_t kChunk = 8;   // elements of a 16-byte copy
inline constexpr uint32_t kRowBytes = kBlock * 2;
inline constexpr uint32_t kOperandBytes = kTile * kRowBytes;
inline constexpr uint32_t kStageBytes = 2 * kOperandBytes;
inline constexpr uint32_t kStages = 4;
inline constexpr uint32_t kRowsAtOnce = kThreads / (kBlock / kChunk);  // rows that one copy of every thread fills
inline constexpr uint32_t kCopies = kTile / kRowsAtOnce;               // of an operand, by a thread

// A thread's sums: [16 rows of x][half of the weight tile][8 weight rows][of the fragment].
using Sums = float[4][2][4][4];

// Where a thread's copies come from: its chunk of every kRowsAtOnce'th row. Bit i of a mask says that row i is there.
struct Source {
    const Bf16 *x[kCopies], *weight[kCopies];
    uint32_t x_mask, weight_mask;
};

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of 64-byte rows: bank conflict free for ldmatrix. Two chunks
// further from an even one is an XOR with 32.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + ((chunk ^ (row / 2 & 3u)) << 4);
}

// Copies block `block` of k to `stage`; what is not there is zero. Weight rows are padded with zeros to whole chunks; beyond
// k, x holds anything, and only what counts is read.
__device__ __forceinline__ void load(const Source& source, uint32_t block, uint32_t k_end, uint32_t stage) {
    const uint32_t k0 = block * kBlock, k = k0 + threadIdx.x % 4 * kChunk;
    const uint32_t to = stage + swizzled(threadIdx.x / 4, threadIdx.x % 4);
    const uint32_t bytes = k >= k_end ? 0 : k_end - k >= kChunk ? 16 : (k_end - k) * 2;
#pragma unroll
    for (uint32_t i = 0; i < kCopies; ++i) {
        const uint32_t at = to + i * kRowsAtOnce * kRowBytes;
        ptx::cp_async_cg_16_zfill(at, source.x[i] + k0, (source.x_mask >> i & 1u) != 0 ? bytes : 0);
        ptx::cp_async_cg_16_zfill(at + kOperandBytes, source.weight[i] + k0,
                                  (source.weight_mask >> i & 1u) != 0 && bytes != 0 ? 16 : 0);
    }
}

__device__ __forceinline__ void multiply(uint32_t stage, Sums& sums) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t x = stage + swizzled(warp / 2 * kHalf + lane % 16, lane / 16);
    const uint32_t weights =
        stage + kOperandBytes + swizzled(warp % 2 * (kHalf / 2) + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (uint32_t step = 0; step < kBlock / 16; ++step) {
        uint32_t a[4][4];
#pragma unroll
        for (uint32_t m = 0; m < 4; ++m) ptx::ldmatrix_x4(a[m], (x ^ (step * 32)) + m * 16 * kRowBytes);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half)
#pragma unroll
            for (uint32_t pair = 0; pair < 2; ++pair) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, (weights ^ (step * 32)) + (half * kHalf + pair * 16) * kRowBytes);
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
                for (uint32_t m = 0; m < 4; ++m) {
                    ptx::mma_m16n8k16_bf16(sums[m][half][2 * pair], a[m], low);
                    ptx::mma_m16n8k16_bf16(sums[m][half][2 * pair + 1], a[m], high);
                }
            }
    }
}

// The whole product of a tile, k in order. The ring is free before and after.
__device__ __forceinline__ void product(const Source& source, uint32_t k, uint32_t ring, Sums& sums) {
#pragma unroll
    for (uint32_t m = 0; m < 4; ++m)
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half)
#pragma unroll
            for (uint32_t n = 0; n < 4; ++n)
#pragma unroll
                for (uint32_t i = 0; i < 4; ++i) sums[m][half][n][i] = 0.0f;
    const uint32_t blocks = (k + kBlock - 1) / kBlock;
#pragma unroll
    for (uint32_t s = 0; s < kStages - 1; ++s) {
        if (s < blocks) load(source, s, k, ring + s * kStageBytes);
        ptx::cp_async_commit_group();
    }
    uint32_t stage = ring, free = ring + (kStages - 1) * kStageBytes;
    for (uint32_t block = 0; block < blocks; ++block) {
        ptx::cp_async_wait_group<static_cast<int>(kStages) - 2>();
        __syncthreads();
        // The stage that was multiplied in the last round is free: everybody is past it.
        if (block + kStages - 1 < blocks) load(source, block + kStages - 1, k, free);
        ptx::cp_async_commit_group();
        multiply(stage, sums);
        free = stage;
        stage = stage == ring + (kStages - 1) * kStageBytes ? ring : stage + kStageBytes;
    }
    ptx::cp_async_wait_all();
    __syncthreads();
}

// Calls visit(row, column of the half, sums of it and the next column in the first half, the same in the second).
template <class Visit>
__device__ __forceinline__ void for_each(const Sums& sums, Visit visit) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (uint32_t m = 0; m < 4; ++m)
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r)
#pragma unroll
            for (uint32_t n = 0; n < 4; ++n)
                visit(warp / 2 * kHalf + m * 16 + r * 8 + lane / 4, warp % 2 * (kHalf / 2) + n * 8 + lane % 4 * 2,
                      sums[m][0][n] + 2 * r, sums[m][1][n] + 2 * r);
}

// Writes two neighbouring columns, of which the second may lie beyond `n`. `column` is even and rows are aligned to 16 bytes.
__device__ __forceinline__ void put(Bf16* row, uint32_t column, uint32_t n, float first, float second) {
    if (column + 1 < n)
        *reinterpret_cast<uint32_t*>(row + column) = ptx::cvt_bf16x2(first, second);
    else if (column < n)
        row[column] = from_float<Bf16>(first);
}
__device__ __forceinline__ void put(float* row, uint32_t column, uint32_t n, float first, float second) {
    if (column + 1 < n)
        *reinterpret_cast<float2*>(row + column) = make_float2(first, second);
    else if (column < n)
        row[column] = first;
}

}  // namespace wide
}  // namespace longhaul

// Products of 1 to 64 rows of x with a large weight: a weight streamer for decode.
//
// Weights are the M operand of mma.m16n8k16, tokens the N operand, so few tokens waste no tensor work. Tiles of 128 weight
// rows and blocks of 64 of k make up a line of work units that is cut into equal runs, one a thread block (striped, or
// stream-K, partition: Osama et al., arXiv 2301.03598), so that no block waits for a last, partial wave. A tile that
// several blocks share is summed by the one that arrives last, in the order of k. The cut depends on n, k and the device
// only: the result of a row does not depend on the other rows, nor on how many there are.
//
// With `Silu`, a tile is 64 gate rows and their 64 up rows, and out = silu(gate) * up.
//
// Derived: a unit is 16 KB of weights and 128 bytes of x a token (6 % more from L2 at 8 tokens, 12 % at 16). 4 stages of 17
// to 20 KB (3 of 24 KB at 64 tokens), all but one in flight, 2 blocks a multiprocessor on sm_80 and sm_90: 96 KB of weights
// in flight (64 KB at 64 tokens), where an H100 needs about 38 KB (3.35 TB/s for 1.5 us, of 132). At most 130 registers. A
// warp issues about 130 instructions a unit (sm_90a, 8 tokens), so 520 of the 4500 slots that streaming a unit leaves:
// neither issue nor ldmatrix binds, and a kernel without mma for 1 to 4 rows has nothing to gain.
#include "../common/kernel.h"
#include "../ptx/synchronising_access.h"
#include "skinny_tile.h"

namespace longhaul {
namespace {

using namespace skinny;

struct SkinnyParams {
    const Bf16* x;       // [rows, x_stride]
    const Bf16* weight;  // [n, weight_stride]; with Silu [2 n, weight_stride], gate rows first
    const float* bias;   // [n], or null
    void* out;           // O [rows, out_stride]
    float* partials;     // [grid, 2, kThreads * accumulators]: of a run's first and last tile
    uint32_t* counters;  // [tiles], zero before and after
    uint32_t rows;
    uint32_t n;
    uint32_t k;
    uint32_t x_stride;
    uint32_t weight_stride;
    uint32_t out_stride;
};

template <uint32_t Tokens, bool Silu, class O>
struct Skinny {
    static constexpr uint32_t kWidth = Silu ? kHalfRows : kTileRows;  // result columns of a tile
    static constexpr uint32_t kSums = Tokens;                         // floats a thread: 2 halves of Tokens / 8 of 4

    const SkinnyParams& p;
    uint32_t k_blocks;

    __device__ __forceinline__ WeightSource source(uint32_t tile) const {
        const uint32_t column = tile * kWidth + threadIdx.x / 8;
        const Bf16* first = p.weight + static_cast<uint64_t>(column) * p.weight_stride + threadIdx.x % 8 * kChunk;
        const uint32_t left = column < p.n ? p.n - column : 0;
        if (Silu) return {{first, first + static_cast<uint64_t>(p.n) * p.weight_stride}, {left, left}};
        return {{first, first + static_cast<uint64_t>(kHalfRows) * p.weight_stride},
                {left, left < kHalfRows ? 0 : left - kHalfRows}};
    }

    // Copies 64 of k of the tokens behind the stage's weights. Beyond k, x holds anything: only what counts is read.
    __device__ __forceinline__ void load_tokens(uint32_t k, uint32_t stage) const {
        const uint32_t row = threadIdx.x / 8, to = stage + kTileRows * kRowBytes + swizzled(row, threadIdx.x % 8);
        const uint32_t bytes = k >= p.k ? 0 : p.k - k >= kChunk ? 16 : (p.k - k) * 2;
        const Bf16* x = p.x + static_cast<uint64_t>(row) * p.x_stride + k;
#pragma unroll
        for (uint32_t i = 0; i < kTokenCopies<Tokens>; ++i) {
            if (Tokens < kRowsAtOnce && row >= Tokens) break;
            ptx::cp_async_cg_16_zfill(to + i * kRowsAtOnce * kRowBytes,
                                      x + static_cast<uint64_t>(i * kRowsAtOnce) * p.x_stride,
                                      i * kRowsAtOnce + row < p.rows ? bytes : 0);
        }
    }

    // Run that holds work unit `unit` when `total` units are cut into `runs`: run r starts at r * total / runs.
    static __device__ __forceinline__ uint32_t run_of(uint32_t unit, uint32_t total, uint32_t runs) {
        return static_cast<uint32_t>(((static_cast<uint64_t>(unit) + 1) * runs - 1) / total);
    }

    __device__ __forceinline__ float* partial(uint32_t run, bool last_tile) const {
        return p.partials + (static_cast<uint64_t>(run) * 2 + (last_tile ? 1 : 0)) * (kThreads * kSums) + threadIdx.x;
    }

    // Adds up a tile that several runs share. False: another block arrives later and will do it.
    __device__ __forceinline__ bool merge(uint32_t tile, uint32_t begin, uint32_t total, Sums<Tokens>& sums,
                                          uint32_t* flag) const {
        const uint32_t runs = gridDim.x, first_unit = tile * k_blocks, last_unit = first_unit + k_blocks - 1;
        const uint32_t first = run_of(first_unit, total, runs), last = run_of(last_unit, total, runs);
        if (first == last) return true;
        // A run's first tile is the one it begins in the middle of, or at the start of.
        put<Tokens>(sums, partial(blockIdx.x, begin < first_unit));
        // Releases what all threads of the block have written before the barrier, and acquires what other blocks released.
        __syncthreads();
        if (threadIdx.x == 0) *flag = ptx::atom_add_acq_rel_gpu(p.counters + tile, 1u);
        __syncthreads();
        if (*flag != last - first) return false;
        clear<Tokens>(sums);
        // Only the first run can have begun before the tile.
        add<Tokens>(sums, partial(first, static_cast<uint32_t>(static_cast<uint64_t>(first) * total / runs) < first_unit));
#pragma unroll 4
        for (uint32_t run = first + 1; run <= last; ++run) add<Tokens>(sums, partial(run, false));
        if (threadIdx.x == 0) p.counters[tile] = 0;
        return true;
    }

    __device__ __forceinline__ void put_out(uint32_t token, uint32_t column, float value) const {
        if (token >= p.rows || column >= p.n) return;
        if (!Silu && p.bias != nullptr) value += p.bias[column];
        static_cast<O*>(p.out)[static_cast<uint64_t>(token) * p.out_stride + column] = from_float<O>(value);
    }

    __device__ __forceinline__ void write(uint32_t tile, const Sums<Tokens>& sums) const {
        for_each<Tokens>(sums, [&](uint32_t row, uint32_t token, float first, float second) {
            const uint32_t column = tile * kWidth + row;
            if constexpr (Silu) {
                put_out(token, column, gated(first, second));
            } else {
                put_out(token, column, first);
                put_out(token, column + kHalfRows, second);
            }
        });
    }
};

template <uint32_t Tokens, bool Silu, class O>
__device__ __forceinline__ void gemm_skinny(const SkinnyParams& p) {
    using Work = Skinny<Tokens, Silu, O>;
    constexpr uint32_t stages = kStages<Tokens>;
    PTX_SHARED_ARRAY(uint32_t, flag, 4);
    const uint32_t ring = ptx::shared_address(ptx::dynamic_shared<unsigned char>());
    const Work work{p, (p.k + kBlock - 1) / kBlock};
    const uint32_t total = (p.n + Work::kWidth - 1) / Work::kWidth * work.k_blocks;
    const uint32_t begin = static_cast<uint32_t>(static_cast<uint64_t>(blockIdx.x) * total / gridDim.x);
    const uint32_t end = static_cast<uint32_t>((static_cast<uint64_t>(blockIdx.x) + 1) * total / gridDim.x);
    const uint64_t policy = ptx::createpolicy_evict_first();  // weights are read once

    uint32_t tile = begin / work.k_blocks, block = begin % work.k_blocks;
    uint32_t ahead = begin, load_tile = tile, load_block = block, load_stage = ring;
    WeightSource source = work.source(tile);
    const auto load_next = [&] {
        if (ahead < end) {
            const uint32_t k0 = load_block * kBlock, k = k0 + threadIdx.x % 8 * kChunk;
            // Weight rows are padded with zeros to whole chunks.
            load_weights(source, k0, k < p.k, p.weight_stride, load_stage, policy);
            work.load_tokens(k, load_stage);
            ++ahead;
            load_stage = load_stage == ring + (stages - 1) * kStageBytes<Tokens> ? ring : load_stage + kStageBytes<Tokens>;
            if (++load_block == work.k_blocks) {
                load_block = 0;
                source = work.source(++load_tile);
            }
        }
        ptx::cp_async_commit_group();
    };
#pragma unroll
    for (uint32_t s = 0; s < stages - 1; ++s) load_next();
    Sums<Tokens> sums;
    clear<Tokens>(sums);
    uint32_t stage = ring;
    for (uint32_t unit = begin; unit < end; ++unit) {
        ptx::cp_async_wait_group<static_cast<int>(stages) - 2>();
        __syncthreads();
        // The stage that was multiplied in the last round is free: everybody is past it.
        load_next();
        multiply<Tokens>(stage, sums);
        stage = stage == ring + (stages - 1) * kStageBytes<Tokens> ? ring : stage + kStageBytes<Tokens>;
        if (++block < work.k_blocks && unit + 1 < end) continue;
        if (work.merge(tile, begin, total, sums, flag)) work.write(tile, sums);
        clear<Tokens>(sums);
        block = 0;
        ++tile;
    }
}

}  // namespace

LONGHAUL_KERNEL(gemm_skinny_mma_8_bf16, SkinnyParams, kThreads, gemm_skinny<8, false, Bf16>)
LONGHAUL_KERNEL(gemm_skinny_mma_16_bf16, SkinnyParams, kThreads, gemm_skinny<16, false, Bf16>)
LONGHAUL_KERNEL(gemm_skinny_mma_32_bf16, SkinnyParams, kThreads, gemm_skinny<32, false, Bf16>)
LONGHAUL_KERNEL(gemm_skinny_mma_64_bf16, SkinnyParams, kThreads, gemm_skinny<64, false, Bf16>)
LONGHAUL_KERNEL(gemm_skinny_mma_8_f32, SkinnyParams, kThreads, gemm_skinny<8, false, float>)
LONGHAUL_KERNEL(gemm_skinny_mma_16_f32, SkinnyParams, kThreads, gemm_skinny<16, false, float>)
LONGHAUL_KERNEL(gemm_skinny_mma_32_f32, SkinnyParams, kThreads, gemm_skinny<32, false, float>)
LONGHAUL_KERNEL(gemm_skinny_mma_64_f32, SkinnyParams, kThreads, gemm_skinny<64, false, float>)
LONGHAUL_KERNEL(gemm_skinny_silu_mma_8_bf16, SkinnyParams, kThreads, gemm_skinny<8, true, Bf16>)
LONGHAUL_KERNEL(gemm_skinny_silu_mma_16_bf16, SkinnyParams, kThreads, gemm_skinny<16, true, Bf16>)
LONGHAUL_KERNEL(gemm_skinny_silu_mma_32_bf16, SkinnyParams, kThreads, gemm_skinny<32, true, Bf16>)
LONGHAUL_KERNEL(gemm_skinny_silu_mma_64_bf16, SkinnyParams, kThreads, gemm_skinny<64, true, Bf16>)

}  // namespace longhaul

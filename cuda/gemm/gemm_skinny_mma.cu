// Products of 1 to 64 rows of x with a large weight: a weight streamer for decode.
//
// Weights are the M operand of mma.m16n8k16, tokens the N operand, so few tokens waste no tensor work. Tiles of 64 weight
// rows and blocks of 64 of k make up a line of work units that is cut into equal runs, one a thread block (striped, or
// stream-K, partition: Osama et al., arXiv 2301.03598), so that no block waits for a last, partial wave. A tile that
// several blocks share is summed by the one that arrives last, in the order of k. The cut depends on n, k and the device
// only: the result of a row does not depend on the other rows.
//
// With `Silu`, a tile is 32 gate rows and their 32 up rows, and out = silu(gate) * up.
#include "../common/kernel.h"
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

template <uint32_t Tokens, bool Silu>
struct Skinny {
    static constexpr uint32_t kSums = kAccumulators<Tokens>;

    const SkinnyParams& p;
    uint32_t ring, k_blocks;
    float* out_tile;

    // Weight row of local row `row` of `tile`, or n (all of it zero) beyond the end.
    __device__ __forceinline__ bool weight_row(uint32_t tile, uint32_t row, uint32_t& index) const {
        if (!Silu) {
            index = tile * kTileRows + row;
            return index < p.n;
        }
        const uint32_t column = tile * (kTileRows / 2) + row % (kTileRows / 2);
        index = row < kTileRows / 2 ? column : p.n + column;
        return column < p.n;
    }

    __device__ __forceinline__ void load(uint32_t unit, uint32_t stage) const {
        const uint32_t tile = unit / k_blocks, k0 = unit % k_blocks * kBlock;
        const uint32_t base = ring + stage * kStageBytes<Tokens>;
#pragma unroll
        for (uint32_t i = 0; i < kTileRows * 8 / kThreads; ++i) {
            const uint32_t at = i * kThreads + threadIdx.x, row = at / 8, chunk = at % 8;
            uint32_t index;
            const bool inside = weight_row(tile, row, index) && k0 + chunk * kChunk < p.k;
            // Weight rows are padded with zeros to whole chunks.
            const Bf16* source =
                inside ? p.weight + static_cast<uint64_t>(index) * p.weight_stride + k0 + chunk * kChunk : p.weight;
            ptx::cp_async_cg_16_zfill(base + swizzled(row, chunk), source, inside ? 16 : 0);
        }
        const uint32_t tokens = base + kTileRows * kRowBytes;
#pragma unroll
        for (uint32_t i = 0; i < (Tokens * 8 + kThreads - 1) / kThreads; ++i) {
            const uint32_t at = i * kThreads + threadIdx.x, row = at / 8, chunk = at % 8;
            if (at >= Tokens * 8) break;
            const uint32_t k = k0 + chunk * kChunk;
            // Beyond k, x holds anything: only what counts is read.
            const uint32_t bytes = row >= p.rows || k >= p.k ? 0 : p.k - k >= kChunk ? 16 : (p.k - k) * 2;
            const Bf16* source = bytes == 0 ? p.x : p.x + static_cast<uint64_t>(row) * p.x_stride + k;
            ptx::cp_async_cg_16_zfill(tokens + swizzled(row, chunk), source, bytes);
        }
    }

    // Run that holds work unit `unit` when `total` units are cut into `runs`: run r starts at r * total / runs.
    static __device__ __forceinline__ uint32_t run_of(uint32_t unit, uint32_t total, uint32_t runs) {
        return static_cast<uint32_t>(((static_cast<uint64_t>(unit) + 1) * runs - 1) / total);
    }

    __device__ __forceinline__ float* partial(uint32_t run, bool last_tile) const {
        return p.partials + (static_cast<uint64_t>(run) * 2 + (last_tile ? 1 : 0)) * (kThreads * kSums * 4) +
               threadIdx.x;
    }

    // Adds up a tile that several runs share. False: another block arrives later and will do it.
    __device__ __forceinline__ bool merge(uint32_t tile, uint32_t begin, uint32_t total,
                                          float (&sum)[kSums][4], uint32_t* flag) const {
        const uint32_t runs = gridDim.x, first_unit = tile * k_blocks, last_unit = first_unit + k_blocks - 1;
        const uint32_t first = run_of(first_unit, total, runs), last = run_of(last_unit, total, runs);
        if (first == last) return true;
        // A run's first tile is the one it begins in the middle of, or at the start of.
        float* mine = partial(blockIdx.x, begin < first_unit);
#pragma unroll
        for (uint32_t i = 0; i < kSums; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) mine[(i * 4 + j) * kThreads] = sum[i][j];
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *flag = atomicAdd(p.counters + tile, 1u);
        __syncthreads();
        if (*flag != last - first) return false;
        __threadfence();
        clear<Tokens>(sum);
        for (uint32_t run = first; run <= last; ++run) {
            const uint32_t run_begin = static_cast<uint32_t>(static_cast<uint64_t>(run) * total / runs);
            const float* theirs = partial(run, run_begin < first_unit);
#pragma unroll
            for (uint32_t i = 0; i < kSums; ++i)
#pragma unroll
                for (uint32_t j = 0; j < 4; ++j) sum[i][j] += theirs[(i * 4 + j) * kThreads];
        }
        if (threadIdx.x == 0) p.counters[tile] = 0;
        return true;
    }

    template <class O>
    __device__ __forceinline__ void write(uint32_t tile, const float (&sum)[kSums][4]) const {
        spill<Tokens>(out_tile, sum);
        __syncthreads();
        constexpr uint32_t width = Silu ? kTileRows / 2 : kTileRows;
        const uint32_t first = tile * width;
        for (uint32_t at = threadIdx.x; at < width * p.rows; at += kThreads) {
            const uint32_t token = at / width, column = at % width;
            if (first + column >= p.n) continue;
            float value = out_tile[token * kOutPitch + column];
            if constexpr (Silu) {
                value = gated(value, out_tile[token * kOutPitch + kTileRows / 2 + column]);
            } else if (p.bias != nullptr) {
                value += p.bias[first + column];
            }
            static_cast<O*>(p.out)[static_cast<uint64_t>(token) * p.out_stride + first + column] =
                from_float<O>(value);
        }
        __syncthreads();
    }
};

template <uint32_t Tokens, bool Silu, class O>
__device__ __forceinline__ void gemm_skinny(const SkinnyParams& p) {
    using Work = Skinny<Tokens, Silu>;
    constexpr uint32_t stages = kStages<Tokens>;
    PTX_SHARED_ARRAY(uint32_t, flag, 4);
    unsigned char* shared = ptx::dynamic_shared<unsigned char>();
    constexpr uint32_t width = Silu ? kTileRows / 2 : kTileRows;
    Work work{p, ptx::shared_address(shared), (p.k + kBlock - 1) / kBlock,
              reinterpret_cast<float*>(shared + stages * kStageBytes<Tokens>)};
    const uint32_t tiles = (p.n + width - 1) / width, total = tiles * work.k_blocks;
    const uint32_t begin = static_cast<uint32_t>(static_cast<uint64_t>(blockIdx.x) * total / gridDim.x);
    const uint32_t end = static_cast<uint32_t>((static_cast<uint64_t>(blockIdx.x) + 1) * total / gridDim.x);
#pragma unroll
    for (uint32_t s = 0; s < stages - 1; ++s) {
        if (begin + s < end) work.load(begin + s, s);
        ptx::cp_async_commit_group();
    }
    float sum[Work::kSums][4] = {};
    uint32_t stage = 0;
    for (uint32_t unit = begin; unit < end; ++unit) {
        ptx::cp_async_wait_group<static_cast<int>(stages) - 2>();
        __syncthreads();
        // The stage that was multiplied in the last round is free: everybody is past it.
        const uint32_t next = unit + stages - 1;
        if (next < end) work.load(next, stage == 0 ? stages - 1 : stage - 1);
        ptx::cp_async_commit_group();
        multiply<Tokens>(work.ring + stage * kStageBytes<Tokens>, sum);
        stage = stage + 1 == stages ? 0 : stage + 1;
        const uint32_t tile = unit / work.k_blocks;
        if (unit + 1 < end && (unit + 1) / work.k_blocks == tile) continue;
        if (work.merge(tile, begin, total, sum, flag)) work.template write<O>(tile, sum);
        clear<Tokens>(sum);
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

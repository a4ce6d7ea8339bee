// The experts' products with mma.sync: grouped weight streamers.
//
// A tile is 128 weight rows of one expert (64 gate rows and their up rows in the first product) by up to `Tokens` of the
// rows routed to it; experts without rows have no tile. Blocks are persistent and take tiles in turn, neighbours in weight
// rows at the same time; copies of the next tile run while the last one is still multiplied. k is summed in parts of about
// 640, and the parts in order: where tiles are too few to fill the device, each part is a task of its own and the block
// that arrives last adds them up, to the same bits. A result does not depend on the other rows. The first product gathers
// its rows and applies SiLU(gate) * up, the second reads them in place order.
//
// Derived: rings as in gemm_skinny_mma.cu, 96 KB of weights in flight a multiprocessor. Qwen2-57B-A14B, one row: 320 tiles
// of 6 parts and 224 of 4 are 14.5 and 6.8 tasks a multiprocessor of an H100, 97 % of whole waves each; without parts it
// were 2.4 and 1.7, 81 % and 85 %.
#include "../common/kernel.h"
#include "../gemm/skinny_tile.h"
#include "../ptx/synchronising_access.h"
#include "grouped.h"

namespace longhaul {
namespace {

using namespace skinny;

constexpr uint32_t kPartBlocks = 10;  // most blocks of k that are summed before they are added to the total

template <uint32_t Tokens, bool Silu>
struct Grouped {
    static constexpr uint32_t kWidth = Silu ? kHalfRows : kTileRows;  // result columns of a tile
    static constexpr uint32_t kCopies = kTokenCopies<Tokens>;

    // Where a thread's copies of a tile come from.
    struct Source {
        WeightSource weights;
        const Bf16* token[kCopies];
        uint32_t tokens;  // that are there, from the thread's first on
    };

    const GroupedParams& p;
    const uint32_t* starts;
    uint32_t n_tiles, k_blocks, parts;

    __device__ __forceinline__ GroupedTile tile(uint32_t index) const {
        return grouped_tile<Tokens>(p.routing, starts, index, n_tiles, kWidth);
    }

    __device__ __forceinline__ Source source(uint32_t index) const {
        const GroupedTile t = tile(index);
        const uint32_t row = threadIdx.x / 8, chunk = threadIdx.x % 8, column = t.column + row;
        const Bf16* first = grouped_weight<Silu>(p, t.expert) + static_cast<uint64_t>(column) * p.weight_stride +
                            chunk * kChunk;
        const uint32_t left = column < p.n ? p.n - column : 0;
        Source s;
        s.weights = {{first, first + static_cast<uint64_t>(Silu ? p.n : kHalfRows) * p.weight_stride},
                     {left, Silu ? left : left < kHalfRows ? 0 : left - kHalfRows}};
        s.tokens = row < t.places ? t.places - row : 0;
#pragma unroll
        for (uint32_t i = 0; i < kCopies; ++i)
            s.token[i] = i * kRowsAtOnce < s.tokens
                             ? grouped_row<Silu>(p, t.first_place + row + i * kRowsAtOnce) + chunk * kChunk
                             : p.x;
        return s;
    }

    __device__ __forceinline__ void load(const Source& s, uint32_t k0, uint32_t stage, uint64_t policy) const {
        const uint32_t row = threadIdx.x / 8, k = k0 + threadIdx.x % 8 * kChunk;
        load_weights(s.weights, k0, k < p.k, p.weight_stride, stage, policy);
        if (Tokens < kRowsAtOnce && row >= Tokens) return;
        const uint32_t to = stage + kTileRows * kRowBytes + swizzled(row, threadIdx.x % 8);
        // Beyond k, x holds anything: only what counts is read.
        const uint32_t bytes = k >= p.k ? 0 : p.k - k >= kChunk ? 16 : (p.k - k) * 2;
#pragma unroll
        for (uint32_t i = 0; i < kCopies; ++i)
            ptx::cp_async_cg_16_zfill(to + i * kRowsAtOnce * kRowBytes, s.token[i] + k0,
                                      i * kRowsAtOnce < s.tokens ? bytes : 0);
    }

    // First block of k of part `part`.
    __device__ __forceinline__ uint32_t part_begin(uint32_t part) const { return part * k_blocks / parts; }

    // Adds up the parts of a tile that blocks share. False: another block arrives later and will do it.
    __device__ __forceinline__ bool merge(uint32_t index, uint32_t part, Sums<Tokens>& total, uint32_t* flag) const {
        float* slots = p.partials + static_cast<uint64_t>(index) * parts * (kThreads * Tokens) + threadIdx.x;
        put<Tokens>(total, slots + static_cast<uint64_t>(part) * (kThreads * Tokens));
        // Releases what all threads of the block have written before the barrier, and acquires what other blocks released.
        __syncthreads();
        if (threadIdx.x == 0) *flag = ptx::atom_add_acq_rel_gpu(p.counters + index, 1u);
        __syncthreads();
        if (*flag != parts - 1) return false;
        clear<Tokens>(total);
#pragma unroll 4
        for (uint32_t i = 0; i < parts; ++i) add<Tokens>(total, slots + static_cast<uint64_t>(i) * (kThreads * Tokens));
        if (threadIdx.x == 0) p.counters[index] = 0;
        return true;
    }

    __device__ __forceinline__ void write(uint32_t index, const Sums<Tokens>& total) const {
        const GroupedTile t = tile(index);
        for_each<Tokens>(total, [&](uint32_t row, uint32_t token, float first, float second) {
            if (token >= t.places) return;
            const uint32_t column = t.column + row;
            const uint64_t to = static_cast<uint64_t>(t.first_place + token) * p.out_stride + column;
            if constexpr (Silu) {
                if (column < p.n) static_cast<Bf16*>(p.out)[to] = from_float<Bf16>(gated(first, second));
            } else {
                if (column < p.n) static_cast<float*>(p.out)[to] = first;
                if (column + kHalfRows < p.n) static_cast<float*>(p.out)[to + kHalfRows] = second;
            }
        });
    }
};

template <uint32_t Tokens, bool Silu>
__device__ __forceinline__ void moe_grouped(const GroupedParams& p) {
    using Work = Grouped<Tokens, Silu>;
    constexpr uint32_t stages = kStages<Tokens>;
    PTX_SHARED_ARRAY(uint32_t, starts, kMostExperts + 1);
    PTX_SHARED_ARRAY(uint32_t, flag, 4);
    list_tiles<Tokens>(p.routing, starts);
    const uint32_t ring = ptx::shared_address(ptx::dynamic_shared<unsigned char>());
    const uint32_t k_blocks = (p.k + kBlock - 1) / kBlock;
    const Work work{p, starts, (p.n + Work::kWidth - 1) / Work::kWidth, k_blocks,
                    (k_blocks + kPartBlocks - 1) / kPartBlocks};
    const uint32_t shares = p.split != 0 ? work.parts : 1;  // tasks of a tile
    const uint32_t tasks = starts[p.routing.experts] * work.n_tiles * shares;
    const uint64_t policy = ptx::createpolicy_evict_first();
    // Of a task: its first block of k, and the one behind its last.
    const auto begin_of = [&](uint32_t task) { return shares == 1 ? 0 : work.part_begin(task % shares); };
    const auto end_of = [&](uint32_t task) { return shares == 1 ? k_blocks : work.part_begin(task % shares + 1); };
    if (blockIdx.x >= tasks) return;

    uint32_t load_task = blockIdx.x, load_block = begin_of(load_task), load_end = end_of(load_task), load_stage = ring;
    typename Work::Source source = work.source(load_task / shares);
    const auto load_next = [&] {
        if (load_task < tasks) {
            work.load(source, load_block * kBlock, load_stage, policy);
            load_stage = load_stage == ring + (stages - 1) * kStageBytes<Tokens> ? ring : load_stage + kStageBytes<Tokens>;
            if (++load_block == load_end) {
                load_task += gridDim.x;
                if (load_task < tasks) {
                    load_block = begin_of(load_task);
                    load_end = end_of(load_task);
                    source = work.source(load_task / shares);
                }
            }
        }
        ptx::cp_async_commit_group();
    };
#pragma unroll
    for (uint32_t s = 0; s < stages - 1; ++s) load_next();

    uint32_t stage = ring;
    for (uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const uint32_t index = task / shares, first_part = shares == 1 ? 0 : task % shares;
        const uint32_t last_part = shares == 1 ? work.parts : first_part + 1;
        Sums<Tokens> total;
        clear<Tokens>(total);
        for (uint32_t part = first_part; part < last_part; ++part) {
            Sums<Tokens> sums;
            clear<Tokens>(sums);
            const uint32_t end = work.part_begin(part + 1);
            for (uint32_t block = work.part_begin(part); block < end; ++block) {
                ptx::cp_async_wait_group<static_cast<int>(stages) - 2>();
                __syncthreads();
                load_next();
                multiply<Tokens>(stage, sums);
                stage = stage == ring + (stages - 1) * kStageBytes<Tokens> ? ring : stage + kStageBytes<Tokens>;
            }
            accumulate<Tokens>(total, sums);
        }
        if (shares == 1 || work.merge(index, first_part, total, flag)) work.write(index, total);
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

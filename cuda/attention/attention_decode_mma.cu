// Decode attention with mma.sync: one query row a sequence, split over the keys (flash decoding).
//
// A task is a run of keys of one sequence and one KV head. The group's heads (up to 8) are rows of the M operand; each of
// four warps streams 16 of every 64 keys through a ring of its own and keeps a softmax of its own, merged at the task's
// end; the warps need no barrier in between. How a sequence is split depends on its own length only, so its result does
// not depend on the batch. Blocks are persistent and take tasks in turn; the block that completes a (sequence, KV head)
// last merges its parts in the order of keys.
//
// Derived, head_dim 128: a warp's stage is 16 keys and values, 8 KB; two stages a warp, at least one of them in flight: 32
// to 64 KB a block. 70 KB of dynamic and 4 KB of static shared memory and at most 168 registers: 3 blocks a multiprocessor
// on sm_90, so 96 KB in flight at least, 2 on sm_80 (64 KB), 1 on sm_89 (32 KB). A warp issues about 380 instructions a stage
// (sm_90a), a sixth of the slots that streaming it from an H100's memory leaves.
#include "../common/kernel.h"
#include "../ptx/synchronising_access.h"
#include "flash_tile.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWarps = kThreads / 32;
constexpr uint32_t kGroup = 8;            // most query heads of a KV head
constexpr uint32_t kLeastSplit = 128;     // keys
constexpr uint32_t kMostSplits = 64;      // of a sequence: two a lane when they are merged
constexpr uint32_t kMostSequences = 1024;

// Splits of a sequence of `length` keys: 128 keys each as long as that makes no more than `most`.
__device__ __forceinline__ uint32_t splits_of(uint32_t length, uint32_t most) {
    const uint32_t splits = (length + kLeastSplit - 1) / kLeastSplit;
    return splits < most ? splits : most;
}

// First key of split `index`: whole tiles. No split is empty.
__device__ __forceinline__ uint32_t split_begin(uint32_t length, uint32_t splits, uint32_t index) {
    const uint32_t tiles = (length + kTileTokens - 1) / kTileTokens;
    const uint64_t begin = static_cast<uint64_t>(tiles) * index / splits * kTileTokens;
    return begin < length ? static_cast<uint32_t>(begin) : length;
}

template <uint32_t HeadDim>
struct Decode {
    static constexpr uint32_t kRowBytes = HeadDim * 2;
    static constexpr uint32_t kPieceBytes = kPiece * kRowBytes;  // 16 keys, or their values
    static constexpr uint32_t kQueryBytes = kGroup * kRowBytes;  // of one variant
    static constexpr uint32_t kStages = 2;
    static constexpr uint32_t kQuads = HeadDim / 4;

    const AttentionParams& p;
    unsigned char* shared;
    uint32_t* flag;
    uint32_t tasks_of_most;  // (sequence, KV head, split) slots of the partials

    // Rotates the group's queries in all variants; rows beyond the group are zero.
    __device__ __forceinline__ void rotate(const SequenceInfo& sequence, uint32_t kv_head, uint32_t position) const {
        constexpr uint32_t chunks = HeadDim / 16;
        const uint32_t group = p.kv.query_heads_of(kv_head), chunk = p.rope.chunk_of(position);
        const Bf16* q = static_cast<const Bf16*>(p.q) + static_cast<uint64_t>(sequence.first_row) * p.q_stride +
                        p.kv.first_query_head(kv_head) * HeadDim;
        const float scale = p.step->logit_scale(sequence.first_row) * kLog2E;
        const uint32_t variants = p.rope.chunk_len == 0 ? 1 : kVariants;
        for (uint32_t i = threadIdx.x; i < variants * kGroup * chunks; i += kThreads) {
            const uint32_t variant = i / (kGroup * chunks), row = i / chunks % kGroup;
            unsigned char* tile = shared + variant * kQueryBytes;
            if (row < group)
                rotate_chunk<HeadDim>(p.rope, q + row * HeadDim, position, variant < chunk ? chunk - variant : 0, scale,
                                      tile, row, i % chunks);
            else
                clear_chunk<HeadDim>(tile, row, i % chunks);
        }
    }

    // Copies `count` keys and their values, one run in the pool, to `stage`; further rows are zero.
    __device__ __forceinline__ void load(uint32_t block, uint32_t slot, uint32_t kv_head, uint32_t count,
                                         uint32_t stage) const {
        constexpr uint32_t chunks = HeadDim / 8, rows_at_once = 32 / chunks;
        const uint32_t lane = threadIdx.x % 32, row = lane / chunks;
        const uint64_t from = p.kv.index(block, kv_head, slot) + lane * 8;
        const Bf16 *keys = static_cast<const Bf16*>(p.kv.keys) + from, *values = static_cast<const Bf16*>(p.kv.values) + from;
        const uint32_t to = stage + swizzled<HeadDim>(row, lane % chunks);
#pragma unroll
        for (uint32_t r = 0; r < kPiece; r += rows_at_once) {
            const uint32_t at = (to ^ ((r & 7u) << 4)) + r * kRowBytes, bytes = r + row < count ? 16 : 0;
            ptx::cp_async_cg_16_zfill(at, keys + r * HeadDim, bytes);
            ptx::cp_async_cg_16_zfill(at + kPieceBytes, values + r * HeadDim, bytes);
        }
    }

    __device__ __forceinline__ void run(uint32_t order, uint32_t kv_head, uint32_t split, uint32_t splits) const {
        const StepHeader& step = *p.step;
        const SequenceInfo& sequence = step.sequence(step.words()[step.decode_sequences + order]);
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const uint32_t position = sequence.kv_len - 1, chunk = p.rope.chunk_of(position);
        const uint32_t end = split_begin(sequence.kv_len, splits, split + 1);
        uint32_t first = split_begin(sequence.kv_len, splits, split) + warp * kPiece, ahead = first;
        const uint32_t query = ptx::shared_address(shared);
        const uint32_t ring = query + kVariants * kQueryBytes + warp * kStages * 2 * kPieceBytes;

        // The block number of the next copy is read a round before it is needed.
        KvCursor at{sequence.block_table + ahead / p.kv.block_size, ahead % p.kv.block_size};
        uint32_t block = ahead < end ? step.words()[at.entry] : 0;
        const auto load_next = [&](uint32_t stage) {
            if (ahead < end) {
                load(block, at.slot, kv_head, end - ahead < kPiece ? end - ahead : kPiece, ring + stage * 2 * kPieceBytes);
                ahead += kTileTokens;
                at.advance(kTileTokens, p.kv.block_size);
                if (ahead < end) block = step.words()[at.entry];
            }
            ptx::cp_async_commit_group();
        };
        load_next(0);
        load_next(1);
        rotate(sequence, kv_head, position);
        __syncthreads();
        FlashState<HeadDim, 1, 1> state;
        state.reset();
        uint32_t queries[HeadDim / 16][2] = {};
        uint32_t stage = 0, variant = ~0u;
        for (; first < end; first += kTileTokens) {
            const uint32_t distance = chunk - p.rope.chunk_of(first);
            const uint32_t wanted = distance < kVariants ? distance : kVariants - 1;
            if (wanted != variant) {
                variant = wanted;
#pragma unroll
                for (uint32_t k = 0; k < HeadDim / 16; ++k)
                    ptx::ldmatrix_x2(queries[k], query + variant * kQueryBytes +
                                                     swizzled<HeadDim>(lane % 8, 2 * k + lane / 8 % 2));
            }
            ptx::cp_async_wait_group<1>();
            __syncwarp();
            const uint32_t keys = ring + stage * 2 * kPieceBytes;
            float score[1][kPiece / 8][4];
            state.template multiply<kPiece>(
                keys,
                [&](uint32_t k, uint32_t (&a)[1][4]) {
                    a[0][0] = queries[k][0];
                    a[0][2] = queries[k][1];
                    a[0][1] = a[0][3] = 0;
                },
                score);
            if (end - first < kPiece)
                state.template mask<kPiece>(
                    score, [&](uint32_t, uint32_t) { return static_cast<int32_t>(end - first - 1); });
            state.template weigh<kPiece>(score);
            state.template accumulate<kPiece>(keys + kPieceBytes, score);
            __syncwarp();
            load_next(stage);
            stage ^= 1;
        }
        state.finish();
        ptx::cp_async_wait_all();
        __syncthreads();
        merge_warps(state, order, kv_head, split, splits, sequence.first_row);
        __syncthreads();
    }

    // Where the parts of a (sequence, KV head) are: [split][head of the group][head_dim] unnormalised values, and
    // [split][head of the group][2]: the maximum and the sum. Groups that are cut leave slots unused.
    __device__ __forceinline__ float* values_of(uint64_t pair) const {
        return p.partials + pair * p.most_splits * p.kv.group * HeadDim;
    }
    __device__ __forceinline__ float* sums_of(uint64_t pair) const {
        return p.partials + static_cast<uint64_t>(tasks_of_most) * p.kv.group * HeadDim +
               pair * p.most_splits * p.kv.group * 2;
    }

    __device__ __forceinline__ void write(uint32_t row, uint32_t kv_head, uint32_t head, uint32_t quad, float4 v) const {
        Bf16* out = static_cast<Bf16*>(p.out) + static_cast<uint64_t>(row) * p.out_stride +
                    (p.kv.first_query_head(kv_head) + head) * HeadDim + quad * 4;
        *reinterpret_cast<uint2*>(out) = make_uint2(ptx::cvt_bf16x2(v.x, v.y), ptx::cvt_bf16x2(v.z, v.w));
    }

    // Brings the warps' states together, in shared memory that nothing else is in any more, and puts out the result, or
    // this task's part of it.
    __device__ __forceinline__ void merge_warps(const FlashState<HeadDim, 1, 1>& state, uint32_t order, uint32_t kv_head,
                                                uint32_t split, uint32_t splits, uint32_t row) const {
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const uint32_t group = p.kv.query_heads_of(kv_head), pitch = p.kv.group;
        float* parts = reinterpret_cast<float*>(shared + kVariants * kQueryBytes);  // [warp][head][head_dim]
        float* stats = parts + kWarps * kGroup * HeadDim;                           // [warp][head][2]
        float* weights = stats + kWarps * kGroup * 2;                               // [head][most splits]
        const uint32_t mine = warp * kGroup + lane / 4;
#pragma unroll
        for (uint32_t n = 0; n < HeadDim / 8; ++n)
            *reinterpret_cast<float2*>(parts + mine * HeadDim + n * 8 + lane % 4 * 2) =
                make_float2(state.out[0][n][0], state.out[0][n][1]);
        if (lane % 4 == 0) {
            stats[mine * 2] = state.largest[0][0];
            stats[mine * 2 + 1] = state.sum[0][0];
        }
        __syncthreads();
        const uint64_t pair = static_cast<uint64_t>(order) * p.kv.kv_heads + kv_head;
        float *values = values_of(pair), *sums = sums_of(pair);
        for (uint32_t i = threadIdx.x; i < group * kQuads; i += kThreads) {
            const uint32_t head = i / kQuads, quad = i % kQuads;
            float largest = stats[head * 2];
#pragma unroll
            for (uint32_t w = 1; w < kWarps; ++w) largest = fmaxf(largest, stats[(w * kGroup + head) * 2]);
            float sum = 0.0f;
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (uint32_t w = 0; w < kWarps; ++w) {
                // 0 for a warp that met no key.
                const float weight = ptx::ex2_approx_ftz(stats[(w * kGroup + head) * 2] - largest);
                sum += weight * stats[(w * kGroup + head) * 2 + 1];
                add(total, weight, *reinterpret_cast<const float4*>(parts + (w * kGroup + head) * HeadDim + quad * 4));
            }
            if (splits == 1) {
                const float factor = 1.0f / sum;
                write(row, kv_head, head, quad,
                      make_float4(total.x * factor, total.y * factor, total.z * factor, total.w * factor));
            } else {
                *reinterpret_cast<float4*>(values + (split * pitch + head) * HeadDim + quad * 4) = total;
                if (quad == 0) *reinterpret_cast<float2*>(sums + (split * pitch + head) * 2) = make_float2(largest, sum);
            }
        }
        if (splits == 1) return;
        // Releases what all threads of the block have written before the barrier, and acquires what other blocks released.
        __syncthreads();
        if (threadIdx.x == 0) *flag = ptx::atom_add_acq_rel_gpu(p.counters + pair, 1u);
        __syncthreads();
        if (*flag != splits - 1) return;
        if (threadIdx.x == 0) p.counters[pair] = 0;
        for (uint32_t head = warp; head < group; head += kWarps)
            weigh_splits(sums + head * 2, splits, weights + head * kMostSplits);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < group * kQuads; i += kThreads) {
            const uint32_t head = i / kQuads, quad = i % kQuads;
            const float* from = values + head * HeadDim + quad * 4;
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
            for (uint32_t s = 0; s < splits; ++s) {
                const uint4 bits = ptx::ld_global_cg_v4(from + static_cast<uint64_t>(s) * pitch * HeadDim);
                add(total, weights[head * kMostSplits + s],
                    make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                                __uint_as_float(bits.w)));
            }
            write(row, kv_head, head, quad, total);
        }
    }

    // The factor of each split's values in the result of one head; a lane holds splits `lane` and `lane` + 32.
    __device__ __forceinline__ void weigh_splits(const float* sums, uint32_t splits, float* weights) const {
        const uint32_t lane = threadIdx.x % 32, pitch = p.kv.group * 2;
        float largest[2], sum[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t split = lane + i * 32;
            const float* from = sums + split * pitch;
            largest[i] = split < splits ? from[0] : __uint_as_float(0xff800000u);
            sum[i] = split < splits ? from[1] : 0.0f;
        }
        const float all = warp_reduce(fmaxf(largest[0], largest[1]), Max{});
        float weight[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) weight[i] = ptx::ex2_approx_ftz(largest[i] - all);
        const float factor = 1.0f / warp_reduce(weight[0] * sum[0] + weight[1] * sum[1], Sum{});
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i)
            if (lane + i * 32 < splits) weights[lane + i * 32] = weight[i] * factor;
    }

    static __device__ __forceinline__ void add(float4& total, float weight, float4 v) {
        total.x += weight * v.x;
        total.y += weight * v.y;
        total.z += weight * v.z;
        total.w += weight * v.w;
    }
};

template <uint32_t HeadDim>
__device__ __forceinline__ void attention_decode(const AttentionParams& p) {
    PTX_SHARED_ARRAY(uint32_t, starts, kMostSequences + 1);  // first task of each sequence
    PTX_SHARED_ARRAY(uint32_t, flag, 4);
    const StepHeader& step = *p.step;
    const uint32_t count = step.decode_count < kMostSequences ? step.decode_count : kMostSequences;
    if (threadIdx.x < 32) {
        uint32_t carried = 0;
        for (uint32_t base = 0; base < count; base += 32) {
            const uint32_t order = base + threadIdx.x;
            uint32_t tasks = 0;
            if (order < count) {
                const SequenceInfo& sequence = step.sequence(step.words()[step.decode_sequences + order]);
                tasks = splits_of(sequence.kv_len, p.most_splits) * p.kv.kv_heads;
            }
            uint32_t before = tasks;
#pragma unroll
            for (uint32_t distance = 1; distance < 32; distance *= 2) {
                const uint32_t other = ptx::shfl_up(kFullWarp, before, distance);
                if (threadIdx.x >= distance) before += other;
            }
            if (order < count) starts[order] = carried + before - tasks;
            carried += ptx::shfl_idx(kFullWarp, before, 31);
        }
        if (threadIdx.x == 0) starts[count] = carried;
    }
    __syncthreads();
    const Decode<HeadDim> work{p, ptx::dynamic_shared<unsigned char>(), flag, p.pairs * p.most_splits};
    for (uint32_t task = blockIdx.x; task < starts[count]; task += gridDim.x) {
        uint32_t low = 0, high = count;  // the last sequence that starts at or before the task
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (starts[middle] <= task)
                low = middle;
            else
                high = middle;
        }
        const uint32_t splits = (starts[low + 1] - starts[low]) / p.kv.kv_heads, within = task - starts[low];
        work.run(low, within / splits, within % splits, splits);
    }
}

}  // namespace

LONGHAUL_KERNEL(attention_decode_mma_hd64_bf16, AttentionParams, kThreads, attention_decode<64>)
LONGHAUL_KERNEL(attention_decode_mma_hd128_bf16, AttentionParams, kThreads, attention_decode<128>)

}  // namespace longhaul

// Decode attention with mma.sync: one query row a sequence, split over the keys (flash decoding).
//
// A task is a run of keys of one sequence and one KV head. The group's heads (up to 8) are rows of the M operand; each of
// four warps takes 16 of a tile's 64 keys and keeps a softmax of its own, merged at the task's end. How a sequence is
// split depends on its own length only, so its result does not depend on the batch. Blocks are persistent and take tasks
// in turn; the block that completes a (sequence, KV head) last merges its parts in the order of keys. Partials are, for
// each (sequence, KV head, split, head of the group): head_dim unnormalised values, the maximum and the sum.
#include "../common/kernel.h"
#include "flash_tile.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWarps = kThreads / 32;
constexpr uint32_t kGroup = 8;            // most query heads of a KV head
constexpr uint32_t kLeastSplit = 128;     // keys
constexpr uint32_t kMostSequences = 1024;

// Splits of a sequence of `length` keys: 128 keys each as long as that makes no more than `most`.
__device__ __forceinline__ uint32_t splits_of(uint32_t length, uint32_t most) {
    const uint32_t splits = (length + kLeastSplit - 1) / kLeastSplit;
    return splits < most ? splits : most;
}

// First key of split `index`: whole tiles.
__device__ __forceinline__ uint32_t split_begin(uint32_t length, uint32_t splits, uint32_t index) {
    const uint32_t tiles = (length + kTileTokens - 1) / kTileTokens;
    const uint64_t begin = static_cast<uint64_t>(tiles) * index / splits * kTileTokens;
    return begin < length ? static_cast<uint32_t>(begin) : length;
}

template <uint32_t HeadDim>
struct Decode {
    static constexpr uint32_t kTileBytes = kTileTokens * HeadDim * 2;
    static constexpr uint32_t kQueryBytes = 16 * HeadDim * 2;  // of one variant
    static constexpr uint32_t kSlot = HeadDim + 2;             // floats of a partial row

    const AttentionParams& p;
    unsigned char* shared;
    uint32_t* flag;

    // Rotates the group's queries in all variants; rows beyond the group are zero.
    __device__ __forceinline__ void rotate(const SequenceInfo& sequence, uint32_t kv_head, uint32_t position) const {
        constexpr uint32_t half = HeadDim / 2;
        const uint32_t group = p.kv.group(), chunk = p.rope.chunk_of(position);
        const Bf16* q = static_cast<const Bf16*>(p.q) + static_cast<uint64_t>(sequence.first_row) * p.q_stride +
                        kv_head * group * HeadDim;
        const uint32_t variants = p.rope.chunk_len == 0 ? 1 : kVariants;
        for (uint32_t i = threadIdx.x; i < variants * 16 * half; i += kThreads) {
            const uint32_t variant = i / (16 * half), row = i / half % 16;
            unsigned char* tile = shared + variant * kQueryBytes;
            if (row < group)
                rotate_pair<HeadDim>(p, q + row * HeadDim, position, variant < chunk ? chunk - variant : 0, tile, row,
                                     i % half);
            else
                store_rotated<HeadDim>(tile, row, i % half, 0.0f, 0.0f);
        }
    }

    // Merges the warps' states into `out` [group][kSlot]: value, maximum, sum of each head; all threads see it after.
    __device__ __forceinline__ void merge_warps(FlashState<HeadDim>& state, float* parts) const {
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4;
        float* mine = parts + (warp * kGroup + row) * kSlot;
#pragma unroll
        for (uint32_t n = 0; n < HeadDim / 8; ++n) {
            mine[n * 8 + lane % 4 * 2] = state.out[n][0];
            mine[n * 8 + lane % 4 * 2 + 1] = state.out[n][1];
        }
        if (lane % 4 == 0) {
            mine[HeadDim] = state.largest[0];
            mine[HeadDim + 1] = state.sum[0];
        }
        __syncthreads();
    }

    // Weighted sum over `count` parts of head `row`, `pitch` floats apart: value d, and the total's maximum and sum.
    __device__ __forceinline__ float combine(const float* parts, uint32_t count, uint64_t pitch, uint32_t d,
                                             float& largest, float& sum) const {
        largest = __uint_as_float(0xff800000u);
        for (uint32_t i = 0; i < count; ++i) largest = Max{}(largest, parts[i * pitch + HeadDim]);
        float value = 0.0f;
        sum = 0.0f;
        for (uint32_t i = 0; i < count; ++i) {
            const float weight = exp2f(parts[i * pitch + HeadDim] - largest);
            value += weight * parts[i * pitch + d];
            sum += weight * parts[i * pitch + HeadDim + 1];
        }
        return value;
    }

    __device__ __forceinline__ void write(const SequenceInfo& sequence, uint32_t kv_head, uint32_t head, uint32_t d,
                                          float value) const {
        static_cast<Bf16*>(p.out)[static_cast<uint64_t>(sequence.first_row) * p.out_stride +
                                  (kv_head * p.kv.group() + head) * HeadDim + d] = from_float<Bf16>(value);
    }

    __device__ __forceinline__ void run(uint32_t order, uint32_t kv_head, uint32_t split, uint32_t splits) const {
        const StepHeader& step = *p.step;
        const SequenceInfo& sequence = step.sequence(step.words()[step.decode_sequences + order]);
        const uint32_t warp = threadIdx.x / 32, group = p.kv.group();
        const uint32_t position = sequence.kv_len - 1, chunk = p.rope.chunk_of(position);
        const uint32_t begin = split_begin(sequence.kv_len, splits, split);
        const uint32_t end = split_begin(sequence.kv_len, splits, split + 1);
        const uint32_t query = ptx::shared_address(shared), ring = query + kVariants * kQueryBytes;
        const auto load = [&](uint32_t from, uint32_t stage) {
            if (from < end) {
                const uint32_t keys = ring + stage * 2 * kTileBytes;
                const uint32_t count = end - from < kTileTokens ? end - from : kTileTokens;
                load_tile<HeadDim, kThreads>(p, sequence, kv_head, from, count, keys, keys + kTileBytes);
            }
            ptx::cp_async_commit_group();
        };
        load(begin, 0);
        load(begin + kTileTokens, 1);
        rotate(sequence, kv_head, position);
        FlashState<HeadDim> state;
        state.reset();
        state.scale[0] = step.logit_scale(sequence.first_row) * kLog2E;
        state.scale[1] = 0.0f;
        state.last_key[0] = state.last_key[1] = position;
        uint32_t stage = 0, variant = ~0u;
        for (uint32_t from = begin; from < end; from += kTileTokens) {
            ptx::cp_async_wait_group<1>();
            __syncthreads();
            // 16 keys from a multiple of 16 lie in one block, so in one chunk.
            const uint32_t first = from + warp * 16;
            if (first < end) {
                const uint32_t distance = chunk - p.rope.chunk_of(first);
                const uint32_t wanted = distance < kVariants ? distance : kVariants - 1;
                if (wanted != variant) {
                    state.load_queries(query + wanted * kQueryBytes, 0);
                    variant = wanted;
                }
                const uint32_t keys = ring + stage * 2 * kTileBytes;
                state.template attend<16, true>(keys, keys + kTileBytes, warp * 16, first, end);
            }
            __syncthreads();
            load(from + 2 * kTileTokens, stage);
            stage ^= 1;
        }
        state.finish();
        ptx::cp_async_wait_all();
        __syncthreads();
        float* parts = reinterpret_cast<float*>(shared + kVariants * kQueryBytes);
        merge_warps(state, parts);

        float largest, sum;
        const uint64_t pair = static_cast<uint64_t>(order) * p.kv.kv_heads + kv_head;
        if (splits == 1) {
            for (uint32_t i = threadIdx.x; i < group * HeadDim; i += kThreads) {
                const uint32_t head = i / HeadDim, d = i % HeadDim;
                const float value = combine(parts + head * kSlot, kWarps, kGroup * kSlot, d, largest, sum);
                write(sequence, kv_head, head, d, value / sum);
            }
            __syncthreads();
            return;
        }
        float* slots = p.partials + pair * p.most_splits * group * kSlot;
        for (uint32_t i = threadIdx.x; i < group * HeadDim; i += kThreads) {
            const uint32_t head = i / HeadDim, d = i % HeadDim;
            float* slot = slots + (static_cast<uint64_t>(split) * group + head) * kSlot;
            slot[d] = combine(parts + head * kSlot, kWarps, kGroup * kSlot, d, largest, sum);
            if (d == 0) {
                slot[HeadDim] = largest;
                slot[HeadDim + 1] = sum;
            }
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *flag = atomicAdd(p.counters + pair, 1u);
        __syncthreads();
        if (*flag == splits - 1) {
            __threadfence();
            for (uint32_t i = threadIdx.x; i < group * HeadDim; i += kThreads) {
                const uint32_t head = i / HeadDim, d = i % HeadDim;
                const float value = combine(slots + head * kSlot, splits, group * kSlot, d, largest, sum);
                write(sequence, kv_head, head, d, value / sum);
            }
            if (threadIdx.x == 0) p.counters[pair] = 0;
        }
        __syncthreads();
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
    const Decode<HeadDim> work{p, ptx::dynamic_shared<unsigned char>(), flag};
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

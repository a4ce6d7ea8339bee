// Plain attention: one block a (row, query head), any even head_dim up to 256, any group, any block size.
//
// Causal over the paged cache, online softmax in f32 over tiles of four keys a thread. A query is rotated against keys of its
// own chunk, of the previous one, and of all before (docs/architecture.md, "Positions"); plain positions are one chunk.
#include "../common/element.h"
#include "../common/fp8.h"
#include "../common/kernel.h"
#include "../common/reduce.h"
#include "attention.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kMostHeadDim = 256;
constexpr uint32_t kKeysPerThread = 4;
constexpr uint32_t kTile = kThreads * kKeysPerThread;

template <class C>
__device__ __forceinline__ float cached(const void* plane, uint64_t index) {
    return to_float(static_cast<const C*>(plane)[index]);
}
template <>
__device__ __forceinline__ float cached<uint8_t>(const void* plane, uint64_t index) {
    return e4m3_to_float(static_cast<const uint8_t*>(plane)[index]);
}

template <class T, class C>
__device__ __forceinline__ void attention_plain(const AttentionParams& p) {
    PTX_SHARED_ARRAY(float, query, kVariants* kMostHeadDim);
    PTX_SHARED_ARRAY(float, weights, kTile);
    PTX_SHARED_ARRAY(float, scratch, 32);
    const uint32_t row = blockIdx.x, head = blockIdx.y, d = p.kv.head_dim, half = d / 2;
    if (row >= p.step->rows) return;
    const uint32_t position = p.step->position(row), chunk = p.rope.chunk_of(position);
    const SequenceInfo& sequence = p.step->sequence(p.step->sequence_of(row));
    const T* q = static_cast<const T*>(p.q) + static_cast<uint64_t>(row) * p.q_stride + head * d;
    for (uint32_t i = threadIdx.x; i < kVariants * half; i += kThreads) {
        const uint32_t variant = i / half, j = i % half;
        const uint32_t table_row = p.rope.query_row(position, variant < chunk ? chunk - variant : 0);
        const float c = p.rope.cos[static_cast<uint64_t>(table_row) * half + j];
        const float s = p.rope.sin[static_cast<uint64_t>(table_row) * half + j];
        const float a = to_float(q[j]), b = to_float(q[j + half]);
        query[variant * kMostHeadDim + j] = a * c - b * s;
        query[variant * kMostHeadDim + j + half] = b * c + a * s;
    }
    __syncthreads();

    const uint32_t kv_head = p.kv.kv_head_of(head);
    const float scale = p.step->logit_scale(row) * p.kv.key_scale(kv_head);
    const float minus_infinity = __uint_as_float(0xff800000u);
    float largest = minus_infinity, sum = 0.0f, out[2] = {0.0f, 0.0f};
    for (uint32_t first = 0; first <= position; first += kTile) {
        float score[kKeysPerThread], tile_largest = minus_infinity;
#pragma unroll
        for (uint32_t part = 0; part < kKeysPerThread; ++part) {
            const uint32_t key = first + part * kThreads + threadIdx.x;
            score[part] = minus_infinity;
            if (key <= position) {
                const uint32_t distance = chunk - p.rope.chunk_of(key);
                const float* rotated = query + (distance < kVariants ? distance : kVariants - 1) * kMostHeadDim;
                const uint32_t block = p.step->block(sequence, key, p.kv.block_size);
                const uint64_t index = p.kv.index(block, kv_head, key % p.kv.block_size);
                float dot = 0.0f;
#pragma unroll 2
                for (uint32_t i = 0; i < d; ++i) dot += rotated[i] * cached<C>(p.kv.keys, index + i);
                score[part] = dot * scale;
            }
            tile_largest = Max{}(tile_largest, score[part]);
        }
        tile_largest = block_reduce(tile_largest, scratch, minus_infinity, Max{});
        const float now = Max{}(largest, tile_largest);
        const float correction = expf(largest - now);
        float tile_sum = 0.0f;
#pragma unroll
        for (uint32_t part = 0; part < kKeysPerThread; ++part) {
            const float weight = expf(score[part] - now);
            weights[part * kThreads + threadIdx.x] = weight;
            tile_sum += weight;
        }
        sum = sum * correction + block_reduce(tile_sum, scratch, 0.0f, Sum{});
        largest = now;
        const uint32_t keys = position + 1 - first < kTile ? position + 1 - first : kTile;
#pragma unroll
        for (uint32_t part = 0; part < 2; ++part) {
            const uint32_t i = part * kThreads + threadIdx.x;
            if (i >= d) break;
            float value = out[part] * correction;
#pragma unroll 1
            for (uint32_t j = 0; j < keys; ++j) {
                const uint32_t token = first + j;
                const uint32_t block = p.step->block(sequence, token, p.kv.block_size);
                value += weights[j] * cached<C>(p.kv.values, p.kv.index(block, kv_head, token % p.kv.block_size) + i);
            }
            out[part] = value;
        }
        __syncthreads();
    }
    const float factor = p.kv.value_scale(kv_head) / sum;
    T* result = static_cast<T*>(p.out) + static_cast<uint64_t>(row) * p.out_stride + head * d;
#pragma unroll
    for (uint32_t part = 0; part < 2; ++part) {
        const uint32_t i = part * kThreads + threadIdx.x;
        if (i < d) result[i] = from_float<T>(out[part] * factor);
    }
}

}  // namespace

LONGHAUL_KERNEL(attention_plain_bf16_bf16, AttentionParams, kThreads, attention_plain<Bf16, Bf16>)
LONGHAUL_KERNEL(attention_plain_bf16_e4m3, AttentionParams, kThreads, attention_plain<Bf16, uint8_t>)
LONGHAUL_KERNEL(attention_plain_bf16_f32, AttentionParams, kThreads, attention_plain<Bf16, float>)
LONGHAUL_KERNEL(attention_plain_f32_bf16, AttentionParams, kThreads, attention_plain<float, Bf16>)
LONGHAUL_KERNEL(attention_plain_f32_e4m3, AttentionParams, kThreads, attention_plain<float, uint8_t>)
LONGHAUL_KERNEL(attention_plain_f32_f32, AttentionParams, kThreads, attention_plain<float, float>)

}  // namespace longhaul

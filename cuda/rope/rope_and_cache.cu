// Bias, rotation of k, and the write of k and v to their paged blocks; q leaves unrotated.
//
// One block a (row, head) of q, k and v heads in that order. NeoX pairing; k is rotated at `RopeParams::key_row`, so the
// cache serves plain RoPE and Dual Chunk Attention alike (docs/architecture.md, "Positions").
#include "../common/element.h"
#include "../common/fp8.h"
#include "../common/kernel.h"
#include "../common/kv.h"
#include "../common/rope.h"
#include "../common/step.h"

namespace longhaul {
namespace {

struct RopeAndCacheParams {
    const StepHeader* step;
    const void* qkv;    // T [rows, qkv_stride]
    const float* bias;  // [(query_heads + 2 * kv_heads) * head_dim], or null
    void* q;            // T [rows, q_stride]
    RopeParams rope;
    KvParams kv;
    uint32_t qkv_stride;
    uint32_t q_stride;
};

// Stores one value of the cache; `inverse_scale` applies to fp8 only.
template <class C>
__device__ __forceinline__ void store(void* plane, uint64_t index, float value, float) {
    static_cast<C*>(plane)[index] = from_float<C>(value);
}
template <>
__device__ __forceinline__ void store<uint8_t>(void* plane, uint64_t index, float value, float inverse_scale) {
    static_cast<uint8_t*>(plane)[index] = float_to_e4m3(value * inverse_scale);
}

template <class T, class C>
__device__ __forceinline__ void rope_and_cache(const RopeAndCacheParams& p) {
    const uint32_t row = blockIdx.x, head = blockIdx.y, d = p.kv.head_dim;
    if (row >= p.step->rows) return;
    const T* in = static_cast<const T*>(p.qkv) + static_cast<uint64_t>(row) * p.qkv_stride + head * d;
    const float* bias = p.bias == nullptr ? nullptr : p.bias + head * d;
    const auto at = [&](uint32_t i) { return to_float(in[i]) + (bias == nullptr ? 0.0f : bias[i]); };
    if (head < p.kv.query_heads) {
        T* out = static_cast<T*>(p.q) + static_cast<uint64_t>(row) * p.q_stride + head * d;
        for (uint32_t i = threadIdx.x; i < d; i += blockDim.x) out[i] = from_float<T>(at(i));
        return;
    }
    const uint32_t position = p.step->position(row);
    const SequenceInfo& sequence = p.step->sequence(p.step->sequence_of(row));
    const uint32_t block = p.step->block(sequence, position, p.kv.block_size);
    const uint32_t slot = position % p.kv.block_size;
    const bool is_key = head < p.kv.query_heads + p.kv.kv_heads;
    const uint32_t kv_head = head - p.kv.query_heads - (is_key ? 0 : p.kv.kv_heads);
    const uint64_t index = p.kv.index(block, kv_head, slot);
    if (!is_key) {
        const float inverse = 1.0f / p.kv.value_scale(kv_head);
        for (uint32_t i = threadIdx.x; i < d; i += blockDim.x) store<C>(p.kv.values, index + i, at(i), inverse);
        return;
    }
    const uint32_t table_row = p.rope.key_row(position), half = d / 2;
    const float inverse = 1.0f / p.kv.key_scale(kv_head);
    const float* cos = p.rope.cos + static_cast<uint64_t>(table_row) * half;
    const float* sin = p.rope.sin + static_cast<uint64_t>(table_row) * half;
    const bool inside = table_row < p.rope.rows;  // the host has checked; a table overrun must not read wild memory
    for (uint32_t i = threadIdx.x; i < half; i += blockDim.x) {
        const float c = inside ? cos[i] : __uint_as_float(0x7fffffffu), s = inside ? sin[i] : 0.0f;
        const float a = at(i), b = at(i + half);
        store<C>(p.kv.keys, index + i, a * c - b * s, inverse);
        store<C>(p.kv.keys, index + i + half, b * c + a * s, inverse);
    }
}

}  // namespace

LONGHAUL_KERNEL(rope_and_cache_bf16_bf16, RopeAndCacheParams, 128, rope_and_cache<Bf16, Bf16>)
LONGHAUL_KERNEL(rope_and_cache_bf16_e4m3, RopeAndCacheParams, 128, rope_and_cache<Bf16, uint8_t>)
LONGHAUL_KERNEL(rope_and_cache_bf16_f32, RopeAndCacheParams, 128, rope_and_cache<Bf16, float>)
LONGHAUL_KERNEL(rope_and_cache_f32_bf16, RopeAndCacheParams, 128, rope_and_cache<float, Bf16>)
LONGHAUL_KERNEL(rope_and_cache_f32_e4m3, RopeAndCacheParams, 128, rope_and_cache<float, uint8_t>)
LONGHAUL_KERNEL(rope_and_cache_f32_f32, RopeAndCacheParams, 128, rope_and_cache<float, float>)

}  // namespace longhaul

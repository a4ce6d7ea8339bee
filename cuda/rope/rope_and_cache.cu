// Bias, rotation of k, and the write of k and v to their paged blocks; q leaves unrotated.
//
// One block takes a row's heads (q, k and v heads in that order) eight values a thread: a group of eight neighbours of a q or
// v head, a group and its partners in the other half of a k head; one by one where a head is not whole groups. NeoX pairing; k is rotated at `RopeParams::key_row`, so the
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

constexpr uint32_t kThreads = 128;

// Neighbours as floats: eight of aligned ones, or one.
template <class T>
__device__ __forceinline__ void load(const T* source, float (&values)[8]) {
    load_eight(source, values);
}
template <class T>
__device__ __forceinline__ void load(const T* source, float (&values)[1]) {
    values[0] = to_float(*source);
}

template <class T>
__device__ __forceinline__ void store(T* destination, const float (&values)[8], float) {
    store_eight(destination, values);
}
template <class T>
__device__ __forceinline__ void store(T* destination, const float (&values)[1], float) {
    *destination = from_float<T>(values[0]);
}
// `inverse_scale` applies to fp8 only.
__device__ __forceinline__ void store(uint8_t* destination, const float (&values)[8], float inverse_scale) {
    uint32_t code[2] = {0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i)
        code[i / 4] |= static_cast<uint32_t>(float_to_e4m3(values[i] * inverse_scale)) << (8 * (i % 4));
    *reinterpret_cast<uint2*>(destination) = make_uint2(code[0], code[1]);
}
__device__ __forceinline__ void store(uint8_t* destination, const float (&values)[1], float inverse_scale) {
    *destination = float_to_e4m3(values[0] * inverse_scale);
}

template <class T, class C, uint32_t Width>
__device__ __forceinline__ void row_group(const RopeAndCacheParams& p, uint32_t row, uint32_t group) {
    const uint32_t d = p.kv.head_dim, half = d / 2;
    const uint32_t head_groups = d / Width, key_groups = half / Width;
    const uint32_t q_groups = p.kv.query_heads * head_groups, k_groups = p.kv.kv_heads * key_groups;
    if (group >= q_groups + k_groups + p.kv.kv_heads * head_groups) return;
    const bool is_q = group < q_groups, is_key = !is_q && group < q_groups + k_groups;
    group -= is_q ? 0 : is_key ? q_groups : q_groups + k_groups;
    const uint32_t per_head = is_key ? key_groups : head_groups;
    const uint32_t head = group / per_head, at = group % per_head * Width;
    const uint32_t column = (is_q ? head : p.kv.query_heads + (is_key ? 0 : p.kv.kv_heads) + head) * d + at;
    const T* in = static_cast<const T*>(p.qkv) + static_cast<uint64_t>(row) * p.qkv_stride + column;
    const auto biased = [&](uint32_t offset, float (&values)[Width]) {
        load(in + offset, values);
        if (p.bias == nullptr) return;
        float bias[Width];
        load(p.bias + column + offset, bias);
#pragma unroll
        for (uint32_t i = 0; i < Width; ++i) values[i] += bias[i];
    };
    float a[Width];
    biased(0, a);
    if (is_q) {
        store(static_cast<T*>(p.q) + static_cast<uint64_t>(row) * p.q_stride + column, a, 1.0f);
        return;
    }
    const uint32_t position = p.step->position(row);
    const SequenceInfo& sequence = p.step->sequence(p.step->sequence_of(row));
    const uint32_t block = p.step->block(sequence, position, p.kv.block_size);
    const uint64_t index = p.kv.index(block, head, position % p.kv.block_size) + at;
    if (!is_key) {
        store(static_cast<C*>(p.kv.values) + index, a, 1.0f / p.kv.value_scale(head));
        return;
    }
    float b[Width], cos[Width], sin[Width];
    biased(half, b);
    const uint32_t table_row = p.rope.key_row(position);
    if (table_row < p.rope.rows) {
        load(p.rope.cos + static_cast<uint64_t>(table_row) * half + at, cos);
        load(p.rope.sin + static_cast<uint64_t>(table_row) * half + at, sin);
    } else {
        // The host has checked; a table overrun must not read wild memory.
#pragma unroll
        for (uint32_t i = 0; i < Width; ++i) cos[i] = sin[i] = __uint_as_float(0x7fffffffu);
    }
    const float inverse = 1.0f / p.kv.key_scale(head);
    float low[Width], high[Width];
#pragma unroll
    for (uint32_t i = 0; i < Width; ++i) {
        low[i] = a[i] * cos[i] - b[i] * sin[i];
        high[i] = b[i] * cos[i] + a[i] * sin[i];
    }
    store(static_cast<C*>(p.kv.keys) + index, low, inverse);
    store(static_cast<C*>(p.kv.keys) + index + half, high, inverse);
}

template <class T, class C>
__device__ __forceinline__ void rope_and_cache(const RopeAndCacheParams& p) {
    const uint32_t row = blockIdx.x, group = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= p.step->rows) return;
    if (p.kv.head_dim % 16 == 0)
        row_group<T, C, 8>(p, row, group);
    else
        row_group<T, C, 1>(p, row, group);
}

}  // namespace

LONGHAUL_KERNEL(rope_and_cache_bf16_bf16, RopeAndCacheParams, kThreads, rope_and_cache<Bf16, Bf16>)
LONGHAUL_KERNEL(rope_and_cache_bf16_e4m3, RopeAndCacheParams, kThreads, rope_and_cache<Bf16, uint8_t>)
LONGHAUL_KERNEL(rope_and_cache_bf16_f32, RopeAndCacheParams, kThreads, rope_and_cache<Bf16, float>)
LONGHAUL_KERNEL(rope_and_cache_f32_bf16, RopeAndCacheParams, kThreads, rope_and_cache<float, Bf16>)
LONGHAUL_KERNEL(rope_and_cache_f32_e4m3, RopeAndCacheParams, kThreads, rope_and_cache<float, uint8_t>)
LONGHAUL_KERNEL(rope_and_cache_f32_f32, RopeAndCacheParams, kThreads, rope_and_cache<float, float>)

}  // namespace longhaul

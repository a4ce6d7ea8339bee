// One layer of the paged KV pool on the device. Mirrored by crates/cuda/src/kv.rs.
#pragma once

#include "../ptx/target.h"

namespace longhaul {

using ptx::uint32_t;
using ptx::uint64_t;

// K and V are each [blocks, kv_heads, block_size, head_dim]. K is rotated at its key row (rope.h) and unscaled.
struct KvParams {
    void* keys;
    void* values;
    const float* key_scales;    // [kv_heads], or null for 1: stored key times scale is the key (fp8)
    const float* value_scales;  // [kv_heads], or null for 1
    uint32_t query_heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t block_size;
    uint32_t group;    // query heads of a KV head, at most
    uint32_t skipped;  // query heads of the first group that other ranks hold

    // Element index of slot `slot` of head `head` in pool block `block`.
    __device__ uint64_t index(uint32_t block, uint32_t head, uint32_t slot) const {
        return ((static_cast<uint64_t>(block) * kv_heads + head) * block_size + slot) * head_dim;
    }
    __device__ float key_scale(uint32_t head) const { return key_scales == nullptr ? 1.0f : key_scales[head]; }
    __device__ float value_scale(uint32_t head) const { return value_scales == nullptr ? 1.0f : value_scales[head]; }

    // The KV head that query head `head` reads.
    __device__ uint32_t kv_head_of(uint32_t head) const { return (head + skipped) / group; }
    // The first query head that reads `kv_head`, and how many do: fewer than `group` where a rank's share begins or ends inside.
    __device__ uint32_t first_query_head(uint32_t kv_head) const {
        return kv_head == 0 ? 0 : kv_head * group - skipped;
    }
    __device__ uint32_t query_heads_of(uint32_t kv_head) const {
        const uint32_t end = (kv_head + 1) * group - skipped;
        return (end < query_heads ? end : query_heads) - first_query_head(kv_head);
    }
};

}  // namespace longhaul

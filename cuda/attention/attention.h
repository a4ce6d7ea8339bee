// What the attention kernels share.
#pragma once

#include "../common/kv.h"
#include "../common/rope.h"
#include "../common/step.h"

namespace longhaul {

struct AttentionParams {
    const StepHeader* step;
    const void* q;       // T [rows, q_stride], unrotated
    void* out;           // T [rows, out_stride]
    float* partials;     // decode: see attention_decode_mma.cu
    uint32_t* counters;  // decode: [decode sequences * kv_heads], zero before and after
    RopeParams rope;
    KvParams kv;
    uint32_t q_stride;
    uint32_t out_stride;
    uint32_t most_splits;  // decode: partial slots of a (sequence, KV head)
    uint32_t pairs;        // decode: (sequence, KV head) pairs that the partials have room for
};

// Rotations of one query: against keys of its own chunk, of the previous one, and of all before that.
inline constexpr uint32_t kVariants = 3;

}  // namespace longhaul

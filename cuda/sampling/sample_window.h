// Windows of the order from likely to unlikely, over ids of the whole vocabulary. Mirrored by
// crates/cuda/src/ops/sampling_slice.rs; what they are for is in crates/backend/src/slices.
#pragma once

#include "sample.h"

namespace longhaul {

inline constexpr uint32_t kParts = 256;
inline constexpr uint32_t kMostMembers = 512;
inline constexpr uint32_t kWindowThreads = 256;

// Places first..=last of a row; a place belongs to part (place - first) >> shift.
struct SampleWindow {
    uint64_t first, last;
    uint32_t row, shift;
};

struct SamplePart {
    uint64_t mass;
    uint32_t count;
    uint32_t reserved;
};

struct SampleMember {
    uint64_t place, mass;
    float logit;
    uint32_t reserved;
};

struct SampleWindowParams {
    SampleParams sample;  // `largest` is given
    const SampleWindow* windows;
    SamplePart* parts;      // [windows, kParts], zero before
    SampleMember* members;  // [windows, kMostMembers]
    uint32_t* counts;       // [windows], zero before
};

// Calls f(place, mass, index of the id in the slice) for every candidate of the block's chunk that lies in `window`, each by
// some thread.
template <class F>
__device__ __forceinline__ void each_in_window(const SampleParams& p, const SampleWindow& window, F f) {
    const SampleWeights weights{p.largest[window.row], p.rows[window.row].temperature};
    const uint32_t chunk = blockIdx.x, first = chunk * kChunk, count = p.vocab - first < kChunk ? p.vocab - first : kChunk;
    const float* scores = p.chunk(window.row, chunk);
    for (uint32_t at = 4 * threadIdx.x; at < count; at += 4 * kWindowThreads) {
        const float4 loaded = *reinterpret_cast<const float4*>(scores + at);
        const float value[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            if (at + i >= count) continue;
            const uint64_t place = order_place(order_key(value[i]), p.first_id + first + at + i);
            if (place < window.first || place > window.last) continue;
            f(place, weights.mass(weights.weight(value[i])), first + at + i);
        }
    }
}

}  // namespace longhaul

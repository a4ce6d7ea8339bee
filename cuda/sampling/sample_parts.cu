// Counts and masses of the parts of a window. One block a (chunk, window); sums of integers, so their order does not matter.
#include "sample_window.h"

namespace longhaul {
namespace {

__device__ __forceinline__ void parts(const SampleWindowParams& p) {
    PTX_SHARED_ARRAY(uint64_t, masses, kParts);
    PTX_SHARED_ARRAY(uint32_t, counts, kParts);
    const SampleWindow window = p.windows[blockIdx.y];
    for (uint32_t i = threadIdx.x; i < kParts; i += kWindowThreads) {
        masses[i] = 0;
        counts[i] = 0;
    }
    __syncthreads();
    each_in_window(p.sample, window, [&](uint64_t place, uint64_t mass, uint32_t) {
        const uint32_t part = static_cast<uint32_t>((place - window.first) >> window.shift);
        atomicAdd(counts + part, 1u);
        if (mass != 0) atomic_add(masses + part, mass);
    });
    __syncthreads();
    SamplePart* out = p.parts + static_cast<uint64_t>(blockIdx.y) * kParts;
    for (uint32_t i = threadIdx.x; i < kParts; i += kWindowThreads)
        if (counts[i] != 0) {
            atomicAdd(&out[i].count, counts[i]);
            if (masses[i] != 0) atomic_add(&out[i].mass, masses[i]);
        }
}

}  // namespace

LONGHAUL_KERNEL(sample_parts, SampleWindowParams, kWindowThreads, parts)

}  // namespace longhaul

// The candidates in a window, in any order. One block a (chunk, window); the host asks where there are few.
#include "sample_window.h"

namespace longhaul {
namespace {

__device__ __forceinline__ void members(const SampleWindowParams& p) {
    const SampleWindow window = p.windows[blockIdx.y];
    SampleMember* out = p.members + static_cast<uint64_t>(blockIdx.y) * kMostMembers;
    const float* logits = p.sample.logits + static_cast<uint64_t>(window.row) * p.sample.stride;
    each_in_window(p.sample, window, [&](uint64_t place, uint64_t mass, uint32_t index) {
        const uint32_t at = atomicAdd(p.counts + blockIdx.y, 1u);
        if (at < kMostMembers) out[at] = {place, mass, logits[index], 0};
    });
}

}  // namespace

LONGHAUL_KERNEL(sample_members, SampleWindowParams, kWindowThreads, members)

}  // namespace longhaul

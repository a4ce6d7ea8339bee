// From counts of groups of rows to how many slots of the same expert come before each, and the offsets of experts. One block,
// a thread an expert (route.h).
#include "route.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = kMostExperts;

__device__ __forceinline__ void scan(const RouteParams& p) {
    PTX_SHARED_ARRAY(uint32_t, sums, kMostExperts);
    const Routing& r = p.routing;
    const uint32_t groups = (r.rows + kRouteRows - 1) / kRouteRows, expert = threadIdx.x;
    uint32_t total = 0;
    if (expert < r.experts) {
        // Eight loads are in flight at a time; the sums wait for none of them.
        for (uint32_t base = 0; base < groups; base += 8) {
            uint32_t count[8];
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i)
                count[i] = base + i < groups ? p.counts[static_cast<uint64_t>(base + i) * r.experts + expert] : 0;
#pragma unroll
            for (uint32_t i = 0; i < 8; ++i) {
                if (base + i < groups) p.counts[static_cast<uint64_t>(base + i) * r.experts + expert] = total;
                total += count[i];
            }
        }
    }
    offset_experts(r, sums, [&](uint32_t) { return total; });
}

}  // namespace

LONGHAUL_KERNEL(moe_route_scan, RouteParams, kThreads, scan)

}  // namespace longhaul

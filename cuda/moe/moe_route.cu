// Routing of up to kRouteRows rows in one launch of one block (route.h).
#include "route.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 1024;

__device__ __forceinline__ void route(const RouteParams& p) {
    PTX_SHARED_ARRAY(uint32_t, counts, kMostExperts);
    PTX_SHARED_ARRAY(uint32_t, sums, kMostExperts);
    const Routing& r = p.routing;
    const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, slots = r.rows * r.top_k;
    for (uint32_t row = warp; row < r.rows; row += warps) choose_experts(p, row);
    __syncthreads();
    count_slots(r, 0, slots, [&](uint32_t expert, uint32_t count) { counts[expert] = count; });
    __syncthreads();
    offset_experts(r, sums, [&](uint32_t expert) { return counts[expert]; });
    place_slots(r, 0, slots, [&](uint32_t expert) { return r.offsets[expert]; });
}

}  // namespace

LONGHAUL_KERNEL(moe_route, RouteParams, kThreads, route)

}  // namespace longhaul

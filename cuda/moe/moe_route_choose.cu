// The experts of kRouteRows rows and how often each was chosen. One block a group of rows (route.h).
#include "route.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 256;

__device__ __forceinline__ void choose(const RouteParams& p) {
    const Routing& r = p.routing;
    const uint32_t first = blockIdx.x * kRouteRows, left = r.rows - first, rows = left < kRouteRows ? left : kRouteRows;
    for (uint32_t row = threadIdx.x / 32; row < rows; row += kThreads / 32) choose_experts(p, first + row);
    __syncthreads();
    uint32_t* counts = p.counts + static_cast<uint64_t>(blockIdx.x) * r.experts;
    count_slots(r, first * r.top_k, rows * r.top_k, [&](uint32_t expert, uint32_t count) { counts[expert] = count; });
}

}  // namespace

LONGHAUL_KERNEL(moe_route_choose, RouteParams, kThreads, choose)

}  // namespace longhaul

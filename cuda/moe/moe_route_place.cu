// The places of the slots of kRouteRows rows. One block a group of rows (route.h).
#include "route.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 256;

__device__ __forceinline__ void place(const RouteParams& p) {
    const Routing& r = p.routing;
    const uint32_t first = blockIdx.x * kRouteRows, left = r.rows - first, rows = left < kRouteRows ? left : kRouteRows;
    const uint32_t* before = p.counts + static_cast<uint64_t>(blockIdx.x) * r.experts;
    place_slots(r, first * r.top_k, rows * r.top_k, [&](uint32_t expert) { return r.offsets[expert] + before[expert]; });
}

}  // namespace

LONGHAUL_KERNEL(moe_route_place, RouteParams, kThreads, place)

}  // namespace longhaul

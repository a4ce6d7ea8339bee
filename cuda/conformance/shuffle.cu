// shfl.sync of the four kinds.
#include "../ptx/shuffle.h"
#include "conformance.h"

namespace conformance {

// One warp. a: a word a lane. out: four words a lane: from lane `count` * lane, up, down and across by `count`.
__device__ inline void shuffle(const Params& p) {
    const uint32_t lane = threadIdx.x, v = static_cast<const uint32_t*>(p.a)[lane];
    auto* out = static_cast<uint32_t*>(p.out) + 4 * lane;
    out[0] = ptx::shfl_idx(0xffffffffu, v, lane * p.count);
    out[1] = ptx::shfl_up(0xffffffffu, v, p.count);
    out[2] = ptx::shfl_down(0xffffffffu, v, p.count);
    out[3] = ptx::shfl_bfly(0xffffffffu, v, p.count);
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_shuffle, conformance::Params, 32, conformance::shuffle)

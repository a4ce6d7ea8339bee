// cp.async in all sizes, with zero fill, in groups.
#include "../ptx/cp_async.h"
#include "conformance.h"

namespace conformance {

// 32 threads; a: 416 words. out: the same words, of the last 128 only the first `count` bytes of each 16, then zeros.
__device__ inline void cp_async(const Params& p) {
    PTX_SHARED_ARRAY(uint32_t, words, 480);
    const auto* in = static_cast<const uint32_t*>(p.a);
    const uint32_t base = ptx::shared_address(words), t = threadIdx.x;
    ptx::cp_async_cg_16(base + t * 16, in + t * 4);
    ptx::cp_async_commit_group();
    ptx::cp_async_ca<16>(base + 512 + t * 16, in + 128 + t * 4);
    ptx::cp_async_ca<8>(base + 1024 + t * 8, in + 256 + t * 2);
    ptx::cp_async_ca<4>(base + 1280 + t * 4, in + 320 + t);
    ptx::cp_async_commit_group();
    ptx::cp_async_cg_16_zfill(base + 1408 + t * 16, in + 352 + t % 16 * 4, p.count);
    ptx::cp_async_wait_group<1>();
    ptx::cp_async_wait_all();
    __syncthreads();
    for (uint32_t i = t; i < 480; i += 32) static_cast<uint32_t*>(p.out)[i] = words[i];
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_cp_async, conformance::Params, 32, conformance::cp_async)

// mbarrier, cp.async.bulk in both directions, fence.proxy.async, named barriers.
#include "../ptx/bulk_copy.h"
#include "../ptx/named_barrier.h"
#include "../ptx/proxy_fence.h"
#include "conformance.h"

namespace conformance {

// 96 threads. A ring of two stages brings `count` tiles of 64 words of `a` to two warps, which add 1 and hand them to the
// copy engine for `out`. The first word of `b` receives whether a fresh barrier has completed parity 1 and not parity 0.
__device__ inline void bulk_copy(const Params& p) {
#if CONFORMANCE_SM_90
    PTX_SHARED_ARRAY(uint32_t, tiles, 2 * 64);
    PTX_SHARED_ARRAY(uint32_t, results, 64);
    PTX_SHARED_ARRAY(uint64_t, full, 2);
    PTX_SHARED_ARRAY(uint64_t, empty, 2);
    const uint32_t t = threadIdx.x;
    if (t == 0) {
        for (uint32_t s = 0; s < 2; ++s) {
            ptx::mbarrier_init(&full[s], 1);
            ptx::mbarrier_init(&empty[s], 64);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (t == 64) {
        for (uint32_t i = 0; i < p.count; ++i) {
            const uint32_t s = i % 2;
            ptx::mbarrier_wait_parity(&empty[s], (i / 2 & 1) ^ 1);
            if (i % 3 == 0) {
                ptx::mbarrier_expect_tx(&full[s], 256);
                ptx::mbarrier_arrive(&full[s]);
            } else {
                ptx::mbarrier_arrive_expect_tx(&full[s], 256);
            }
            ptx::cp_async_bulk_load(&tiles[s * 64], static_cast<const uint32_t*>(p.a) + i * 64, 256, &full[s]);
        }
    } else if (t < 64) {
        for (uint32_t i = 0; i < p.count; ++i) {
            const uint32_t s = i % 2;
            ptx::mbarrier_wait_parity(&full[s], i / 2 & 1);
            if (t == 0) ptx::cp_async_bulk_wait_group_read<0>();
            ptx::bar_sync(1, 64);
            results[t] = tiles[s * 64 + t] + 1;
            ptx::mbarrier_arrive(&empty[s]);
            ptx::fence_proxy_async_shared();
            ptx::bar_sync(1, 64);
            if (t == 0) {
                ptx::cp_async_bulk_store(static_cast<uint32_t*>(p.out) + i * 64, results, 256);
                ptx::cp_async_bulk_commit_group();
            }
        }
        if (t == 0) {
            ptx::cp_async_bulk_wait_group<0>();
            PTX_SHARED_ARRAY(uint64_t, fresh, 1);
            ptx::mbarrier_init(fresh, 1);
            const bool right = ptx::mbarrier_test_wait_parity(fresh, 1) && !ptx::mbarrier_test_wait_parity(fresh, 0);
            ptx::mbarrier_inval(fresh);
            *static_cast<uint32_t*>(const_cast<void*>(p.b)) = right ? 1 : 0;
        }
    }
#endif
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_bulk_copy, conformance::Params, 96, conformance::bulk_copy)

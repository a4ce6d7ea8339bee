// cp.async.bulk.tensor in both directions, 2 to 5 dimensions.
#include "../ptx/proxy_fence.h"
#include "../ptx/tensor_copy.h"
#include "conformance.h"

namespace conformance {

// Mirrored by crates/cuda/src/conformance.rs.
struct TensorParams {
    ptx::TensorMap map;
    void* raw;  // the box as it lies in shared memory
    int32_t at[5];
    uint32_t rank, bytes, mode;
    uint32_t reserved[6];
};

#if CONFORMANCE_SM_90
template <int Rank>
__device__ inline void load(const TensorParams& p, unsigned char* box, uint64_t* full) {
    int32_t at[Rank];
    for (int d = 0; d < Rank; ++d) at[d] = p.at[d];
    if (p.mode == 0) ptx::cp_async_bulk_tensor_load(box, &p.map, at, full);
    else ptx::cp_async_bulk_tensor_load(box, &p.map, at, full, ptx::createpolicy_evict_first());
}
template <int Rank>
__device__ inline void store(const TensorParams& p, const unsigned char* box) {
    int32_t at[Rank];
    for (int d = 0; d < Rank; ++d) at[d] = p.at[d];
    ptx::cp_async_bulk_tensor_store(&p.map, at, box);
}
#endif

// raw[bytes] = the box at `at`; mode 1: with a cache policy.
__device__ inline void tensor_load(const TensorParams& p) {
#if CONFORMANCE_SM_90
    auto* box = ptx::dynamic_shared<unsigned char>();
    PTX_SHARED_ARRAY(uint64_t, full, 1);
    if (threadIdx.x == 0) {
        ptx::prefetch_tensormap(&p.map);
        ptx::mbarrier_init(full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(full, p.bytes);
        if (p.rank == 2) load<2>(p, box, full);
        if (p.rank == 3) load<3>(p, box, full);
        if (p.rank == 4) load<4>(p, box, full);
        if (p.rank == 5) load<5>(p, box, full);
    }
    __syncthreads();
    ptx::mbarrier_wait_parity(full, 0);
    for (uint32_t i = threadIdx.x; i < p.bytes; i += blockDim.x) static_cast<unsigned char*>(p.raw)[i] = box[i];
#endif
}

// The box at `at` = raw[bytes].
__device__ inline void tensor_store(const TensorParams& p) {
#if CONFORMANCE_SM_90
    auto* box = ptx::dynamic_shared<unsigned char>();
    for (uint32_t i = threadIdx.x; i < p.bytes; i += blockDim.x) box[i] = static_cast<const unsigned char*>(p.raw)[i];
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (p.rank == 2) store<2>(p, box);
        if (p.rank == 3) store<3>(p, box);
        if (p.rank == 4) store<4>(p, box);
        if (p.rank == 5) store<5>(p, box);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group<0>();
    }
#endif
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_tensor_load, conformance::TensorParams, 128, conformance::tensor_load)
LONGHAUL_KERNEL(conformance_tensor_store, conformance::TensorParams, 128, conformance::tensor_store)

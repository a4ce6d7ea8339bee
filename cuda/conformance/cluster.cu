// Clusters of four blocks: rank, barrier, each other's shared memory, remote arrivals, multicast.
#include "../ptx/cluster.h"
#include "../ptx/tensor_copy.h"
#include "conformance.h"

namespace conformance {

// Mirrored by crates/cuda/src/conformance.rs.
struct ClusterParams {
    ptx::TensorMap map;  // u32 [2, 64], box [1, 64]
    void* out;
    uint32_t reserved[14];
};

// 64 threads. out: 256 words a block: own rank and size; the right neighbour's word of thread t, block * 1000 + t; what the
// left neighbour stored here; row 1 of the tensor, which block 0 of the cluster brings to all.
__device__ inline void cluster(const ClusterParams& p) {
#if CONFORMANCE_SM_90
    auto* row = ptx::dynamic_shared<uint32_t>();
    PTX_SHARED_ARRAY(uint32_t, own, 64);
    PTX_SHARED_ARRAY(uint4, stored, 16);
    PTX_SHARED_ARRAY(uint64_t, full, 1);
    PTX_SHARED_ARRAY(uint64_t, ready, 1);
    const uint32_t t = threadIdx.x, rank = ptx::cluster_rank(), size = ptx::cluster_size();
    if (t == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init(ready, size);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(full, 256);
    }
    own[t] = blockIdx.x * 1000 + t;
    ptx::cluster_barrier();
    if (t == 0) ptx::mbarrier_arrive_cluster(ptx::mapa(ptx::shared_address(ready), 0));
    if (t == 0 && rank == 0) {
        ptx::mbarrier_wait_parity(ready, 0);
        ptx::cp_async_bulk_tensor_load_multicast(row, &p.map, {0, 1}, full, static_cast<uint16_t>((1u << size) - 1));
    }
    const uint32_t right = (rank + 1) % size;
    const uint32_t there = ptx::mapa(ptx::shared_address(own), right), other = ptx::mapa(ptx::shared_address(stored), right);
    auto* out = static_cast<uint32_t*>(p.out) + blockIdx.x * 256;
    out[t] = t == 0 ? rank : size;
    out[64 + t] = ptx::ld_shared_cluster_u32(there + 4 * t);
    if (t < 8) {
        ptx::st_shared_cluster_v4(other + 16 * t, ptx::ld_shared_cluster_v4(there + 16 * t));
    } else if (t >= 32) {
        ptx::st_shared_cluster_u32(other + 4 * t, rank * 100 + t);
    }
    ptx::mbarrier_wait_parity(full, 0);
    out[192 + t] = row[t];
    ptx::cluster_barrier();
    out[128 + t] = reinterpret_cast<const uint32_t*>(&stored[0])[t];
#endif
}

}  // namespace conformance

LONGHAUL_KERNEL_CLUSTER(conformance_cluster, conformance::ClusterParams, 64, 4, conformance::cluster)

// Clusters: rank, barrier, and the shared memory of the cluster's other blocks.
//
// A shared::cluster address names a place in the shared memory of one block of the cluster; `mapa` makes it from the
// address of the same place in one's own block. That memory is there from the first cluster barrier until its block
// exits, so a kernel that reads or writes others' ends with a cluster barrier. PTX ISA, "barrier.cluster", "mapa" (sm_90).
#pragma once

#include "mbarrier.h"
#if !defined(__CUDACC__)
#include "../emulator/cluster.h"
#endif

namespace ptx {

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Rank of this block in its cluster, and the cluster's blocks.
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// Every thread of the cluster that has not exited arrives, then waits. Writes before are visible after.
__device__ __forceinline__ void cluster_barrier_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_barrier_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ uint32_t mapa(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}
__device__ __forceinline__ uint32_t ld_shared_cluster_u32(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint4 ld_shared_cluster_v4(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ void st_shared_cluster_u32(uint32_t address, uint32_t v) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void st_shared_cluster_v4(uint32_t address, uint4 v) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
// Arrives at the barrier of a shared::cluster address.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t address) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}
#endif

#else

namespace twin {

template <class T>
T cluster_load(uint32_t address, const char* instruction) {
    ::emulator::preemption_point();
    T value;
    std::memcpy(&value, ::emulator::cluster_pointer(address, sizeof(T), sizeof(T), instruction), sizeof(T));
    return value;
}

template <class T>
void cluster_store(uint32_t address, T value, const char* instruction) {
    std::memcpy(::emulator::cluster_pointer(address, sizeof(T), sizeof(T), instruction), &value, sizeof(T));
    ::emulator::preemption_point();
}

}  // namespace twin

inline uint32_t cluster_rank() { return twin::block().rank; }
inline uint32_t cluster_size() { return static_cast<uint32_t>(twin::block().cluster->blocks.size()); }
inline void cluster_barrier_arrive() { ::emulator::cluster_arrive("barrier.cluster.arrive"); }
inline void cluster_barrier_wait() { ::emulator::cluster_wait("barrier.cluster.wait"); }
inline uint32_t mapa(uint32_t address, uint32_t rank) { return ::emulator::map_to_cluster(address, rank); }
inline uint32_t ld_shared_cluster_u32(uint32_t address) { return twin::cluster_load<uint32_t>(address, "ld.shared::cluster"); }
inline uint4 ld_shared_cluster_v4(uint32_t address) { return twin::cluster_load<uint4>(address, "ld.shared::cluster.v4"); }
inline void st_shared_cluster_u32(uint32_t address, uint32_t v) { twin::cluster_store(address, v, "st.shared::cluster"); }
inline void st_shared_cluster_v4(uint32_t address, uint4 v) { twin::cluster_store(address, v, "st.shared::cluster.v4"); }
inline void mbarrier_arrive_cluster(uint32_t address) {
    const auto place = ::emulator::cluster_place(address, "mbarrier.arrive.cluster");
    ::emulator::mbarrier_update(*place.block, place.address, 1, 0, 0, "mbarrier.arrive.cluster");
    ::emulator::preemption_point();
}

#endif

// Both halves of the barrier.
__device__ __forceinline__ void cluster_barrier() {
#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cluster_barrier_arrive();
    cluster_barrier_wait();
#endif
}

}  // namespace ptx

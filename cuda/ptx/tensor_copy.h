// cp.async.bulk.tensor: copies of boxes of a tensor of 2 to 5 dimensions between global and shared memory.
//
// A tensor map describes the tensor in global memory, the box and its swizzle in shared memory; the host encodes it. It is
// passed in the kernel's parameter block, of which kernels take the address: a local copy does not do. Coordinates count
// elements, innermost dimension first, of the box's first element; what lies outside the tensor is zero when loaded (its
// bytes count for the mbarrier) and left out when stored. The place in shared memory is aligned to 128 bytes, with swizzle
// best to 8 of its lines. One thread issues a copy; what bulk_copy.h says about barriers, proxies and groups holds here.
// PTX ISA, "Data Movement: cp.async.bulk.tensor" (sm_90).
#pragma once

#include "bulk_copy.h"
#include "load_store.h"
#if !defined(__CUDACC__)
#include "../emulator/tensor_map.h"
#endif

namespace ptx {

// The driver's encoding of a tensor map, opaque to kernels. A parameter block that holds one is aligned likewise.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Fetches the map ahead of its first use.
__device__ __forceinline__ void prefetch_tensormap(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

template <int Rank>
__device__ __forceinline__ void cp_async_bulk_tensor_load(void* destination, const TensorMap* map, const int32_t (&at)[Rank],
                                                          uint64_t* barrier) {
    static_assert(Rank >= 2 && Rank <= 5);
    const uint32_t to = shared_address(destination), on = shared_address(barrier);
    if constexpr (Rank == 2)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1])
                     : "memory");
    if constexpr (Rank == 3)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2])
                     : "memory");
    if constexpr (Rank == 4)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                     : "memory");
    if constexpr (Rank == 5)
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
                     : "memory");
}

// With an L2 policy of createpolicy (load_store.h).
template <int Rank>
__device__ __forceinline__ void cp_async_bulk_tensor_load(void* destination, const TensorMap* map, const int32_t (&at)[Rank],
                                                          uint64_t* barrier, uint64_t policy) {
    static_assert(Rank >= 2 && Rank <= 5);
    const uint32_t to = shared_address(destination), on = shared_address(barrier);
    if constexpr (Rank == 2)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                     "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "l"(policy)
                     : "memory");
    if constexpr (Rank == 3)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                     "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2]), "l"(policy)
                     : "memory");
    if constexpr (Rank == 4)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                     "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "l"(policy)
                     : "memory");
    if constexpr (Rank == 5)
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                     "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "l"(policy)
                     : "memory");
}

// To the same place in every block of the cluster whose rank is in the mask `blocks`, reporting to the barrier at the same
// place there.
template <int Rank>
__device__ __forceinline__ void cp_async_bulk_tensor_load_multicast(void* destination, const TensorMap* map,
                                                                    const int32_t (&at)[Rank], uint64_t* barrier,
                                                                    uint16_t blocks) {
    static_assert(Rank >= 2 && Rank <= 5);
    const uint32_t to = shared_address(destination), on = shared_address(barrier);
    if constexpr (Rank == 2)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "h"(blocks)
                     : "memory");
    if constexpr (Rank == 3)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2]), "h"(blocks)
                     : "memory");
    if constexpr (Rank == 4)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "h"(blocks)
                     : "memory");
    if constexpr (Rank == 5)
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to), "l"(map), "r"(on), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "h"(blocks)
                     : "memory");
}

template <int Rank>
__device__ __forceinline__ void cp_async_bulk_tensor_store(const TensorMap* map, const int32_t (&at)[Rank],
                                                           const void* source) {
    static_assert(Rank >= 2 && Rank <= 5);
    const uint32_t from = shared_address(source);
    if constexpr (Rank == 2)
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                     "r"(from), "r"(at[0]), "r"(at[1])
                     : "memory");
    if constexpr (Rank == 3)
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                     "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2])
                     : "memory");
    if constexpr (Rank == 4)
        asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                     "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                     : "memory");
    if constexpr (Rank == 5)
        asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                     "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
                     : "memory");
}
#endif

#else

inline void prefetch_tensormap(const TensorMap* map) { ::emulator::TensorMapView(map->words, "prefetch.tensormap"); }

template <int Rank>
void cp_async_bulk_tensor_load(void* destination, const TensorMap* map, const int32_t (&at)[Rank], uint64_t* barrier) {
    static_assert(Rank >= 2 && Rank <= 5);
    ::emulator::load_box(map->words, at, Rank, shared_address(destination), shared_address(barrier), std::nullopt);
}
template <int Rank>
void cp_async_bulk_tensor_load(void* destination, const TensorMap* map, const int32_t (&at)[Rank], uint64_t* barrier,
                               uint64_t policy) {
    twin::check_policy(policy, "cp.async.bulk.tensor");
    cp_async_bulk_tensor_load(destination, map, at, barrier);
}
template <int Rank>
void cp_async_bulk_tensor_load_multicast(void* destination, const TensorMap* map, const int32_t (&at)[Rank], uint64_t* barrier,
                                         uint16_t blocks) {
    static_assert(Rank >= 2 && Rank <= 5);
    ::emulator::load_box(map->words, at, Rank, shared_address(destination), shared_address(barrier), blocks);
}
template <int Rank>
void cp_async_bulk_tensor_store(const TensorMap* map, const int32_t (&at)[Rank], const void* source) {
    static_assert(Rank >= 2 && Rank <= 5);
    ::emulator::store_box(map->words, at, Rank, shared_address(source));
}

#endif

}  // namespace ptx

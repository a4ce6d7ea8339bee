// cp.async.bulk: one-dimensional bulk copies by the copy engine. Loads report to an mbarrier, stores complete in groups
// per thread.
//
// Addresses and size are multiples of 16 bytes. One thread issues the copy: a load after it has made the barrier expect
// the bytes, a store after the writers of the source have executed fence_proxy_async_shared and met at a barrier. The
// source of a store may be overwritten, and the block may end, after a wait for the group's reads; the destination may be
// relied upon after a wait for the group. PTX ISA, "Data Movement: cp.async.bulk" (sm_90).
#pragma once

#include "mbarrier.h"
#if !defined(__CUDACC__)
#include "../emulator/bulk_store.h"
#endif

namespace ptx {

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cp_async_bulk_load(void* destination, const void* source, uint32_t bytes,
                                                   uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(destination)),
                 "l"(source), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void cp_async_bulk_store(void* destination, const void* source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination),
                 "r"(shared_address(source)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most the `Pending` newest groups of this thread are unfinished.
template <int Pending>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}
// Waits until at most the `Pending` newest groups of this thread still read their sources.
template <int Pending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
#endif

#else

inline void cp_async_bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
    const char* name = "cp.async.bulk";
    if (bytes == 0 || bytes % 16 != 0)
        ::emulator::raise(::emulator::FaultKind::InvalidArgument,
                          "cp.async.bulk: " + std::to_string(bytes) + " bytes are not a positive multiple of 16");
    const uint32_t to = shared_address(destination);
    ::emulator::shared_pointer(to, bytes, 16, name);
    ::emulator::check_global(source, bytes, 16, ::emulator::Access::Read, name);
    auto& block = twin::block();
    // Until the barrier's phase completes, the destination is undefined.
    block.shared->write_async(to, nullptr, bytes);
    const uint32_t barrier_address = shared_address(barrier);
    ::emulator::start_async([=, &block] {
        block.shared->write_async(to, source, bytes);
        ::emulator::mbarrier_update(block, barrier_address, 0, 0, bytes, name);
    });
    ::emulator::preemption_point();
}
inline void cp_async_bulk_store(void* destination, const void* source, uint32_t bytes) {
    const char* name = "cp.async.bulk.global";
    if (bytes == 0 || bytes % 16 != 0)
        ::emulator::raise(::emulator::FaultKind::InvalidArgument,
                          "cp.async.bulk.global: " + std::to_string(bytes) + " bytes are not a positive multiple of 16");
    const uint32_t from = shared_address(source);
    ::emulator::shared_pointer(from, bytes, 16, name);
    ::emulator::check_global(destination, bytes, 16, ::emulator::Access::Write, name);
    auto& block = twin::block();
    ::emulator::BulkStore store;
    store.read = [=, &block] {
        const auto* view = block.shared->resolve_async(from, bytes);
        return std::vector<unsigned char>(view, view + bytes);
    };
    store.write = [=](const std::vector<unsigned char>& data) { std::memcpy(destination, data.data(), data.size()); };
    ::emulator::issue_bulk_store(std::move(store));
}
inline void cp_async_bulk_commit_group() { ::emulator::commit_bulk_stores(); }
template <int Pending>
void cp_async_bulk_wait_group() {
    static_assert(Pending >= 0);
    ::emulator::wait_bulk_stores(Pending, false);
    ::emulator::preemption_point();
}
template <int Pending>
void cp_async_bulk_wait_group_read() {
    static_assert(Pending >= 0);
    ::emulator::wait_bulk_stores(Pending, true);
    ::emulator::preemption_point();
}

#endif

}  // namespace ptx

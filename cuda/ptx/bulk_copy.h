// cp.async.bulk: one-dimensional bulk copies by the copy engine, global to shared memory, reported to an mbarrier.
//
// Addresses and size are multiples of 16 bytes. One thread issues the copy, after it has made the barrier expect the
// bytes. PTX ISA, "Data Movement: cp.async.bulk" (sm_90).
#pragma once

#include "mbarrier.h"

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
#endif

#else

inline void cp_async_bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
    const char* name = "cp.async.bulk";
    if (bytes == 0 || bytes % 16 != 0)
        ::emulator::raise(::emulator::FaultKind::InvalidArgument,
                          "cp.async.bulk: " + std::to_string(bytes) + " bytes are not a positive multiple of 16");
    unsigned char* to = ::emulator::shared_pointer(shared_address(destination), bytes, 16, name);
    ::emulator::check_global(source, bytes, 16, ::emulator::Access::Read, name);
    // Until the barrier's phase completes, the destination is undefined.
    std::memset(to, ::emulator::kPoisonByte, bytes);
    auto& block = twin::block();
    const uint32_t barrier_address = shared_address(barrier);
    ::emulator::start_async([=, &block] {
        std::memcpy(to, source, bytes);
        ::emulator::mbarrier_update(block, barrier_address, 0, 0, bytes, name);
    });
    ::emulator::preemption_point();
}

#endif

}  // namespace ptx

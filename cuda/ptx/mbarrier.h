// mbarrier: barriers in shared memory that count arrivals and bytes of asynchronous copies, phase by phase.
//
// A barrier starts in phase 0. Waiting for parity P returns once the phase of parity P has completed, so a fresh
// barrier satisfies a wait for parity 1 at once. After initialisation: fence_mbarrier_init, then a block barrier,
// before other threads or copies use it. PTX ISA, "mbarrier" (sm_90).
#pragma once

#include "spin_bound.h"
#include "target.h"
#if !defined(__CUDACC__)
#include "../emulator/mbarrier_state.h"
#endif

namespace ptx {

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_inval(uint64_t* barrier) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Adds `bytes` to what the phase expects, then arrives.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Adds `bytes` to what the phase expects, without an arrival.
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Whether the phase of this parity has completed; does not wait.
__device__ __forceinline__ bool mbarrier_test_wait_parity(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}
// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
    const uint32_t address = shared_address(barrier);
    SpinBound bound;
    uint32_t done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(done)
            : "r"(address), "r"(parity)
            : "memory");
        if (done == 0) bound.failed();
    } while (done == 0);
}
#endif

#else

namespace twin {

inline ::emulator::Block& block() { return *::emulator::this_thread().block; }

}  // namespace twin

inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
    ::emulator::mbarrier_initialise(twin::block(), shared_address(barrier), count);
}
inline void mbarrier_inval(uint64_t* barrier) {
    ::emulator::mbarrier_invalidate_state(twin::block(), shared_address(barrier));
}
inline void fence_mbarrier_init() { ::emulator::preemption_point(); }
inline void mbarrier_arrive(uint64_t* barrier) {
    ::emulator::mbarrier_update(twin::block(), shared_address(barrier), 1, 0, 0, "mbarrier.arrive");
    ::emulator::preemption_point();
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    ::emulator::mbarrier_update(twin::block(), shared_address(barrier), 1, bytes, 0, "mbarrier.arrive.expect_tx");
    ::emulator::preemption_point();
}
inline void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
    ::emulator::mbarrier_update(twin::block(), shared_address(barrier), 0, bytes, 0, "mbarrier.expect_tx");
}
inline bool mbarrier_test_wait_parity(uint64_t* barrier, uint32_t parity) {
    const uint32_t address = shared_address(barrier);
    const char* name = "mbarrier.test_wait";
    if (::emulator::mbarrier_completed(twin::block(), address, parity, name)) return true;
    ::emulator::poll({::emulator::Wait::Kind::MemoryBarrier, address, parity, name, {}});
    return ::emulator::mbarrier_completed(twin::block(), address, parity, name);
}
inline void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
    const uint32_t address = shared_address(barrier);
    auto& block = twin::block();
    while (!::emulator::mbarrier_completed(block, address, parity, "mbarrier.try_wait")) {
        block.mbarrier_waiters[address].push_back(&::emulator::this_thread());
        ::emulator::wait_for({::emulator::Wait::Kind::MemoryBarrier, address, parity, "mbarrier.try_wait", {}});
    }
    ::emulator::preemption_point();
}

#endif

}  // namespace ptx

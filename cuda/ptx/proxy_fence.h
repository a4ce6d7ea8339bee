// fence.proxy.async: orders ordinary accesses to memory before accesses of the asynchronous proxy.
//
// wgmma operands and the sources of bulk stores are read through the asynchronous proxy: who wrote them with ordinary
// stores (also stmatrix, cp.async) executes this fence before the barrier after which they are read. Data that bulk loads
// brought needs none. PTX ISA, "membar, fence: Proxies" (sm_90).
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// For shared memory of this block.
__device__ __forceinline__ void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// For global memory: before bulk loads of what this thread stored.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
#endif

#else

inline void fence_proxy_async_shared() {
    ::emulator::this_thread().block->shared->publish();
    ::emulator::preemption_point();
}
// Global memory has one view here.
inline void fence_proxy_async_global() { ::emulator::preemption_point(); }

#endif

}  // namespace ptx

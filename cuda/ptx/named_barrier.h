// Named barriers of a block: bar.sync and bar.arrive on barriers 1 to 15 (0 is __syncthreads).
//
// `threads` counts all participants, waiting and arriving, in multiples of 32. PTX ISA, "bar, barrier".
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

__device__ __forceinline__ void bar_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

inline void bar_sync(uint32_t id, uint32_t threads,
                     const std::source_location where = std::source_location::current()) {
    ::emulator::block_barrier(id, threads, true, "bar.sync", where);
}
inline void bar_arrive(uint32_t id, uint32_t threads,
                       const std::source_location where = std::source_location::current()) {
    ::emulator::block_barrier(id, threads, false, "bar.arrive", where);
}

#endif

}  // namespace ptx

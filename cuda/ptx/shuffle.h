// shfl.sync on 32-bit registers over the whole warp. PTX ISA, "Data Movement: shfl.sync".
//
// The last operand of the instruction holds the clamp lane (31, or 0 for `up`) and the segment mask (0: one segment).
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t shfl_idx(uint32_t mask, uint32_t v, uint32_t lane) {
    uint32_t out;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, %3;" : "=r"(out) : "r"(v), "r"(lane), "r"(mask));
    return out;
}
__device__ __forceinline__ uint32_t shfl_up(uint32_t mask, uint32_t v, uint32_t delta) {
    uint32_t out;
    asm volatile("shfl.sync.up.b32 %0, %1, %2, 0x0, %3;" : "=r"(out) : "r"(v), "r"(delta), "r"(mask));
    return out;
}
__device__ __forceinline__ uint32_t shfl_down(uint32_t mask, uint32_t v, uint32_t delta) {
    uint32_t out;
    asm volatile("shfl.sync.down.b32 %0, %1, %2, 0x1f, %3;" : "=r"(out) : "r"(v), "r"(delta), "r"(mask));
    return out;
}
__device__ __forceinline__ uint32_t shfl_bfly(uint32_t mask, uint32_t v, uint32_t lane_mask) {
    uint32_t out;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, %3;" : "=r"(out) : "r"(v), "r"(lane_mask), "r"(mask));
    return out;
}

#else

inline uint32_t shfl_idx(uint32_t mask, uint32_t v, uint32_t lane) { return __shfl_sync(mask, v, static_cast<int>(lane)); }
inline uint32_t shfl_up(uint32_t mask, uint32_t v, uint32_t delta) { return __shfl_up_sync(mask, v, delta); }
inline uint32_t shfl_down(uint32_t mask, uint32_t v, uint32_t delta) { return __shfl_down_sync(mask, v, delta); }
inline uint32_t shfl_bfly(uint32_t mask, uint32_t v, uint32_t lane_mask) {
    return __shfl_xor_sync(mask, v, static_cast<int>(lane_mask));
}

#endif

}  // namespace ptx

// cvt: pairs of f32 to packed bf16 and e4m3, rounding to nearest even. PTX ISA, "cvt" (bf16x2: sm_80, e4m3x2: sm_89).
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

// `low` goes to the lower half.
__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// Saturates to the largest finite value, 448; NaN stays NaN. `low` goes to the lower byte.
__device__ __forceinline__ uint16_t cvt_e4m3x2(float low, float high) {
    uint16_t out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
    return out;
}
#endif

#else

inline uint32_t cvt_bf16x2(float low, float high) {
    return ::emulator::float_to_bf16(low) | static_cast<uint32_t>(::emulator::float_to_bf16(high)) << 16;
}
inline uint16_t cvt_e4m3x2(float low, float high) {
    return static_cast<uint16_t>(::emulator::float_to_e4m3(low) | ::emulator::float_to_e4m3(high) << 8);
}

#endif

}  // namespace ptx

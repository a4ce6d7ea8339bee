// cvt: pairs of f32 to packed bf16, f16 and e4m3, rounding to nearest even, and e4m3 to f16, exactly.
// PTX ISA, "cvt" (bf16x2, f16x2: sm_80; e4m3x2: sm_89).
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
__device__ __forceinline__ uint32_t cvt_f16x2(float low, float high) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// Saturates to the largest finite value, 448; NaN stays NaN. `low` goes to the lower byte.
__device__ __forceinline__ uint16_t cvt_e4m3x2(float low, float high) {
    uint16_t out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
    return out;
}
// Two e4m3 to two f16, the lower byte to the lower half; every e4m3 is an f16.
__device__ __forceinline__ uint32_t cvt_f16x2_e4m3x2(uint16_t v) {
    uint32_t out;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(v));
    return out;
}
#endif

#else

inline uint32_t cvt_bf16x2(float low, float high) {
    return ::emulator::float_to_bf16(low) | static_cast<uint32_t>(::emulator::float_to_bf16(high)) << 16;
}
inline uint32_t cvt_f16x2(float low, float high) {
    return ::emulator::float_to_half(low) | static_cast<uint32_t>(::emulator::float_to_half(high)) << 16;
}
inline uint16_t cvt_e4m3x2(float low, float high) {
    return static_cast<uint16_t>(::emulator::float_to_e4m3(low) | ::emulator::float_to_e4m3(high) << 8);
}
inline uint32_t cvt_f16x2_e4m3x2(uint16_t v) {
    return cvt_f16x2(::emulator::e4m3_to_float(static_cast<uint8_t>(v)), ::emulator::e4m3_to_float(static_cast<uint8_t>(v >> 8)));
}

#endif

}  // namespace ptx

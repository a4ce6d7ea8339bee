// ex2.approx: 2^x on the special function unit. PTX ISA, "Floating Point Instructions: ex2".
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

// Within 2 units in the last place; results below 2^-126 are 0, 2^-inf is 0.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

#else

inline float ex2_approx_ftz(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

#endif

}  // namespace ptx

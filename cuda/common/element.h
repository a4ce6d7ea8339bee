// Element types of activations, weights and the KV cache, widened to f32 for arithmetic and rounded to nearest even.
#pragma once

#include "../ptx/convert.h"

namespace longhaul {

using Bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bf16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float value) {
    return __float2bfloat16(value);
}

}  // namespace longhaul

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

// Eight neighbours as floats, moved in 16-byte units. The address is a multiple of 16.
__device__ __forceinline__ void load_eight(const float* source, float (&values)[8]) {
    const float4 low = reinterpret_cast<const float4*>(source)[0], high = reinterpret_cast<const float4*>(source)[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}
__device__ __forceinline__ void load_eight(const Bf16* source, float (&values)[8]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(source);
    const ptx::uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = __uint_as_float(pairs[i] << 16);
        values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void store_eight(float* destination, const float (&values)[8]) {
    reinterpret_cast<float4*>(destination)[0] = make_float4(values[0], values[1], values[2], values[3]);
    reinterpret_cast<float4*>(destination)[1] = make_float4(values[4], values[5], values[6], values[7]);
}
__device__ __forceinline__ void store_eight(Bf16* destination, const float (&values)[8]) {
    *reinterpret_cast<uint4*>(destination) =
        make_uint4(ptx::cvt_bf16x2(values[0], values[1]), ptx::cvt_bf16x2(values[2], values[3]),
                   ptx::cvt_bf16x2(values[4], values[5]), ptx::cvt_bf16x2(values[6], values[7]));
}

}  // namespace longhaul

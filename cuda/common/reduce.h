// Sums and maxima over a warp and over a block, in an order that depends on the shape only.
#pragma once

#include "../ptx/shuffle.h"

namespace longhaul {

inline constexpr uint32_t kFullWarp = 0xffffffffu;

// Butterfly: every lane ends with the same bits.
template <class Operation>
__device__ __forceinline__ float warp_reduce(float value, Operation operation) {
#pragma unroll
    for (uint32_t distance = 16; distance > 0; distance >>= 1)
        value = operation(value, __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(value), distance)));
    return value;
}

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// Reduction over a block of whole warps (at most 1024 threads); every thread gets the result. `scratch` is 32 floats of
// shared memory, free again after the call's last barrier.
template <class Operation>
__device__ __forceinline__ float block_reduce(float value, float* scratch, float identity, Operation operation) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    value = warp_reduce(value, operation);
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    value = warp_reduce(lane < warps ? scratch[lane] : identity, operation);
    __syncthreads();
    return value;
}

}  // namespace longhaul

// The gated activation of an MLP: out = silu(gate) * up, for rows of n gate and n up values.
#include "../common/element.h"
#include "../common/kernel.h"

namespace longhaul {
namespace {

using ptx::uint32_t;
using ptx::uint64_t;

struct SiluAndMulParams {
    const void* gate_up;  // T [rows, in_stride]: gate in columns 0..n, up in n..2n
    void* out;            // T [rows, out_stride]
    uint32_t n;
    uint32_t in_stride;
    uint32_t out_stride;
    uint32_t reserved;
};

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// Eight columns a thread; one by one where the up half does not start at a multiple of eight.
template <class T>
__device__ __forceinline__ void silu_and_mul(const SiluAndMulParams& p) {
    const uint32_t column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (column >= p.n) return;
    const T* gates = static_cast<const T*>(p.gate_up) + static_cast<uint64_t>(blockIdx.x) * p.in_stride + column;
    const T* ups = gates + p.n;
    T* out = static_cast<T*>(p.out) + static_cast<uint64_t>(blockIdx.x) * p.out_stride + column;
    if (p.n % 8 == 0) {
        float gate[8], up[8];
        load_eight(gates, gate);
        load_eight(ups, up);
#pragma unroll
        for (int i = 0; i < 8; ++i) up[i] = gated(gate[i], up[i]);
        store_eight(out, up);
        return;
    }
    for (uint32_t i = 0; i < 8 && column + i < p.n; ++i)
        out[i] = from_float<T>(gated(to_float(gates[i]), to_float(ups[i])));
}

}  // namespace

LONGHAUL_KERNEL(silu_and_mul_bf16, SiluAndMulParams, 128, silu_and_mul<Bf16>)
LONGHAUL_KERNEL(silu_and_mul_f32, SiluAndMulParams, 128, silu_and_mul<float>)

}  // namespace longhaul

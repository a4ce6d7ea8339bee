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

template <class T>
__device__ __forceinline__ void silu_and_mul(const SiluAndMulParams& p) {
    const uint32_t column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= p.n) return;
    const T* in = static_cast<const T*>(p.gate_up) + static_cast<uint64_t>(blockIdx.x) * p.in_stride;
    const float gate = to_float(in[column]), up = to_float(in[p.n + column]);
    static_cast<T*>(p.out)[static_cast<uint64_t>(blockIdx.x) * p.out_stride + column] =
        from_float<T>(gate / (1.0f + expf(-gate)) * up);
}

}  // namespace

LONGHAUL_KERNEL(silu_and_mul_bf16, SiluAndMulParams, 256, silu_and_mul<Bf16>)
LONGHAUL_KERNEL(silu_and_mul_f32, SiluAndMulParams, 256, silu_and_mul<float>)

}  // namespace longhaul

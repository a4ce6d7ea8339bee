// The plain product: out[row, n] = sum over k of x[row, k] * weight[n, k], plus bias. One warp an output element.
//
// Each lane sums every 32nd product in order, then a butterfly adds the lanes: the order depends on k only.
#include "../common/element.h"
#include "../common/kernel.h"
#include "../common/reduce.h"

namespace longhaul {
namespace {

using ptx::uint32_t;
using ptx::uint64_t;

struct GemmParams {
    const void* x;       // T [rows, x_stride]
    const void* weight;  // T [n, weight_stride]
    const float* bias;   // [n], or null
    void* out;           // O [rows, out_stride]
    uint32_t rows;
    uint32_t n;
    uint32_t k;
    uint32_t x_stride;
    uint32_t weight_stride;
    uint32_t out_stride;
};

constexpr uint32_t kWarps = 8;

template <class T, class O>
__device__ __forceinline__ void gemm_plain(const GemmParams& p) {
    const uint32_t lane = threadIdx.x % 32, n = blockIdx.x * kWarps + threadIdx.x / 32, row = blockIdx.y;
    if (n >= p.n) return;
    const T* x = static_cast<const T*>(p.x) + static_cast<uint64_t>(row) * p.x_stride;
    const T* weight = static_cast<const T*>(p.weight) + static_cast<uint64_t>(n) * p.weight_stride;
    float sum = 0.0f;
    for (uint32_t k = lane; k < p.k; k += 32) sum += to_float(x[k]) * to_float(weight[k]);
    sum = warp_reduce(sum, Sum{});
    if (lane == 0)
        static_cast<O*>(p.out)[static_cast<uint64_t>(row) * p.out_stride + n] =
            from_float<O>(sum + (p.bias == nullptr ? 0.0f : p.bias[n]));
}

}  // namespace

LONGHAUL_KERNEL(gemm_plain_bf16, GemmParams, 32 * kWarps, gemm_plain<Bf16, Bf16>)
LONGHAUL_KERNEL(gemm_plain_bf16_f32, GemmParams, 32 * kWarps, gemm_plain<Bf16, float>)
LONGHAUL_KERNEL(gemm_plain_f32, GemmParams, 32 * kWarps, gemm_plain<float, float>)

}  // namespace longhaul

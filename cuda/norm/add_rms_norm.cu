// Residual add and RMSNorm: residual += x, out = residual / rms(residual) * weight.
//
// One block a row; the residual stream is f32. Sums are f32 in a fixed order. Source: Zhang and Sennrich, arXiv 1910.07467.
#include "../common/element.h"
#include "../common/kernel.h"
#include "../common/reduce.h"

namespace longhaul {
namespace {

struct AddRmsNormParams {
    const void* x;            // X [rows, x_stride]
    const float* residual;    // [rows, residual_stride], or null: there is none yet
    const float* weight;      // [cols]
    void* out;                // O [rows, out_stride]
    float* residual_out;      // [rows, residual_stride]; may be `residual`
    ptx::uint32_t cols;
    ptx::uint32_t x_stride;
    ptx::uint32_t residual_stride;
    ptx::uint32_t out_stride;
    float eps;
    ptx::uint32_t reserved;
};

constexpr unsigned kThreads = 256;

template <class X, class O>
__device__ __forceinline__ void add_rms_norm(const AddRmsNormParams& p) {
    PTX_SHARED_ARRAY(float, scratch, 32);
    const ptx::uint64_t row = blockIdx.x;
    const X* x = static_cast<const X*>(p.x) + row * p.x_stride;
    const float* residual = p.residual == nullptr ? nullptr : p.residual + row * p.residual_stride;
    float* sum_out = p.residual_out + row * p.residual_stride;
    float squares = 0.0f;
    for (unsigned i = threadIdx.x; i < p.cols; i += blockDim.x) {
        const float sum = to_float(x[i]) + (residual == nullptr ? 0.0f : residual[i]);
        sum_out[i] = sum;
        squares += sum * sum;
    }
    squares = block_reduce(squares, scratch, 0.0f, Sum{});
    const float factor = rsqrtf(squares / static_cast<float>(p.cols) + p.eps);
    O* out = static_cast<O*>(p.out) + row * p.out_stride;
    for (unsigned i = threadIdx.x; i < p.cols; i += blockDim.x)
        out[i] = from_float<O>(sum_out[i] * factor * p.weight[i]);
}

}  // namespace

LONGHAUL_KERNEL(add_rms_norm_bf16_bf16, AddRmsNormParams, kThreads, add_rms_norm<Bf16, Bf16>)
LONGHAUL_KERNEL(add_rms_norm_f32_bf16, AddRmsNormParams, kThreads, add_rms_norm<float, Bf16>)
LONGHAUL_KERNEL(add_rms_norm_f32_f32, AddRmsNormParams, kThreads, add_rms_norm<float, float>)

}  // namespace longhaul

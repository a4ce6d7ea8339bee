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
constexpr unsigned kGroups = 4;  // groups of eight values that a thread keeps: rows of up to 8192 are read once

template <class X, class O>
struct NormRow {
    const X* x;
    const float* residual;
    const float* weight;
    O* out;
    float* sum_out;
    unsigned cols;

    // Adds the residual to eight columns from `at`, stores the sum and returns it; columns beyond the row are 0.
    __device__ __forceinline__ void add(unsigned at, float (&sum)[8]) const {
        if (at + 8 <= cols) {
            load_eight(x + at, sum);
            if (residual != nullptr) {
                float before[8];
                load_eight(residual + at, before);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i] += before[i];
            }
            store_eight(sum_out + at, sum);
            return;
        }
#pragma unroll
        for (unsigned i = 0; i < 8; ++i) {
            sum[i] = 0.0f;
            if (at + i >= cols) continue;
            sum[i] = to_float(x[at + i]) + (residual == nullptr ? 0.0f : residual[at + i]);
            sum_out[at + i] = sum[i];
        }
    }
    __device__ __forceinline__ void normalise(unsigned at, const float (&sum)[8], float factor) const {
        float result[8];
        if (at + 8 <= cols) {
            load_eight(weight + at, result);
#pragma unroll
            for (int i = 0; i < 8; ++i) result[i] = sum[i] * factor * result[i];
            store_eight(out + at, result);
            return;
        }
#pragma unroll
        for (unsigned i = 0; i < 8; ++i)
            if (at + i < cols) out[at + i] = from_float<O>(sum[i] * factor * weight[at + i]);
    }
};

__device__ __forceinline__ float sum_of_squares(const float (&values)[8]) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += values[i] * values[i];
    return squares;
}

template <class X, class O>
__device__ __forceinline__ void add_rms_norm(const AddRmsNormParams& p) {
    PTX_SHARED_ARRAY(float, scratch, 32);
    const ptx::uint64_t index = blockIdx.x;
    const NormRow<X, O> row{static_cast<const X*>(p.x) + index * p.x_stride,
                            p.residual == nullptr ? nullptr : p.residual + index * p.residual_stride,
                            p.weight,
                            static_cast<O*>(p.out) + index * p.out_stride,
                            p.residual_out + index * p.residual_stride,
                            p.cols};
    const unsigned step = 8 * blockDim.x, first = 8 * threadIdx.x;
    float kept[kGroups][8], squares = 0.0f;
#pragma unroll
    for (unsigned group = 0; group < kGroups; ++group)
        if (first + group * step < p.cols) {
            row.add(first + group * step, kept[group]);
            squares += sum_of_squares(kept[group]);
        }
    for (unsigned at = first + kGroups * step; at < p.cols; at += step) {
        float sum[8];
        row.add(at, sum);
        squares += sum_of_squares(sum);
    }
    squares = block_reduce(squares, scratch, 0.0f, Sum{});
    const float factor = rsqrtf(squares / static_cast<float>(p.cols) + p.eps);
#pragma unroll
    for (unsigned group = 0; group < kGroups; ++group)
        if (first + group * step < p.cols) row.normalise(first + group * step, kept[group], factor);
    // Wider rows: this thread reads again what it has written.
    for (unsigned at = first + kGroups * step; at < p.cols; at += step) {
        float sum[8];
#pragma unroll
        for (unsigned i = 0; i < 8; ++i) sum[i] = at + i < p.cols ? row.sum_out[at + i] : 0.0f;
        row.normalise(at, sum, factor);
    }
}

}  // namespace

LONGHAUL_KERNEL(add_rms_norm_bf16_bf16, AddRmsNormParams, kThreads, add_rms_norm<Bf16, Bf16>)
LONGHAUL_KERNEL(add_rms_norm_f32_bf16, AddRmsNormParams, kThreads, add_rms_norm<float, Bf16>)
LONGHAUL_KERNEL(add_rms_norm_f32_f32, AddRmsNormParams, kThreads, add_rms_norm<float, float>)

}  // namespace longhaul

// All-reduce, residual add and RMSNorm in one: residual += sum over ranks of x, out = residual / rms(residual) * weight.
//
// A row is one piece of a one-shot all-reduce, by one block. The sum is rounded to x's element before it is added, so the
// residual has the bits it has after an all-reduce and a norm of their own.
#include "../common/kernel.h"
#include "../common/reduce.h"
#include "peer_exchange.h"

namespace longhaul {
namespace {

struct AllReduceAddRmsNormParams {
    PeerParams peers;
    const void* x;          // T [rows, x_stride], the ranks of the launch one after the other, as all below but the weight
    const float* residual;  // [rows, residual_stride], or null: there is none yet
    const float* weight;    // [cols]
    void* out;              // O [rows, out_stride]
    float* residual_out;    // [rows, residual_stride]; may be `residual`
    uint32_t rows;          // of a rank
    uint32_t cols;
    uint32_t x_stride;      // at most a slice
    uint32_t residual_stride;
    float eps;
    uint32_t out_stride;
};

constexpr unsigned kThreads = 512;

template <class T, class O>
__device__ __forceinline__ void all_reduce_add_rms_norm(const AllReduceAddRmsNormParams& p) {
    PTX_SHARED_ARRAY(uint32_t, gave_up, 4);
    PTX_SHARED_ARRAY(float, scratch, 32);
    constexpr uint32_t kElements = Pack<T>::kElements;
    PeerExchange exchange(p.peers, gave_up);
    const uint32_t units = p.x_stride / kElements;
    for (uint32_t row_of_rank = blockIdx.x; row_of_rank < p.rows; row_of_rank += gridDim.x) {
        const ptx::uint64_t row = static_cast<ptx::uint64_t>(blockIdx.y) * p.rows + row_of_rank;
        const uint4* x = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + row * p.x_stride);
        uint4* outgoing = exchange.outgoing();
        for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x)
            ptx::st_global_cg_v4(outgoing + unit, ptx::ld_global_cs_v4(x + unit));
        exchange.exchange();
        const float* residual = p.residual == nullptr ? nullptr : p.residual + row * p.residual_stride;
        float* sum_out = p.residual_out + row * p.residual_stride;
        float squares = 0.0f;
        for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
            const Pack<T> sum = sum_incoming<T>(exchange, p.peers.ranks, unit);
#pragma unroll
            for (uint32_t i = 0; i < kElements; ++i) {
                const uint32_t col = unit * kElements + i;
                if (col >= p.cols) continue;
                const float value =
                    to_float(from_float<T>(sum.values[i])) + (residual == nullptr ? 0.0f : residual[col]);
                sum_out[col] = value;
                squares += value * value;
            }
        }
        squares = block_reduce(squares, scratch, 0.0f, Sum{});
        const float factor = rsqrtf(squares / static_cast<float>(p.cols) + p.eps);
        O* out = static_cast<O*>(p.out) + row * p.out_stride;
        // A thread reads what it has written itself.
        for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x)
#pragma unroll
            for (uint32_t i = 0; i < kElements; ++i) {
                const uint32_t col = unit * kElements + i;
                if (col < p.cols) out[col] = from_float<O>(sum_out[col] * factor * p.weight[col]);
            }
    }
    if (blockIdx.x < p.rows) exchange.finish();
}

}  // namespace

LONGHAUL_KERNEL(all_reduce_add_rms_norm_bf16_bf16, AllReduceAddRmsNormParams, kThreads,
                all_reduce_add_rms_norm<Bf16, Bf16>)
LONGHAUL_KERNEL(all_reduce_add_rms_norm_f32_bf16, AllReduceAddRmsNormParams, kThreads,
                all_reduce_add_rms_norm<float, Bf16>)
LONGHAUL_KERNEL(all_reduce_add_rms_norm_f32_f32, AllReduceAddRmsNormParams, kThreads,
                all_reduce_add_rms_norm<float, float>)

}  // namespace longhaul

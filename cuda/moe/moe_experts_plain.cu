// The experts' products, plainly: one warp an output element of one place.
//
// gate_up: out[place, i] = silu(x[row] . gate[e, i]) * (x[row] . up[e, i]) with the row gathered; down: out[place, h] =
// x[place] . down[e, h]. Each lane sums every 32nd product, then a butterfly adds the lanes.
#include "../common/element.h"
#include "../common/kernel.h"
#include "../common/reduce.h"
#include "moe.h"

namespace longhaul {
namespace {

struct ExpertsParams {
    const void* x;       // T [rows or places, x_stride]
    const void* weight;  // T [experts, weight_rows, weight_stride]
    void* out;           // T or f32 [places, out_stride]
    Routing routing;
    uint32_t n;          // columns of the result
    uint32_t k;
    uint32_t x_stride;
    uint32_t weight_stride;
    uint32_t out_stride;
    uint32_t reserved;
};

constexpr uint32_t kWarps = 8;

template <class T>
__device__ __forceinline__ float dot(const T* x, const T* weight, uint32_t k) {
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x % 32; i < k; i += 32) sum += to_float(x[i]) * to_float(weight[i]);
    return warp_reduce(sum, Sum{});
}

template <class T>
__device__ __forceinline__ void gate_up_plain(const ExpertsParams& p) {
    const uint32_t place = blockIdx.x, n = blockIdx.y * kWarps + threadIdx.x / 32;
    if (n >= p.n || place >= p.routing.offsets[p.routing.experts]) return;
    const uint32_t slot = p.routing.permuted_slot[place], expert = p.routing.slot_expert[slot];
    const T* x = static_cast<const T*>(p.x) + static_cast<uint64_t>(slot / p.routing.top_k) * p.x_stride;
    const T* gate = static_cast<const T*>(p.weight) + (static_cast<uint64_t>(expert) * 2 * p.n + n) * p.weight_stride;
    const float g = to_float(from_float<T>(dot(x, gate, p.k)));
    const float u = to_float(from_float<T>(dot(x, gate + static_cast<uint64_t>(p.n) * p.weight_stride, p.k)));
    if (threadIdx.x % 32 == 0)
        static_cast<T*>(p.out)[static_cast<uint64_t>(place) * p.out_stride + n] = from_float<T>(g / (1.0f + expf(-g)) * u);
}

template <class T>
__device__ __forceinline__ void down_plain(const ExpertsParams& p) {
    const uint32_t place = blockIdx.x, n = blockIdx.y * kWarps + threadIdx.x / 32;
    if (n >= p.n || place >= p.routing.offsets[p.routing.experts]) return;
    const uint32_t expert = p.routing.slot_expert[p.routing.permuted_slot[place]];
    const T* x = static_cast<const T*>(p.x) + static_cast<uint64_t>(place) * p.x_stride;
    const T* weight = static_cast<const T*>(p.weight) + (static_cast<uint64_t>(expert) * p.n + n) * p.weight_stride;
    const float sum = dot(x, weight, p.k);
    if (threadIdx.x % 32 == 0) static_cast<float*>(p.out)[static_cast<uint64_t>(place) * p.out_stride + n] = sum;
}

}  // namespace

LONGHAUL_KERNEL(moe_gate_up_plain_bf16, ExpertsParams, 32 * kWarps, gate_up_plain<Bf16>)
LONGHAUL_KERNEL(moe_gate_up_plain_f32, ExpertsParams, 32 * kWarps, gate_up_plain<float>)
LONGHAUL_KERNEL(moe_down_plain_bf16, ExpertsParams, 32 * kWarps, down_plain<Bf16>)
LONGHAUL_KERNEL(moe_down_plain_f32, ExpertsParams, 32 * kWarps, down_plain<float>)

}  // namespace longhaul

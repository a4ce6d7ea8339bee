// Weighted sum of a row's experts on this rank in slot order, plus the shared expert times the sigmoid of its gate.
#include "../common/element.h"
#include "../common/kernel.h"
#include "moe.h"

namespace longhaul {
namespace {

struct CombineParams {
    const float* expert_out;   // [places, expert_stride]
    const float* shared_out;   // [rows, out_stride], or null
    const float* shared_gate;  // [rows, gate_stride]: its first column
    float* out;                // [rows, out_stride]
    Routing routing;
    uint32_t cols;
    uint32_t expert_stride;
    uint32_t gate_stride;
    uint32_t out_stride;
};

// Eight columns a thread; the last ones of a row one by one.
__device__ __forceinline__ void combine(const CombineParams& p) {
    const uint32_t row = blockIdx.x, column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (column >= p.cols) return;
    const bool whole = column + 8 <= p.cols;
    const uint32_t count = whole ? 8 : p.cols - column;
    float sum[8] = {};
    for (uint32_t choice = 0; choice < p.routing.top_k; ++choice) {
        const uint32_t slot = row * p.routing.top_k + choice;
        const uint32_t place = p.routing.slot_place[slot];
        if (place == kNowhere) continue;
        const float weight = p.routing.slot_weight[slot];
        const float* out = p.expert_out + static_cast<uint64_t>(place) * p.expert_stride + column;
        float value[8];
        if (whole) load_eight(out, value);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            if (!whole) value[i] = i < count ? out[i] : 0.0f;
            sum[i] += weight * value[i];
        }
    }
    const uint64_t at = static_cast<uint64_t>(row) * p.out_stride + column;
    if (p.shared_out != nullptr) {
        const float gate = 1.0f / (1.0f + expf(-p.shared_gate[static_cast<uint64_t>(row) * p.gate_stride]));
        const float* shared = p.shared_out + at;
        float value[8];
        if (whole) load_eight(shared, value);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            if (!whole) value[i] = i < count ? shared[i] : 0.0f;
            sum[i] += gate * value[i];
        }
    }
    float* out = p.out + at;
    if (whole) {
        store_eight(out, sum);
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i)
        if (i < count) out[i] = sum[i];
}

}  // namespace

LONGHAUL_KERNEL(moe_combine, CombineParams, 128, combine)

}  // namespace longhaul

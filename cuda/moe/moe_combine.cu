// Weighted sum of a row's experts in slot order, plus the shared expert times the sigmoid of its gate.
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

__device__ __forceinline__ void combine(const CombineParams& p) {
    const uint32_t row = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    float sum = 0.0f;
    for (uint32_t choice = 0; choice < p.routing.top_k; ++choice) {
        const uint32_t slot = row * p.routing.top_k + choice;
        const uint64_t place = p.routing.slot_place[slot];
        sum += p.routing.slot_weight[slot] * p.expert_out[place * p.expert_stride + column];
    }
    const uint64_t at = static_cast<uint64_t>(row) * p.out_stride + column;
    if (p.shared_out != nullptr) {
        const float gate = 1.0f / (1.0f + expf(-p.shared_gate[static_cast<uint64_t>(row) * p.gate_stride]));
        sum += gate * p.shared_out[at];
    }
    p.out[at] = sum;
}

}  // namespace

LONGHAUL_KERNEL(moe_combine, CombineParams, 256, combine)

}  // namespace longhaul

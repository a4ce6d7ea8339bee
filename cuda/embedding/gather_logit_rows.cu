// Gathers the rows whose logits are wanted: out[i] = x[logit_row(i)], in 16-byte units. One block a row.
#include "../common/kernel.h"
#include "../common/step.h"

namespace longhaul {
namespace {

struct GatherParams {
    const StepHeader* step;
    const uint4* x;      // [rows, row_units]
    uint4* out;          // [logit_rows, row_units]
    uint32_t row_units;  // 16-byte units of a row
    uint32_t reserved;
};

__device__ __forceinline__ void gather(const GatherParams& p) {
    const uint32_t row = blockIdx.x;
    if (row >= p.step->logit_rows) return;
    uint4* out = p.out + static_cast<uint64_t>(row) * p.row_units;
    const uint4* source = p.x + static_cast<uint64_t>(p.step->logit_row(row)) * p.row_units;
    for (uint32_t i = threadIdx.x; i < p.row_units; i += blockDim.x) out[i] = source[i];
}

}  // namespace

LONGHAUL_KERNEL(gather_logit_rows, GatherParams, 128, gather)

}  // namespace longhaul

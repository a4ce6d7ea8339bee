// Embedding gather: out[row] = table[id(row)], in 16-byte units.
//
// One block a row. An id outside the table (only possible if the host did not check) gives NaN, which the sampler reports.
#include "../common/kernel.h"
#include "../common/step.h"

namespace longhaul {
namespace {

struct EmbedParams {
    const StepHeader* step;
    const uint4* table;  // [table_rows, row_units]
    uint4* out;          // [rows, row_units]
    uint32_t table_rows;
    uint32_t row_units;  // 16-byte units of a row
};

__device__ __forceinline__ void embed(const EmbedParams& p) {
    const uint32_t row = blockIdx.x;
    if (row >= p.step->rows) return;
    const uint32_t id = p.step->id(row);
    uint4* out = p.out + static_cast<uint64_t>(row) * p.row_units;
    const uint4* source = p.table + static_cast<uint64_t>(id) * p.row_units;
    const uint32_t nan = 0xffffffffu;
    for (uint32_t i = threadIdx.x; i < p.row_units; i += blockDim.x)
        out[i] = id < p.table_rows ? source[i] : make_uint4(nan, nan, nan, nan);
}

}  // namespace

LONGHAUL_KERNEL(embed_gather, EmbedParams, 128, embed)

}  // namespace longhaul

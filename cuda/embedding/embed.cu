// Embedding gather: out[row] = table[id(row) - first_id], in 16-byte units; zeros for ids of rows that other ranks hold.
//
// One block a row. An id outside the vocabulary (only possible if the host did not check) gives NaN, which the sampler reports.
#include "../common/kernel.h"
#include "../common/step.h"

namespace longhaul {
namespace {

struct EmbedParams {
    const StepHeader* step;
    const uint4* table;  // [table_rows, row_units]: ids from first_id on
    uint4* out;          // [rows, row_units]
    uint32_t table_rows;
    uint32_t row_units;  // 16-byte units of a row
    uint32_t first_id;
    uint32_t vocab_size;
};

__device__ __forceinline__ void embed(const EmbedParams& p) {
    const uint32_t row = blockIdx.x;
    if (row >= p.step->rows) return;
    const uint32_t id = p.step->id(row), local = id - p.first_id;
    uint4* out = p.out + static_cast<uint64_t>(row) * p.row_units;
    const uint4* source = p.table + static_cast<uint64_t>(local) * p.row_units;
    const uint32_t other = id < p.vocab_size ? 0 : 0xffffffffu;  // NaN
    for (uint32_t i = threadIdx.x; i < p.row_units; i += blockDim.x)
        out[i] = local < p.table_rows ? source[i] : make_uint4(other, other, other, other);
}

}  // namespace

LONGHAUL_KERNEL(embed_gather, EmbedParams, 128, embed)

}  // namespace longhaul

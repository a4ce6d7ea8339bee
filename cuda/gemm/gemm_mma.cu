// Dense products of many rows with mma.sync: out = x * weightᵀ + bias, one block a tile of 128 x 128 (wide_tile.h).
//
// Blocks go through 8 tiles of rows for each tile of columns, so that those in flight together share operands in L2. Each
// result is one sum over k in order: it does not depend on the other rows.
#include "../common/kernel.h"
#include "wide_tile.h"

namespace longhaul {
namespace {

using namespace wide;

struct GemmParams {
    const Bf16* x;       // [rows, x_stride]
    const Bf16* weight;  // [n, weight_stride]
    const float* bias;   // [n], or null
    void* out;           // O [rows, out_stride]
    uint32_t rows;
    uint32_t n;
    uint32_t k;
    uint32_t x_stride;
    uint32_t weight_stride;
    uint32_t out_stride;
};

constexpr uint32_t kRaster = 8;  // row tiles that go together

template <class O>
__device__ __forceinline__ void gemm_mma(const GemmParams& p) {
    const uint32_t row_tiles = (p.rows + kTile - 1) / kTile, column_tiles = (p.n + kTile - 1) / kTile;
    const uint32_t first_tile = blockIdx.x / (kRaster * column_tiles) * kRaster;
    const uint32_t together = row_tiles - first_tile < kRaster ? row_tiles - first_tile : kRaster;
    const uint32_t within = blockIdx.x % (kRaster * column_tiles);
    const uint32_t first_row = (first_tile + within % together) * kTile, first_column = within / together * kTile;

    const uint32_t row = threadIdx.x / 4, chunk = threadIdx.x % 4 * kChunk;
    Source source;
    source.x_mask = source.weight_mask = 0;
#pragma unroll
    for (uint32_t i = 0; i < kCopies; ++i) {
        const uint32_t x_row = first_row + row + i * kRowsAtOnce, column = first_column + row + i * kRowsAtOnce;
        source.x[i] = p.x + static_cast<uint64_t>(x_row) * p.x_stride + chunk;
        source.weight[i] = p.weight + static_cast<uint64_t>(column) * p.weight_stride + chunk;
        source.x_mask |= (x_row < p.rows ? 1u : 0u) << i;
        source.weight_mask |= (column < p.n ? 1u : 0u) << i;
    }
    Sums sums;
    product(source, p.k, ptx::shared_address(ptx::dynamic_shared<unsigned char>()), sums);
    const auto bias = [&](uint32_t column) { return p.bias != nullptr && column < p.n ? p.bias[column] : 0.0f; };
    for_each(sums, [&](uint32_t local, uint32_t column, const float* low, const float* high) {
        if (first_row + local >= p.rows) return;
        O* out = static_cast<O*>(p.out) + static_cast<uint64_t>(first_row + local) * p.out_stride;
        column += first_column;
        put(out, column, p.n, low[0] + bias(column), low[1] + bias(column + 1));
        column += kHalf;
        put(out, column, p.n, high[0] + bias(column), high[1] + bias(column + 1));
    });
}

}  // namespace

LONGHAUL_KERNEL(gemm_mma_bf16, GemmParams, kThreads, gemm_mma<Bf16>)
LONGHAUL_KERNEL(gemm_mma_f32, GemmParams, kThreads, gemm_mma<float>)

}  // namespace longhaul

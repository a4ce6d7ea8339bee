// ldmatrix and stmatrix: one warp moves four 8x8 matrices of 16-bit elements.
#include "../ptx/matrix_move.h"
#include "conformance.h"

namespace conformance {

// a: 256 elements, matrix after matrix. out: 13 registers a lane: x4, x4.trans, x1, x2, x2.trans.
__device__ inline void ldmatrix(const Params& p) {
    PTX_SHARED_ARRAY(uint16_t, tile, 256);
    const uint32_t t = threadIdx.x;
    for (uint32_t i = t; i < 256; i += 32) tile[i] = static_cast<const uint16_t*>(p.a)[i];
    __syncthreads();
    const uint32_t row = ptx::shared_address(tile) + t * 16;
    uint32_t x4[4], x4_trans[4], x1[1], x2[2], x2_trans[2];
    ptx::ldmatrix_x4(x4, row);
    ptx::ldmatrix_x4_trans(x4_trans, row);
    ptx::ldmatrix_x1(x1, row);
    ptx::ldmatrix_x2(x2, row);
    ptx::ldmatrix_x2_trans(x2_trans, row);
    auto* out = static_cast<uint32_t*>(p.out) + t * 13;
    for (uint32_t i = 0; i < 4; ++i) {
        out[i] = x4[i];
        out[4 + i] = x4_trans[i];
    }
    out[8] = x1[0];
    for (uint32_t i = 0; i < 2; ++i) {
        out[9 + i] = x2[i];
        out[11 + i] = x2_trans[i];
    }
}

// a: 4 registers a lane. out: the 256 elements in shared memory after stmatrix.x4, and after stmatrix.x4.trans.
__device__ inline void stmatrix(const Params& p) {
#if CONFORMANCE_SM_90
    PTX_SHARED_ARRAY(uint16_t, tile, 512);
    const uint32_t t = threadIdx.x;
    uint32_t r[4];
    for (uint32_t i = 0; i < 4; ++i) r[i] = static_cast<const uint32_t*>(p.a)[t * 4 + i];
    const uint32_t row = ptx::shared_address(tile) + t * 16;
    ptx::stmatrix_x4(row, r);
    ptx::stmatrix_x4_trans(row + 512, r);
    __syncthreads();
    for (uint32_t i = t; i < 512; i += 32) static_cast<uint16_t*>(p.out)[i] = tile[i];
#endif
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_ldmatrix, conformance::Params, 32, conformance::ldmatrix)
LONGHAUL_KERNEL(conformance_stmatrix, conformance::Params, 32, conformance::stmatrix)

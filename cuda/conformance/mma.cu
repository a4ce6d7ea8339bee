// mma.sync: one warp, D[16, 8] = A[16, K] * B[8, K]ᵀ with D starting at 0.
#include "../ptx/mma.h"
#include "conformance.h"

namespace conformance {

// mode 0: bf16, 1: f16, 2: e4m3 (sm_89). A row holds 32 bytes; a fragment register is 4 bytes of it.
__device__ inline void mma(const Params& p) {
    const uint32_t group = threadIdx.x / 4, member = threadIdx.x % 4;
    const auto* a = static_cast<const uint32_t*>(p.a);
    const auto* b = static_cast<const uint32_t*>(p.b);
    const uint32_t fa[4] = {a[group * 8 + member], a[(group + 8) * 8 + member], a[group * 8 + member + 4],
                            a[(group + 8) * 8 + member + 4]};
    const uint32_t fb[2] = {b[group * 8 + member], b[group * 8 + member + 4]};
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (p.mode == 0) ptx::mma_m16n8k16_bf16(d, fa, fb);
    if (p.mode == 1) ptx::mma_m16n8k16_f16(d, fa, fb);
#if CONFORMANCE_SM_89
    if (p.mode == 2) ptx::mma_m16n8k32_e4m3(d, fa, fb);
#endif
    auto* out = static_cast<float*>(p.out);
    for (uint32_t i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = d[i];
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_mma, conformance::Params, 32, conformance::mma)

// cvt of pairs.
#include "../ptx/convert.h"
#include "conformance.h"

namespace conformance {

// a: `count` pairs of f32. out: four words a pair: bf16x2, f16x2, and on sm_89 e4m3x2 and that widened to f16x2.
__device__ inline void convert(const Params& p) {
    const auto* in = static_cast<const float*>(p.a);
    for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) {
        const float low = in[2 * i], high = in[2 * i + 1];
        auto* out = static_cast<uint32_t*>(p.out) + 4 * i;
        out[0] = ptx::cvt_bf16x2(low, high);
        out[1] = ptx::cvt_f16x2(low, high);
#if CONFORMANCE_SM_89
        const uint16_t packed = ptx::cvt_e4m3x2(low, high);
        out[2] = packed;
        out[3] = ptx::cvt_f16x2_e4m3x2(packed);
#endif
    }
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_convert, conformance::Params, 128, conformance::convert)

// wgmma of bf16 for every N.
#include "wgmma.h"

#if !CONFORMANCE_SM_90
namespace conformance {
struct Bf16 {};
}  // namespace conformance
#endif

#define CONFORMANCE_WGMMA(n) \
    LONGHAUL_KERNEL(conformance_wgmma_bf16_n##n, conformance::Params, 128, conformance::wgmma<conformance::Bf16, n>)
CONFORMANCE_WGMMA(8)
CONFORMANCE_WGMMA(16)
CONFORMANCE_WGMMA(32)
CONFORMANCE_WGMMA(64)
CONFORMANCE_WGMMA(96)
CONFORMANCE_WGMMA(128)
CONFORMANCE_WGMMA(192)
CONFORMANCE_WGMMA(256)

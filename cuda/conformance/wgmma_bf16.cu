// wgmma of bf16 for every N.
#include "wgmma.h"

#if !CONFORMANCE_SM_90
namespace conformance {
struct Bf16 {};
}  // namespace conformance
#endif

LONGHAUL_KERNEL(conformance_wgmma_bf16_n8, conformance::Params, 128, conformance::wgmma<conformance::Bf16, 8>)
LONGHAUL_KERNEL(conformance_wgmma_bf16_n16, conformance::Params, 128, conformance::wgmma<conformance::Bf16, 16>)
LONGHAUL_KERNEL(conformance_wgmma_bf16_n32, conformance::Params, 128, conformance::wgmma<conformance::Bf16, 32>)
LONGHAUL_KERNEL(conformance_wgmma_bf16_n64, conformance::Params, 128, conformance::wgmma<conformance::Bf16, 64>)
LONGHAUL_KERNEL(conformance_wgmma_bf16_n96, conformance::Params, 128, conformance::wgmma<conformance::Bf16, 96>)
LONGHAUL_KERNEL(conformance_wgmma_bf16_n128, conformance::Params, 128, conformance::wgmma<conformance::Bf16, 128>)
LONGHAUL_KERNEL(conformance_wgmma_bf16_n192, conformance::Params, 128, conformance::wgmma<conformance::Bf16, 192>)
LONGHAUL_KERNEL(conformance_wgmma_bf16_n256, conformance::Params, 128, conformance::wgmma<conformance::Bf16, 256>)

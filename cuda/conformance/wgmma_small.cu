// wgmma of f16 and of e4m3.
#include "wgmma.h"

#if !CONFORMANCE_SM_90
namespace conformance {
struct F16 {};
struct E4m3 {};
}  // namespace conformance
#endif

LONGHAUL_KERNEL(conformance_wgmma_f16_n64, conformance::Params, 128, conformance::wgmma<conformance::F16, 64>)
LONGHAUL_KERNEL(conformance_wgmma_e4m3_n64, conformance::Params, 128, conformance::wgmma<conformance::E4m3, 64>)

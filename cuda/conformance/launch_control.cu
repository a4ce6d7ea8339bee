// griddepcontrol and setmaxnreg: they change nothing in what a kernel computes.
#include "../ptx/launch_control.h"
#include "../ptx/register_budget.h"
#include "conformance.h"

namespace conformance {

// out[i] = a[i] + 1; launched several times in a row on its own output.
__device__ inline void griddepcontrol(const Params& p) {
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.count) static_cast<uint32_t*>(p.out)[i] = static_cast<const uint32_t*>(p.a)[i] + 1;
}

// 384 threads: a warpgroup gives up registers, two take them. out: word t is a[t] times 1 + its warpgroup.
__device__ inline void setmaxnreg(const Params& p) {
#if CONFORMANCE_SM_90
    const uint32_t t = threadIdx.x;
    if (t < 128) {
        ptx::setmaxnreg_dec<24>();
        static_cast<uint32_t*>(p.out)[t] = static_cast<const uint32_t*>(p.a)[t];
    } else {
        ptx::setmaxnreg_inc<240>();
        static_cast<uint32_t*>(p.out)[t] = static_cast<const uint32_t*>(p.a)[t] * (1 + t / 128);
    }
#endif
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_griddepcontrol, conformance::Params, 128, conformance::griddepcontrol)
LONGHAUL_KERNEL_ALONE(conformance_setmaxnreg, conformance::Params, 384, conformance::setmaxnreg)

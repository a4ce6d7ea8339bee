// setmaxnreg: moves registers between the warpgroups of a block.
//
// All warps of a warpgroup execute it, at one place. `dec` releases registers, `inc` waits until there are enough: what
// all warpgroups hold together is at most 64 Ki registers. The kernel needs launch bounds. PTX ISA, "setmaxnreg" (sm_90a).
#pragma once

#include "target.h"
#if !defined(__CUDACC__)
#include "../emulator/register_budget.h"
#endif

namespace ptx {

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <int Registers>
__device__ __forceinline__ void setmaxnreg_inc() {
    static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void setmaxnreg_dec() {
    static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
#endif

#else

template <int Registers>
void setmaxnreg_inc() {
    static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
    ::emulator::set_register_budget(Registers, true);
}
template <int Registers>
void setmaxnreg_dec() {
    static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
    ::emulator::set_register_budget(Registers, false);
}

#endif

}  // namespace ptx

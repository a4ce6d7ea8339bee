// griddepcontrol: programmatic dependent launch.
//
// A grid launched with programmatic stream serialisation may start while the grid before it still runs: it waits before it
// touches what that grid writes, or writes what that grid reads. Every block that lets dependents start must also wait
// itself at some point, since a dependent waits for this grid only, not for the ones before. Without such a launch both
// instructions do nothing. PTX ISA, "griddepcontrol" (sm_90).
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

// Waits until the grids before have finished and their writes are visible. Nothing below sm_90, which launches no grid early.
__device__ __forceinline__ void griddepcontrol_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Dependents may start once every block has executed this or exited.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#else

// Grids run one after the other here; only the rule above is checked, when a block ends.
inline void griddepcontrol_wait() {
    ::emulator::this_thread().block->waited_for_grids = true;
    ::emulator::preemption_point();
}
inline void griddepcontrol_launch_dependents() {
    ::emulator::this_thread().block->launched_dependents = true;
    ::emulator::preemption_point();
}

#endif

}  // namespace ptx

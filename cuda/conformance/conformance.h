// What the conformance kernels share. Each runs the wrappers of one group of PTX instructions on data of the host, which
// compares the results with plain arithmetic (crates/cuda/tests/conformance.rs): on the emulator and on GPUs. They are built
// with the feature `conformance` only. A kernel whose instructions a target lacks is empty there.
#pragma once

#include "../common/kernel.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CONFORMANCE_SM_90 0
#else
#define CONFORMANCE_SM_90 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
#define CONFORMANCE_SM_89 0
#else
#define CONFORMANCE_SM_89 1
#endif

namespace conformance {

using ptx::uint16_t;
using ptx::uint32_t;
using ptx::uint64_t;
using ptx::uint8_t;

// Mirrored by crates/cuda/src/conformance.rs. What the members mean is each kernel's own.
struct Params {
    const void* a;
    const void* b;
    void* out;
    uint32_t mode, count;
};

}  // namespace conformance

// How a kernel source exports an entry point to the driver.
//
// A kernel takes one parameter block by value, a plain struct of 4-byte and 8-byte members without padding, mirrored by
// a `#[repr(C)]` struct in crates/cuda/src/ops. With nvcc the entry point is an extern "C" __global__ function; with
// g++ it registers itself under its name with the emulator.
#pragma once

#include "../ptx/target.h"
#if !defined(__CUDACC__)
#include "../emulator/registry.h"
#endif

// Defines entry point `name`, launched with at most `max_threads` threads a block, that calls `function(params)`.
#if defined(__CUDACC__)
#define LONGHAUL_KERNEL(name, Params, max_threads, ...)                                                      \
    extern "C" __global__ void __launch_bounds__(max_threads) name(const __grid_constant__ Params params) {  \
        __VA_ARGS__(params);                                                                                 \
    }
#else
#define LONGHAUL_KERNEL(name, Params, max_threads, ...)                                              \
    static const ::emulator::KernelRegistration name##_registration(                                 \
        #name, sizeof(Params), max_threads,                                                          \
        [](const void* params) { __VA_ARGS__(*static_cast<const Params*>(params)); });
#endif

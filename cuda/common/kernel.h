// How a kernel source exports an entry point to the driver.
//
// A kernel takes one parameter block by value, a plain struct of 4-byte and 8-byte members and tensor maps without padding,
// mirrored by a `#[repr(C)]` struct in crates/cuda/src/ops. With nvcc the entry point is an extern "C" __global__ function; with
// g++ it registers itself under its name with the emulator.
#pragma once

#include "../ptx/target.h"
#if !defined(__CUDACC__)
#include "../emulator/registry.h"
#endif

// LONGHAUL_KERNEL(name, Params, max_threads, function) defines entry point `name`, launched with at most `max_threads`
// threads a block, that calls `function(params)`. LONGHAUL_KERNEL_CLUSTER(name, Params, max_threads, cluster_x, function) is
// the same with clusters of `cluster_x` blocks along x, of which the grid is a multiple (sm_90; single blocks below).
// LONGHAUL_KERNEL_ALONE is for kernels that move registers between warpgroups (setmaxnreg): it has a multiprocessor to
// itself, from which ptxas knows the registers it starts with.
#if defined(__CUDACC__)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LONGHAUL_CLUSTER(x) __cluster_dims__(x, 1, 1)
#else
#define LONGHAUL_CLUSTER(x)
#endif
#define LONGHAUL_KERNEL_CLUSTER(name, Params, max_threads, cluster_x, ...)                                    \
    extern "C" __global__ void LONGHAUL_CLUSTER(cluster_x) __launch_bounds__(max_threads, 1)                 \
        name(const __grid_constant__ Params params) {                                                        \
        __VA_ARGS__(params);                                                                                 \
    }
#define LONGHAUL_KERNEL_ALONE(name, Params, max_threads, ...)                                                \
    extern "C" __global__ void __launch_bounds__(max_threads, 1) name(const __grid_constant__ Params params) { \
        __VA_ARGS__(params);                                                                                 \
    }
#define LONGHAUL_KERNEL(name, Params, max_threads, ...)                                                      \
    extern "C" __global__ void __launch_bounds__(max_threads) name(const __grid_constant__ Params params) {  \
        __VA_ARGS__(params);                                                                                 \
    }
#else
#define LONGHAUL_KERNEL(name, Params, max_threads, ...) LONGHAUL_KERNEL_CLUSTER(name, Params, max_threads, 1, __VA_ARGS__)
#define LONGHAUL_KERNEL_ALONE(...) LONGHAUL_KERNEL(__VA_ARGS__)
#define LONGHAUL_KERNEL_CLUSTER(name, Params, max_threads, cluster_x, ...)                           \
    static const ::emulator::KernelRegistration name##_registration(                                 \
        #name, sizeof(Params), max_threads, cluster_x,                                               \
        [](const void* params) { __VA_ARGS__(*static_cast<const Params*>(params)); });
#endif

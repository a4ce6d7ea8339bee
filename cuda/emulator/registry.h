// Kernels by name, as a driver launches them.
#pragma once

#include <cstddef>

namespace emulator {

using KernelBody = void (*)(const void* params);

struct Kernel {
    const char* name;
    std::size_t params_bytes;
    unsigned max_threads;
    unsigned cluster;  // blocks of a cluster
    KernelBody body;
};

// Adds a kernel at program start; see LONGHAUL_KERNEL.
struct KernelRegistration {
    KernelRegistration(const char* name, std::size_t params_bytes, unsigned max_threads, unsigned cluster, KernelBody body);
};

// nullptr when there is no such kernel.
const Kernel* find_kernel(const char* name);
std::size_t kernel_count();
const Kernel* kernel_at(std::size_t index);

}  // namespace emulator

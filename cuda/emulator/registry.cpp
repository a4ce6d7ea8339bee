#include "registry.h"

#include <cstring>
#include <vector>

namespace emulator {

namespace {

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> list;
    return list;
}

}  // namespace

KernelRegistration::KernelRegistration(const char* name, std::size_t params_bytes, unsigned max_threads,
                                       unsigned cluster, KernelBody body) {
    kernels().push_back({name, params_bytes, max_threads, cluster, body});
}

const Kernel* find_kernel(const char* name) {
    for (const auto& kernel : kernels())
        if (std::strcmp(kernel.name, name) == 0) return &kernel;
    return nullptr;
}

std::size_t kernel_count() { return kernels().size(); }
const Kernel* kernel_at(std::size_t index) { return index < kernels().size() ? &kernels()[index] : nullptr; }

}  // namespace emulator

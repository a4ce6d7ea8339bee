#include "interface.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>

#include "launch.h"
#include "memory.h"
#include "registry.h"
#include "tensor_map.h"

namespace {

void report(char* error, std::size_t bytes, const char* message) {
    if (bytes != 0) std::snprintf(error, bytes, "%s", message);
}

int status(emulator::FaultKind kind) { return 1 + static_cast<int>(kind); }

std::mutex& allocations_mutex() {
    static std::mutex mutex;
    return mutex;
}
std::unordered_map<void*, std::unique_ptr<emulator::Allocation>>& allocations() {
    static std::unordered_map<void*, std::unique_ptr<emulator::Allocation>> map;
    return map;
}

}  // namespace

int longhaul_emulated_launch_kernel(const longhaul_emulated_launch* launch, char* error, std::size_t error_bytes) {
    using emulator::FaultKind;
    const auto* kernel = emulator::find_kernel(launch->kernel);
    if (kernel == nullptr) {
        report(error, error_bytes, "there is no kernel of this name");
        return status(FaultKind::InvalidArgument);
    }
    if (kernel->params_bytes != launch->params_bytes) {
        char message[160];
        std::snprintf(message, sizeof message, "the kernel takes %zu bytes of parameters, the caller passes %llu",
                      kernel->params_bytes, static_cast<unsigned long long>(launch->params_bytes));
        report(error, error_bytes, message);
        return status(FaultKind::InvalidArgument);
    }
    emulator::LaunchConfig config;
    config.name = launch->kernel;
    config.grid = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
    config.block = dim3(launch->block[0], launch->block[1], launch->block[2]);
    config.cluster = kernel->cluster;
    config.dynamic_shared_bytes = launch->shared_bytes;
    config.completion = launch->eager != 0 ? emulator::Completion::Eager : emulator::Completion::Lazy;
    config.seed = launch->seed;
    config.resident_blocks = launch->resident_blocks;
    config.across_devices = launch->across_devices != 0;
    if (config.block.count() > kernel->max_threads) {
        report(error, error_bytes, "more threads in a block than the kernel's launch bounds allow");
        return status(FaultKind::InvalidArgument);
    }
    try {
        emulator::launch(config, [&] { kernel->body(launch->params); });
        return 0;
    } catch (const emulator::Fault& fault) {
        report(error, error_bytes, fault.what());
        return status(fault.kind());
    } catch (const std::exception& failure) {
        report(error, error_bytes, failure.what());
        return status(FaultKind::InvalidArgument);
    }
}

void* longhaul_emulated_allocate(const char* label, std::uint64_t bytes) {
    try {
        auto allocation = std::make_unique<emulator::Allocation>(label, bytes, 0);
        void* memory = allocation->region.data();
        const std::lock_guard lock(allocations_mutex());
        allocations().emplace(memory, std::move(allocation));
        return memory;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void longhaul_emulated_free(void* memory) {
    std::unique_ptr<emulator::Allocation> released;
    const std::lock_guard lock(allocations_mutex());
    const auto found = allocations().find(memory);
    if (found == allocations().end()) return;
    released = std::move(found->second);
    allocations().erase(found);
}

int longhaul_emulated_kernel(std::size_t index, const char** name, std::uint64_t* params_bytes,
                             std::uint32_t* max_threads) {
    const auto* kernel = emulator::kernel_at(index);
    if (kernel == nullptr) return 0;
    *name = kernel->name;
    *params_bytes = kernel->params_bytes;
    *max_threads = kernel->max_threads;
    return 1;
}

int longhaul_emulated_tensor_map(const longhaul_emulated_tensor* tensor, std::uint64_t* words, char* error,
                                 std::size_t error_bytes) {
    emulator::TensorMapSpec spec{tensor->address, tensor->element_bytes, tensor->rank, {}, {}, {}, tensor->swizzle};
    for (unsigned d = 0; d < emulator::kMaxTensorRank; ++d) {
        spec.dims[d] = tensor->dims[d];
        spec.strides[d] = tensor->strides[d];
        spec.box[d] = tensor->box[d];
    }
    std::uint64_t map[emulator::kTensorMapWords];
    if (const auto problem = emulator::encode_tensor_map(spec, map)) {
        report(error, error_bytes, problem->c_str());
        return status(emulator::FaultKind::InvalidArgument);
    }
    std::copy(std::begin(map), std::end(map), words);
    return 0;
}

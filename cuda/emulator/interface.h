// The C interface of the emulator, for a driver in another language (crates/cuda/src/driver/emulated.rs).
//
// Functions may be called from any thread. They return 0, or 1 + FaultKind with a message in `error`.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct longhaul_emulated_launch {
    const char* kernel;
    const void* params;
    std::uint64_t params_bytes;
    std::uint64_t seed;             // of the scheduler
    std::uint32_t grid[3];
    std::uint32_t block[3];
    std::uint32_t shared_bytes;     // dynamic
    std::uint32_t eager;            // asynchronous copies land at issue (1) or as late as a wait allows (0)
    std::uint32_t resident_blocks;  // in flight at once
    std::uint32_t across_devices;   // whether blocks wait for launches on other devices (1)
};

int longhaul_emulated_launch_kernel(const longhaul_emulated_launch* launch, char* error, std::size_t error_bytes);

// Guarded, poisoned global memory; nullptr when there is none. `label` names it in faults.
void* longhaul_emulated_allocate(const char* label, std::uint64_t bytes);
void longhaul_emulated_free(void* memory);

struct longhaul_emulated_tensor {
    std::uint64_t address;
    std::uint64_t dims[5];     // elements, innermost first
    std::uint64_t strides[5];  // bytes of a step in the dimension of the same index; [0] is not read
    std::uint32_t box[5];      // elements
    std::uint32_t rank;
    std::uint32_t element_bytes;
    std::uint32_t swizzle;  // span in bytes, or 0
};

// Encodes a tensor map of 16 words.
int longhaul_emulated_tensor_map(const longhaul_emulated_tensor* tensor, std::uint64_t* words, char* error,
                                 std::size_t error_bytes);

// Describes kernel `index`; returns 0 beyond the last one. `name` stays valid.
int longhaul_emulated_kernel(std::size_t index, const char** name, std::uint64_t* params_bytes,
                             std::uint32_t* max_threads);
}

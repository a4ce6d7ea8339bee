// wgmma on the emulator: asynchronous products of a warpgroup.
//
// Each warp of the warpgroup computes its 16 of the 64 rows, from the real descriptor bits and the asynchronous view of
// shared memory. Eager completion computes at issue. Lazy completion poisons the accumulators at issue and reads shared
// memory when a wait demands the group; registers of A are read at issue, as ptxas keeps them until then.
// A wait by one warp says nothing of the other warps, except that they must have issued what it waits for.
#pragma once

#include <cstdint>

namespace emulator {

struct Thread;

enum class WgmmaElement : std::uint8_t { Bf16, F16, E4m3 };

struct WgmmaOperands {
    WgmmaElement element;
    std::uint16_t n;                   // columns, 8 to 256
    bool a_mn_major, b_mn_major;       // transpose bits
    const std::uint32_t* a_registers;  // fragment of A, or nullptr: `a` is its descriptor
    std::uint64_t a, b;                // matrix descriptors
    bool accumulate;                   // scale-d
    float* d;                          // n / 2 accumulators
};

void wgmma_issue(const WgmmaOperands& operands);
void wgmma_fence_registers();
void wgmma_commit();
void wgmma_wait(std::uint32_t pending);
// A thread ends: nothing may be in flight.
void finish_wgmma(Thread& thread);

}  // namespace emulator

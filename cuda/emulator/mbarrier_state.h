// mbarrier objects as the emulator keeps them: packed into the 8 bytes of shared memory the kernel provides.
//
// Bit fields (the hardware's format is opaque, so any will do): 0-19 expected arrivals, 20-39 pending arrivals,
// 40-60 pending transaction bytes + 2^20, 61 phase parity, 62-63 the tag 01. Poison carries the tag 11, zeroed memory
// 00, so an uninitialised or invalidated barrier is recognised.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

struct Block;

struct MbarrierState {
    std::uint32_t expected, pending;
    std::int32_t bytes;
    std::uint32_t parity;
};

inline constexpr std::uint32_t kMbarrierMaxCount = (1u << 20) - 1;

// Operations on the barrier at a shared address of `block`; faults name `instruction`.
void mbarrier_initialise(Block& block, std::uint32_t address, std::uint32_t count);
void mbarrier_invalidate_state(Block& block, std::uint32_t address);
// Adds `expect` to the pending bytes, subtracts `complete`, then counts `arrivals`; completes the phase if all is in.
void mbarrier_update(Block& block, std::uint32_t address, std::uint32_t arrivals, std::uint32_t expect,
                     std::uint32_t complete, const char* instruction);
// Whether the phase with this parity has completed.
bool mbarrier_completed(Block& block, std::uint32_t address, std::uint32_t parity, const char* instruction);
// ": 1 of 2 arrivals and 16 bytes pending" for deadlock reports.
std::string describe_mbarrier(const Block& block, std::uint32_t address);

}  // namespace emulator

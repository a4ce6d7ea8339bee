// mbarrier phases; see mbarrier_state.h and the PTX ISA, "Parallel Synchronization and Communication: mbarrier".
#include "mbarrier_state.h"

#include <cstring>

#include "runtime.h"

namespace emulator {

namespace {

constexpr std::uint64_t kTag = 1;
constexpr std::int32_t kByteBias = 1 << 20;

std::uint64_t pack(const MbarrierState& state) {
    return static_cast<std::uint64_t>(state.expected) | static_cast<std::uint64_t>(state.pending) << 20 |
           static_cast<std::uint64_t>(state.bytes + kByteBias) << 40 | static_cast<std::uint64_t>(state.parity) << 61 |
           kTag << 62;
}

bool unpack(std::uint64_t word, MbarrierState& state) {
    if (word >> 62 != kTag) return false;
    state.expected = word & kMbarrierMaxCount;
    state.pending = word >> 20 & kMbarrierMaxCount;
    state.bytes = static_cast<std::int32_t>(word >> 40 & ((1u << 21) - 1)) - kByteBias;
    state.parity = word >> 61 & 1;
    return true;
}

// The barrier's bytes. Also used for effects that land while no thread runs, hence by block, not by thread.
unsigned char* locate(Block& block, std::uint32_t address, const char* instruction) {
    auto* bytes = block.shared->resolve(address, 8);
    if (bytes == nullptr || address % 8 != 0)
        raise(FaultKind::InvalidBarrier, std::string(instruction) + ": shared address " + std::to_string(address) +
                                             " is not an aligned 8-byte word of a shared array");
    return bytes;
}

MbarrierState load(Block& block, std::uint32_t address, const char* instruction) {
    std::uint64_t word;
    std::memcpy(&word, locate(block, address, instruction), 8);
    MbarrierState state{};
    if (!unpack(word, state))
        raise(FaultKind::InvalidBarrier, std::string(instruction) + ": no initialised mbarrier at shared address " +
                                             std::to_string(address));
    return state;
}

void store(Block& block, std::uint32_t address, const MbarrierState& state, const char* instruction) {
    const std::uint64_t word = pack(state);
    std::memcpy(locate(block, address, instruction), &word, 8);
}

}  // namespace

void mbarrier_initialise(Block& block, std::uint32_t address, std::uint32_t count) {
    if (count == 0 || count > kMbarrierMaxCount)
        raise(FaultKind::InvalidBarrier, "mbarrier.init: count " + std::to_string(count) + " is not in 1..1048575");
    store(block, address, {count, count, 0, 0}, "mbarrier.init");
}

void mbarrier_invalidate_state(Block& block, std::uint32_t address) {
    load(block, address, "mbarrier.inval");
    std::memset(locate(block, address, "mbarrier.inval"), 0xff, 8);
}

void mbarrier_update(Block& block, std::uint32_t address, std::uint32_t arrivals, std::uint32_t expect,
                     std::uint32_t complete, const char* instruction) {
    MbarrierState state = load(block, address, instruction);
    const std::int64_t bytes = std::int64_t{state.bytes} + expect - complete;
    if (bytes > kByteBias - 1 || bytes < -(kByteBias - 1))
        raise(FaultKind::InvalidBarrier, std::string(instruction) + ": transaction count " + std::to_string(bytes) +
                                             " leaves the range of 2^20 - 1 bytes");
    state.bytes = static_cast<std::int32_t>(bytes);
    if (arrivals > state.pending)
        raise(FaultKind::InvalidBarrier, std::string(instruction) + ": more arrivals than the count of " +
                                             std::to_string(state.expected) + " at shared address " +
                                             std::to_string(address));
    state.pending -= arrivals;
    const bool complete_phase = state.pending == 0 && state.bytes == 0;
    if (complete_phase) {
        state.parity ^= 1;
        state.pending = state.expected;
    }
    store(block, address, state, instruction);
    if (complete_phase) {
        auto waiters = std::move(block.mbarrier_waiters[address]);
        block.mbarrier_waiters.erase(address);
        for (Thread* thread : waiters) wake(*thread);
    }
    note_progress();
}

bool mbarrier_completed(Block& block, std::uint32_t address, std::uint32_t parity, const char* instruction) {
    return load(block, address, instruction).parity != (parity & 1);
}

std::string describe_mbarrier(const Block& block, std::uint32_t address) {
    const auto* bytes = block.shared->resolve(address, 8);
    std::uint64_t word = 0;
    if (bytes != nullptr) std::memcpy(&word, bytes, 8);
    MbarrierState state{};
    if (!unpack(word, state)) return " (not initialised)";
    return " (" + std::to_string(state.pending) + " of " + std::to_string(state.expected) + " arrivals and " +
           std::to_string(state.bytes) + " bytes pending)";
}

}  // namespace emulator

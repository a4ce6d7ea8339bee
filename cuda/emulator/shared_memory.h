// Shared memory of one resident block: the dynamic region, static arrays, red zones, and 32-bit shared addresses.
//
// Shared addresses start at 1024, as on hardware that keeps the first KiB for itself, so 0 is never valid.
//
// The asynchronous proxy (wgmma operands, bulk stores) has its own view of the contents: ordinary writes reach it only
// when a thread of the block executes fence.proxy.async, writes of asynchronous copies reach both at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "memory.h"

namespace emulator {

inline constexpr std::size_t kSharedBase = 1024;
inline constexpr std::size_t kMaxSharedBytes = 227 * 1024;       // per block on sm_90
inline constexpr std::size_t kMaxStaticSharedBytes = 48 * 1024;  // static arrays

class SharedMemory {
public:
    explicit SharedMemory(std::size_t dynamic_bytes);

    // Poisons everything and forgets static arrays; done for each block.
    void reset();
    unsigned char* dynamic() { return window_.data() + kSharedBase; }
    std::size_t dynamic_bytes() const { return dynamic_bytes_; }
    // The static array identified by `key` (one per declaration and template instance), created on first use.
    unsigned char* static_array(const void* key, std::size_t bytes, std::size_t alignment);

    bool contains(const void* address) const;
    std::uint32_t address_of(const void* pointer) const;
    // Pointer to [address, address + bytes) if that lies within one object, else nullptr.
    unsigned char* resolve(std::uint32_t address, std::size_t bytes) const;
    // Shared address of the first damaged red-zone byte.
    std::optional<std::uint32_t> damage() const;
    bool near(const void* address) const { return window_.near(address); }

    // fence.proxy.async: what has been written until now reaches the asynchronous view.
    void publish();
    // As resolve, in the asynchronous view.
    const unsigned char* resolve_async(std::uint32_t address, std::size_t bytes);
    // Writes of the asynchronous proxy; [address, address + bytes) must resolve. No source: poison.
    void write_async(std::uint32_t address, const void* source, std::size_t bytes);

private:
    unsigned char* async_view();
    struct Object {
        const void* key;
        std::size_t offset, bytes;
    };
    GuardedRegion window_;
    std::size_t dynamic_bytes_;
    std::vector<Object> objects_;           // in address order, never overlapping
    std::vector<unsigned char> async_view_;  // of the whole window; empty until something needs it
};

// The same operations on the running thread's block, raising faults that name `instruction`.
std::uint32_t shared_address_of(const void* pointer);
unsigned char* shared_pointer(std::uint32_t address, std::size_t bytes, std::size_t alignment,
                              const char* instruction);
unsigned char* dynamic_shared_memory();
unsigned char* static_shared_memory(const void* key, std::size_t bytes, std::size_t alignment);

}  // namespace emulator

// Emulated memories: guarded regions with red zones and poison, and the registry of global allocations.
//
// A guarded region ends at an inaccessible page, so most overruns fault at once, and is surrounded by red zones whose
// pattern is verified after each launch, so that every stray write shows. Fresh memory holds all-ones bytes, which is
// a NaN in every floating-point format used (f32, bf16, f16, e4m3).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "fault.h"
#include "numeric.h"

namespace emulator {

inline constexpr unsigned char kPoisonByte = 0xff;

// Fills [low, high) with the red-zone pattern (a 16-bit NaN pattern that differs from poison).
void fill_red_zone(unsigned char* low, unsigned char* high);
// First damaged byte of a red zone, or nullptr.
const unsigned char* damaged_red_zone(const unsigned char* low, const unsigned char* high);

class GuardedRegion {
public:
    GuardedRegion(std::size_t bytes, std::size_t alignment);
    ~GuardedRegion();
    GuardedRegion(const GuardedRegion&) = delete;
    GuardedRegion& operator=(const GuardedRegion&) = delete;

    unsigned char* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }
    // Whether an address lies in the mapping (payload, red zones or guard pages).
    bool near(const void* address) const;
    // Address of the first damaged red-zone byte, or nullptr.
    const unsigned char* damage() const;

private:
    unsigned char* map_ = nullptr;
    unsigned char* data_ = nullptr;
    std::size_t bytes_, map_bytes_ = 0;
};

// One allocation in global memory. `poison_width` is the element width for which an all-ones element means "never
// written" (floating-point types), 0 where all-ones is an ordinary value.
struct Allocation {
    Allocation(std::string label, std::size_t bytes, std::size_t poison_width);
    ~Allocation();
    Allocation(const Allocation&) = delete;
    Allocation& operator=(const Allocation&) = delete;

    std::string label;
    GuardedRegion region;
    std::size_t poison_width;
};

// A word that other host threads may access at the same time: devices of a group run on a thread each.
inline std::uint32_t load_word(const std::uint32_t* address) {
    return std::atomic_ref(*const_cast<std::uint32_t*>(address)).load(std::memory_order_acquire);
}
inline void store_word(std::uint32_t* address, std::uint32_t value) {
    std::atomic_ref(*address).store(value, std::memory_order_release);
}

enum class Access { Read, Write };

// Checks that [address, address + bytes) lies in one global allocation, is aligned, and, for reads of floating-point
// memory, has been written. Raises a fault naming the allocation otherwise.
void check_global(const void* address, std::size_t bytes, std::size_t alignment, Access access,
                  const char* instruction);
// Verifies the red zones of all live allocations; the description of the first damage, or an empty string.
std::string damaged_global_memory();
// Describes an address for a fault message: allocation label and byte offset if it is near one.
std::string describe_global(const void* address);

template <class T>
inline constexpr bool is_floating = std::is_floating_point_v<T> || std::is_same_v<T, __nv_bfloat16> ||
                                    std::is_same_v<T, __half> || std::is_same_v<T, __nv_fp8_e4m3>;

// A typed global allocation owned by the host test or driver.
template <class T>
class DeviceArray {
    static_assert(std::is_trivially_copyable_v<T>);

public:
    // `count` poisoned elements.
    DeviceArray(std::string label, std::size_t count)
        : allocation_(std::move(label), count * sizeof(T), is_floating<T> ? sizeof(T) : 0), count_(count) {}
    DeviceArray(std::string label, const std::vector<T>& values) : DeviceArray(std::move(label), values.size()) {
        if (count_ != 0) std::memcpy(allocation_.region.data(), values.data(), count_ * sizeof(T));
    }

    T* data() const { return reinterpret_cast<T*>(allocation_.region.data()); }
    std::size_t size() const { return count_; }

    // Copies the contents to the host. Floating-point arrays with elements nobody wrote raise UnwrittenOutput.
    std::vector<T> read() const {
        std::vector<T> out(count_);
        if (count_ != 0) std::memcpy(out.data(), data(), count_ * sizeof(T));
        if constexpr (is_floating<T>) {
            const auto* bytes = allocation_.region.data();
            for (std::size_t i = 0; i < count_; ++i) {
                bool poison = true;
                for (std::size_t b = 0; b < sizeof(T); ++b) poison &= bytes[i * sizeof(T) + b] == kPoisonByte;
                if (poison)
                    throw Fault(FaultKind::UnwrittenOutput, "element " + std::to_string(i) + " of '" +
                                                                allocation_.label + "' was never written");
            }
        }
        return out;
    }

private:
    Allocation allocation_;
    std::size_t count_;
};

}  // namespace emulator

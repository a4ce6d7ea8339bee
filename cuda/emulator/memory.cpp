// Guarded regions and the registry of global allocations; see memory.h.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <new>

#include "runtime.h"

namespace emulator {

namespace {

constexpr std::size_t kPage = 4096;
// Room kept in front of the payload for the leading red zone.
constexpr std::size_t kLeadingRedZone = 256;
constexpr std::size_t kGlobalAlignment = 256;  // as cudaMalloc
constexpr unsigned char kRedZone[2] = {0xfd, 0xff};  // 0xfffd as a 16-bit value

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

unsigned char red_zone_byte(const unsigned char* address) {
    return kRedZone[reinterpret_cast<std::uintptr_t>(address) & 1];
}

// A page of the pattern as it lies from `address` on.
const unsigned char* red_zone_pattern(const unsigned char* address) {
    static const auto page = [] {
        std::array<unsigned char, kPage + 1> bytes{};
        for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = kRedZone[i & 1];
        return bytes;
    }();
    return page.data() + (reinterpret_cast<std::uintptr_t>(address) & 1);
}

using Registry = std::map<std::uintptr_t, Allocation*>;
Registry& registry() {
    static Registry instance;
    return instance;
}
// Launches run on several host threads at once; each looks at all allocations.
std::recursive_mutex& registry_mutex() {
    static std::recursive_mutex instance;
    return instance;
}
using Lock = std::lock_guard<std::recursive_mutex>;

const Allocation* allocation_near(const void* address) {
    for (const auto& [base, allocation] : registry())
        if (allocation->region.near(address)) return allocation;
    return nullptr;
}

// The allocation that contains [value, value + bytes). The lock ends here: a fault abandons the frames above it.
const Allocation* owner_of(std::uintptr_t value, std::size_t bytes) {
    const Lock lock(registry_mutex());
    const auto after = registry().upper_bound(value);
    if (after == registry().begin()) return nullptr;
    const auto& [base, allocation] = *std::prev(after);
    return value + bytes <= base + allocation->region.bytes() ? allocation : nullptr;
}

}  // namespace

void fill_red_zone(unsigned char* low, unsigned char* high) {
    while (low < high) {
        const auto bytes = std::min<std::size_t>(kPage, static_cast<std::size_t>(high - low));
        std::memcpy(low, red_zone_pattern(low), bytes);
        low += bytes;
    }
}

const unsigned char* damaged_red_zone(const unsigned char* low, const unsigned char* high) {
    while (low < high) {
        const auto bytes = std::min<std::size_t>(kPage, static_cast<std::size_t>(high - low));
        if (std::memcmp(low, red_zone_pattern(low), bytes) != 0) {
            while (*low == red_zone_byte(low)) ++low;
            return low;
        }
        low += bytes;
    }
    return nullptr;
}

GuardedRegion::GuardedRegion(std::size_t bytes, std::size_t alignment) : bytes_(bytes) {
    const std::size_t payload = round_up(bytes, alignment);
    const std::size_t body = round_up(payload + kLeadingRedZone, kPage);
    map_bytes_ = body + 2 * kPage;
    void* map = mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<unsigned char*>(map);
    if (mprotect(map_ + kPage, body, PROT_READ | PROT_WRITE) != 0) {
        munmap(map_, map_bytes_);
        throw std::bad_alloc();
    }
    data_ = map_ + kPage + body - payload;
    fill_red_zone(map_ + kPage, data_);
    std::memset(data_, kPoisonByte, bytes_);
    fill_red_zone(data_ + bytes_, map_ + kPage + body);
}

GuardedRegion::~GuardedRegion() { munmap(map_, map_bytes_); }

bool GuardedRegion::near(const void* address) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return p >= map_ && p < map_ + map_bytes_;
}

const unsigned char* GuardedRegion::damage() const {
    if (const auto* p = damaged_red_zone(map_ + kPage, data_)) return p;
    return damaged_red_zone(data_ + bytes_, map_ + map_bytes_ - kPage);
}

Allocation::Allocation(std::string name, std::size_t bytes, std::size_t width)
    : label(std::move(name)), region(bytes, kGlobalAlignment), poison_width(width) {
    const Lock lock(registry_mutex());
    registry().emplace(reinterpret_cast<std::uintptr_t>(region.data()), this);
}

Allocation::~Allocation() {
    const Lock lock(registry_mutex());
    registry().erase(reinterpret_cast<std::uintptr_t>(region.data()));
}

std::string describe_global(const void* address) {
    const Lock lock(registry_mutex());
    const Allocation* allocation = allocation_near(address);
    if (allocation == nullptr) return "an address outside every global allocation";
    const auto offset = static_cast<const unsigned char*>(address) - allocation->region.data();
    return "byte " + std::to_string(offset) + " of '" + allocation->label + "' (" +
           std::to_string(allocation->region.bytes()) + " bytes)";
}

void check_global(const void* address, std::size_t bytes, std::size_t alignment, Access access,
                  const char* instruction) {
    const auto value = reinterpret_cast<std::uintptr_t>(address);
    const Allocation* owner = owner_of(value, bytes);
    if (owner == nullptr)
        raise(FaultKind::OutOfBounds, std::string(instruction) + (access == Access::Read ? " reads " : " writes ") +
                                          std::to_string(bytes) + " bytes at " + describe_global(address));
    if (value % alignment != 0)
        raise(FaultKind::Misaligned, std::string(instruction) + " needs " + std::to_string(alignment) +
                                         "-byte alignment at " + describe_global(address));
    if (access == Access::Read && owner->poison_width != 0) {
        const auto* p = static_cast<const unsigned char*>(address);
        const std::size_t width = owner->poison_width;
        for (std::size_t i = 0; i + width <= bytes; i += width) {
            bool poison = true;
            for (std::size_t b = 0; b < width; ++b) poison &= p[i + b] == kPoisonByte;
            if (poison)
                raise(FaultKind::UninitialisedRead,
                      std::string(instruction) + " reads " + describe_global(p + i) + ", which nobody has written");
        }
    }
}

std::string damaged_global_memory() {
    const Lock lock(registry_mutex());
    for (const auto& [base, allocation] : registry())
        if (const auto* p = allocation->region.damage()) return "red zone overwritten at " + describe_global(p);
    return {};
}

}  // namespace emulator

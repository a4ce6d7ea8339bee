// Shared memory windows; see shared_memory.h.
#include "shared_memory.h"

#include <string>

#include "runtime.h"

namespace emulator {

namespace {
constexpr std::size_t kRedZoneBytes = 128;

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Room for the dynamic region and behind it the static arrays with their red zones.
std::size_t window_bytes(std::size_t dynamic_bytes) {
    return kSharedBase + round_up(dynamic_bytes, 1024) + 2 * kRedZoneBytes + 2 * kMaxStaticSharedBytes;
}
}  // namespace

SharedMemory::SharedMemory(std::size_t dynamic_bytes)
    : window_(window_bytes(dynamic_bytes), 1024), dynamic_bytes_(dynamic_bytes) {
    fill_red_zone(window_.data(), window_.data() + window_.bytes());
    reset();
}

// Only what objects covered needs to be restored: the block before was checked for damage anywhere else.
void SharedMemory::reset() {
    for (const auto& object : objects_)
        fill_red_zone(window_.data() + object.offset, window_.data() + object.offset + object.bytes);
    objects_.assign(1, Object{nullptr, kSharedBase, dynamic_bytes_});
    std::memset(dynamic(), kPoisonByte, dynamic_bytes_);
    async_view_.clear();
}

unsigned char* SharedMemory::static_array(const void* key, std::size_t bytes, std::size_t alignment) {
    std::size_t used = 0;
    for (const auto& object : objects_) {
        if (object.key == key) return window_.data() + object.offset;
        if (object.key != nullptr) used += object.bytes;
    }
    const auto& last = objects_.back();
    const std::size_t offset = round_up(last.offset + last.bytes + kRedZoneBytes, alignment < 16 ? 16 : alignment);
    if (used + bytes > kMaxStaticSharedBytes || dynamic_bytes_ + used + bytes > kMaxSharedBytes ||
        offset + bytes + kRedZoneBytes > window_.bytes())
        raise(FaultKind::InvalidArgument, "static shared arrays of " + std::to_string(used + bytes) +
                                              " bytes do not fit beside " + std::to_string(dynamic_bytes_) +
                                              " dynamic bytes (limits: 48 KiB static, 227 KiB in all)");
    objects_.push_back({key, offset, bytes});
    std::memset(window_.data() + offset, kPoisonByte, bytes);
    if (!async_view_.empty()) std::memset(async_view_.data() + offset, kPoisonByte, bytes);
    return window_.data() + offset;
}

unsigned char* SharedMemory::async_view() {
    if (async_view_.empty()) async_view_.assign(window_.bytes(), kPoisonByte);
    return async_view_.data();
}

void SharedMemory::publish() {
    auto* view = async_view();
    for (const auto& object : objects_) std::memcpy(view + object.offset, window_.data() + object.offset, object.bytes);
}

const unsigned char* SharedMemory::resolve_async(std::uint32_t address, std::size_t bytes) {
    return resolve(address, bytes) != nullptr ? async_view() + address : nullptr;
}

void SharedMemory::write_async(std::uint32_t address, const void* source, std::size_t bytes) {
    for (auto* view : {window_.data(), async_view()}) {
        if (source != nullptr)
            std::memcpy(view + address, source, bytes);
        else
            std::memset(view + address, kPoisonByte, bytes);
    }
}

bool SharedMemory::contains(const void* address) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return p >= window_.data() && p <= window_.data() + window_.bytes();
}

std::uint32_t SharedMemory::address_of(const void* pointer) const {
    return static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - window_.data());
}

unsigned char* SharedMemory::resolve(std::uint32_t address, std::size_t bytes) const {
    for (const auto& object : objects_)
        if (address >= object.offset && address + bytes <= object.offset + object.bytes)
            return window_.data() + address;
    return nullptr;
}

std::optional<std::uint32_t> SharedMemory::damage() const {
    const auto* base = window_.data();
    const unsigned char* low = base;
    for (const auto& object : objects_) {
        if (const auto* p = damaged_red_zone(low, base + object.offset)) return address_of(p);
        low = base + object.offset + object.bytes;
    }
    if (const auto* p = damaged_red_zone(low, base + window_.bytes())) return address_of(p);
    return std::nullopt;
}

std::uint32_t shared_address_of(const void* pointer) {
    const auto& shared = *this_thread().block->shared;
    if (!shared.contains(pointer))
        raise(FaultKind::OutOfBounds, "a pointer taken for shared memory is not: it is " + describe_global(pointer));
    return shared.address_of(pointer);
}

unsigned char* shared_pointer(std::uint32_t address, std::size_t bytes, std::size_t alignment,
                              const char* instruction) {
    auto* pointer = this_thread().block->shared->resolve(address, bytes);
    if (pointer == nullptr)
        raise(FaultKind::OutOfBounds, std::string(instruction) + " touches " + std::to_string(bytes) +
                                          " bytes at shared address " + std::to_string(address) +
                                          ", outside every shared array (" + describe_thread(this_thread()) + ")");
    if (address % alignment != 0)
        raise(FaultKind::Misaligned, std::string(instruction) + " needs " + std::to_string(alignment) +
                                         "-byte alignment, shared address is " + std::to_string(address));
    return pointer;
}

unsigned char* dynamic_shared_memory() { return this_thread().block->shared->dynamic(); }

unsigned char* static_shared_memory(const void* key, std::size_t bytes, std::size_t alignment) {
    return this_thread().block->shared->static_array(key, bytes, alignment);
}

}  // namespace emulator

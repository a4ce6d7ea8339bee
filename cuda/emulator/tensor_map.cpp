// Tensor maps; see tensor_map.h.
#include "tensor_map.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "bulk_store.h"
#include "cluster.h"
#include "matrix_descriptor.h"
#include "mbarrier_state.h"
#include "runtime.h"

namespace emulator {

namespace {

// Word 0 tells a map from other memory. Then: address; rank, element bytes and swizzle; dims; strides; boxes, two a word.
constexpr std::uint64_t kMagic = 0x70616d726f736e74u;

using Coordinates = std::array<std::int32_t, kMaxTensorRank>;

std::uint64_t pack_header(const TensorMapSpec& spec) {
    return spec.rank | std::uint64_t{spec.element_bytes} << 8 | std::uint64_t{spec.swizzle} << 16;
}

// Calls visit(box offset in bytes, address of the row or 0 if it is outside, first and last byte inside) for every inner row
// of the box at `at`.
template <class Visit>
void for_each_row(const TensorMapSpec& spec, const Coordinates& at, Visit visit) {
    const std::int64_t inner = std::int64_t{spec.box[0]} * spec.element_bytes;
    std::uint32_t rows = 1;
    for (unsigned d = 1; d < spec.rank; ++d) rows *= spec.box[d];
    const std::int64_t start = std::int64_t{at[0]} * spec.element_bytes;
    const auto extent = static_cast<std::int64_t>(spec.dims[0] * spec.element_bytes);
    for (std::uint32_t row = 0; row < rows; ++row) {
        std::uint32_t rest = row;
        std::int64_t address = static_cast<std::int64_t>(spec.address) + start;
        bool inside = true;
        for (unsigned d = 1; d < spec.rank; ++d) {
            const std::int64_t index = std::int64_t{at[d]} + rest % spec.box[d];
            rest /= spec.box[d];
            inside &= index >= 0 && index < static_cast<std::int64_t>(spec.dims[d]);
            address += index * static_cast<std::int64_t>(spec.strides[d]);
        }
        const std::int64_t first = std::min(inner, std::max<std::int64_t>(0, -start));
        const std::int64_t last = inside ? std::max(first, std::min(inner, extent - start)) : first;
        visit(row * static_cast<std::uint32_t>(inner), address, first, last);
    }
}

Coordinates coordinates(const TensorMapSpec& spec, const std::int32_t* at, unsigned rank, const char* instruction) {
    if (rank != spec.rank)
        raise(FaultKind::InvalidArgument, std::string(instruction) + " of " + std::to_string(rank) + " dimensions with a map of " +
                                              std::to_string(spec.rank));
    Coordinates copy{};
    std::copy(at, at + rank, copy.begin());
    return copy;
}

// What the copy engine would touch in global memory lies in an allocation.
void check_rows(const TensorMapSpec& spec, const Coordinates& at, Access access, const char* instruction) {
    for_each_row(spec, at, [&](std::uint32_t, std::int64_t address, std::int64_t first, std::int64_t last) {
        if (first < last)
            check_global(reinterpret_cast<const void*>(address + first), static_cast<std::size_t>(last - first), 1, access,
                         instruction);
    });
}

std::vector<unsigned char> read_box(const TensorMapSpec& spec, const Coordinates& at, std::uint32_t bytes) {
    std::vector<unsigned char> box(bytes, 0);
    for_each_row(spec, at, [&](std::uint32_t offset, std::int64_t address, std::int64_t first, std::int64_t last) {
        if (first < last)
            std::memcpy(&box[offset + static_cast<std::size_t>(first)], reinterpret_cast<const void*>(address + first),
                        static_cast<std::size_t>(last - first));
    });
    return box;
}

void check_place(std::uint32_t address, std::uint32_t bytes, const char* instruction) {
    shared_pointer(address, bytes, 128, instruction);
}

}  // namespace

std::optional<std::string> encode_tensor_map(const TensorMapSpec& spec, std::uint64_t (&words)[kTensorMapWords]) {
    const auto text = [](auto value) { return std::to_string(value); };
    if (spec.rank < 2 || spec.rank > kMaxTensorRank) return "a tensor of " + text(spec.rank) + " dimensions; 2 to 5 are possible";
    if (spec.element_bytes != 1 && spec.element_bytes != 2 && spec.element_bytes != 4)
        return "elements of " + text(spec.element_bytes) + " bytes";
    if (spec.address % 16 != 0) return std::string("the tensor's address is not a multiple of 16");
    for (unsigned d = 0; d < spec.rank; ++d) {
        if (spec.dims[d] == 0 || spec.dims[d] > std::uint64_t{1} << 32)
            return "dimension " + text(d) + " has " + text(spec.dims[d]) + " elements; 1 to 2^32 are possible";
        if (spec.box[d] == 0 || spec.box[d] > 256)
            return "the box has " + text(spec.box[d]) + " elements in dimension " + text(d) + "; 1 to 256 are possible";
        if (d > 0 && (spec.strides[d] % 16 != 0 || spec.strides[d] >= std::uint64_t{1} << 40))
            return "the stride of dimension " + text(d) + " is " + text(spec.strides[d]) +
                   " bytes; it must be a multiple of 16 below 2^40";
    }
    const std::uint32_t inner = spec.box[0] * spec.element_bytes;
    if (inner % 16 != 0) return "the box is " + text(inner) + " bytes wide; the width must be a multiple of 16";
    if (spec.swizzle != 0 && spec.swizzle != 32 && spec.swizzle != 64 && spec.swizzle != 128)
        return "a swizzle of " + text(spec.swizzle) + " bytes; 0, 32, 64 and 128 exist";
    if (spec.swizzle != 0 && inner != spec.swizzle)
        return "the box is " + text(inner) + " bytes wide; with a swizzle of " + text(spec.swizzle) + " bytes it must be as wide";
    std::uint64_t box = inner;
    for (unsigned d = 1; d < spec.rank; ++d) box *= spec.box[d];
    if (box > kMaxSharedBytes) return "a box of " + text(box) + " bytes is larger than shared memory";
    std::memset(words, 0, sizeof words);
    words[0] = kMagic;
    words[1] = spec.address;
    words[2] = pack_header(spec);
    for (unsigned d = 0; d < spec.rank; ++d) {
        words[3 + d] = spec.dims[d];
        if (d > 0) words[7 + d] = spec.strides[d];
        words[12 + d / 2] |= std::uint64_t{spec.box[d]} << (d % 2 * 32);
    }
    return std::nullopt;
}

TensorMapView::TensorMapView(const std::uint64_t* words, const char* instruction) {
    const auto fail = [&](const char* what) { raise(FaultKind::InvalidArgument, std::string(instruction) + ": " + what); };
    if (reinterpret_cast<std::uintptr_t>(words) % 64 != 0) fail("the tensor map is not aligned to 64 bytes");
    if (is_local(words)) fail("the tensor map is a local copy; take its address in the kernel's parameters");
    if (words[0] != kMagic) fail("this is no tensor map of the emulated driver");
    spec = {words[1], static_cast<std::uint32_t>(words[2] >> 8 & 0xff), static_cast<std::uint32_t>(words[2] & 0xff), {}, {}, {},
            static_cast<std::uint32_t>(words[2] >> 16)};
    for (unsigned d = 0; d < spec.rank; ++d) {
        spec.dims[d] = words[3 + d];
        spec.strides[d] = d == 0 ? spec.element_bytes : words[7 + d];
        spec.box[d] = static_cast<std::uint32_t>(words[12 + d / 2] >> (d % 2 * 32));
    }
}

std::uint32_t TensorMapView::box_bytes() const {
    std::uint32_t bytes = inner_bytes();
    for (unsigned d = 1; d < spec.rank; ++d) bytes *= spec.box[d];
    return bytes;
}

void load_box(const std::uint64_t* words, const std::int32_t* at, unsigned rank, std::uint32_t destination,
              std::uint32_t barrier, std::optional<std::uint16_t> blocks) {
    const char* name = "cp.async.bulk.tensor";
    const TensorMapView map(words, name);
    const auto spec = map.spec;
    const auto start = coordinates(spec, at, rank, name);
    const std::uint32_t bytes = map.box_bytes();
    check_place(destination, bytes, name);
    check_rows(spec, start, Access::Read, name);
    Block& own = *this_thread().block;
    std::vector<Block*> targets;
    if (!blocks) {
        targets.push_back(&own);
    } else {
        if (*blocks == 0 || *blocks >> own.cluster->blocks.size() != 0)
            raise(FaultKind::InvalidArgument, std::string(name) + ".multicast: mask " + std::to_string(*blocks) +
                                                  " in a cluster of " + std::to_string(own.cluster->blocks.size()) + " blocks");
        for (Block* block : own.cluster->blocks)
            if ((*blocks >> block->rank & 1) != 0) targets.push_back(block);
    }
    for (Block* target : targets) {
        check_running(*target, name);
        if (target->shared->resolve(destination, bytes) == nullptr)
            raise(FaultKind::OutOfBounds, std::string(name) + ": block " + std::to_string(target->rank) +
                                              " of the cluster has no shared array at the destination");
        // Until the barrier's phase completes, the destination is undefined.
        target->shared->write_async(destination, nullptr, bytes);
        start_async([=] {
            check_running(*target, name);
            const auto box = read_box(spec, start, bytes);
            for (std::uint32_t offset = 0; offset < bytes; offset += 16)
                target->shared->write_async(swizzle_address(destination + offset, spec.swizzle), &box[offset], 16);
            mbarrier_update(*target, barrier, 0, 0, bytes, name);
        });
    }
    preemption_point();
}

void store_box(const std::uint64_t* words, const std::int32_t* at, unsigned rank, std::uint32_t source) {
    const char* name = "cp.async.bulk.tensor.global";
    const TensorMapView map(words, name);
    const auto spec = map.spec;
    const auto start = coordinates(spec, at, rank, name);
    const std::uint32_t bytes = map.box_bytes();
    check_place(source, bytes, name);
    check_rows(spec, start, Access::Write, name);
    Block& block = *this_thread().block;
    BulkStore store;
    store.read = [=, &block] {
        std::vector<unsigned char> box(bytes);
        for (std::uint32_t offset = 0; offset < bytes; offset += 16)
            std::memcpy(&box[offset], block.shared->resolve_async(swizzle_address(source + offset, spec.swizzle), 16), 16);
        return box;
    };
    store.write = [=](const std::vector<unsigned char>& box) {
        for_each_row(spec, start, [&](std::uint32_t offset, std::int64_t address, std::int64_t first, std::int64_t last) {
            if (first < last)
                std::memcpy(reinterpret_cast<void*>(address + first), &box[offset + static_cast<std::size_t>(first)],
                            static_cast<std::size_t>(last - first));
        });
    };
    issue_bulk_store(std::move(store));
}

}  // namespace emulator

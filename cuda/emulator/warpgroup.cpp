// What the four warps of a warpgroup execute alike, and the checks of matrix descriptors.
#include <algorithm>

#include "matrix_descriptor.h"
#include "runtime.h"

namespace emulator {

namespace {

constexpr unsigned kWarps = 4;

unsigned warp_number() { return this_thread().warp->first_thread / kWarpSize; }

}  // namespace

Warpgroup& this_warpgroup(const char* operation) {
    Block& block = *this_thread().block;
    const unsigned group = warp_number() / kWarps;
    if (group >= block.warpgroups.size())
        raise(FaultKind::WarpgroupMismatch, std::string(operation) + " by " + describe_thread(this_thread()) +
                                                ", whose warpgroup has fewer than 128 threads");
    return block.warpgroups[group];
}

std::uint64_t warpgroup_issue(const char* operation, const std::string& signature) {
    Warpgroup& group = this_warpgroup(operation);
    const std::uint64_t number = group.issued[warp_number() % kWarps]++;
    const std::uint64_t index = number - group.first;
    if (index == group.log.size()) {
        group.log.push_back(signature);
    } else if (group.log[index] != signature) {
        raise(FaultKind::WarpgroupMismatch, "warps of a warpgroup execute different instructions: '" + group.log[index] +
                                                "' and, by " + describe_thread(this_thread()) + ", '" + signature + "'");
    }
    while (*std::min_element(group.issued, group.issued + kWarps) > group.first) {
        group.log.pop_front();
        ++group.first;
    }
    auto waiting = std::move(group.waiting);
    group.waiting.clear();
    for (Thread* thread : waiting) wake(*thread);
    note_progress();
    return number;
}

void warpgroup_await(std::uint64_t number, const char* operation) {
    Warpgroup& group = this_warpgroup(operation);
    while (*std::min_element(group.issued, group.issued + kWarps) <= number) {
        group.waiting.push_back(&this_thread());
        wait_for({Wait::Kind::Warpgroup, warp_number() / kWarps, 0, operation, {}});
    }
}

void MatrixDescriptor::check(std::uint64_t bits) {
    const auto fail = [&](const std::string& what) {
        raise(FaultKind::InvalidArgument, "matrix descriptor " + std::to_string(bits) + ": " + what);
    };
    if ((bits & 0x3ff1c000c000c000u) != 0) fail("bits outside its fields are set");
    if ((bits >> 49 & 7) != 0) fail("a base offset; start matrices at the first line of the swizzle's pattern instead");
    const auto matrix = decode(bits);
    if (matrix.span != 0 && (matrix.start & (matrix.span * 8 - 1)) >= 128)
        fail("shared address " + std::to_string(matrix.start) + " is not in the first line of the " +
             std::to_string(matrix.span) + "-byte swizzle's pattern");
}

}  // namespace emulator

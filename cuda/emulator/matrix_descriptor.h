// The 64-bit descriptor of a matrix in shared memory, as wgmma decodes it.
//
// Bits 0-13 start address, 16-29 leading byte offset, 32-45 stride byte offset (all divided by 16), 49-51 base offset,
// 62-63 swizzle: 0 none, 1 of 128, 2 of 64, 3 of 32 bytes. PTX ISA, "Matrix descriptor"; the canonical layouts are those
// of "Strides" and "Shared Memory Matrix Layout".
#pragma once

#include <cstdint>

namespace emulator {

// The swizzle of 32, 64 or 128 bytes (0: none) on a shared address: 16-byte chunks trade places within a row by the
// number of the 128-byte line they are in.
inline std::uint32_t swizzle_address(std::uint32_t address, std::uint32_t span) {
    return span == 0 ? address : address ^ (address >> 3 & (span - 16));
}

struct MatrixDescriptor {
    std::uint32_t start, leading, stride;  // bytes
    std::uint32_t span;                    // bytes of the swizzle; 0: none

    static MatrixDescriptor decode(std::uint64_t bits) {
        constexpr std::uint32_t spans[] = {0, 128, 64, 32};
        return {static_cast<std::uint32_t>(bits & 0x3fff) << 4, static_cast<std::uint32_t>(bits >> 16 & 0x3fff) << 4,
                static_cast<std::uint32_t>(bits >> 32 & 0x3fff) << 4, spans[bits >> 62]};
    }
    // Faults on reserved bits and on a start that is not at the first line of a swizzle's pattern.
    static void check(std::uint64_t bits);

    // Address of the 16-byte chunk `chunk` (along the depth) of row `row`, the depth being contiguous. Rows lie one
    // behind the other in groups of 8, `stride` apart; without swizzle, chunks lie `leading` apart.
    std::uint32_t k_major_chunk(std::uint32_t row, std::uint32_t chunk) const {
        const std::uint32_t pitch = span == 0 ? 16 : span;
        return swizzle_address(start + row % 8 * pitch + row / 8 * stride + chunk * (span == 0 ? leading : 16), span);
    }
    // Address of the 16-byte chunk `chunk` (along the rows) at depth `k`, the rows being contiguous. With swizzle, a span
    // of rows lies in one line, spans are `leading` apart and groups of 8 lines `stride`; without, the other way round.
    std::uint32_t mn_major_chunk(std::uint32_t chunk, std::uint32_t k) const {
        if (span == 0) return start + chunk * stride + k % 8 * 16 + k / 8 * leading;
        const std::uint32_t per_line = span / 16;
        return swizzle_address(start + chunk % per_line * 16 + chunk / per_line * leading + k % 8 * span + k / 8 * stride, span);
    }
};

}  // namespace emulator

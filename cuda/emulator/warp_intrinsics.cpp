// Shuffles and votes; see cuda_language.h and the CUDA C++ Programming Guide, "Warp Shuffle/Vote Functions".
#include "cuda_language.h"

namespace emulator {

namespace {

struct ShuffleOperands {
    ShuffleKind kind;
    std::uint64_t value;
    int operand, width;
};

// The lane whose value `lane` receives.
unsigned source_lane(const ShuffleOperands& operands, unsigned lane) {
    const auto width = static_cast<unsigned>(operands.width);
    const unsigned first = lane & ~(width - 1);
    const auto operand = static_cast<unsigned>(operands.operand);
    switch (operands.kind) {
        case ShuffleKind::Index: return first + (operand & (width - 1));
        case ShuffleKind::Up: return operand <= lane - first ? lane - operand : lane;
        case ShuffleKind::Down: return operand < width - (lane - first) ? lane + operand : lane;
        case ShuffleKind::Xor: break;
    }
    const unsigned source = lane ^ (operand & (kWarpSize - 1));
    return source < first + width ? source : lane;  // earlier segments may be read, later ones not
}

void exchange_values(const WarpExchange& exchange) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        if ((exchange.mask >> lane & 1) == 0) continue;
        const unsigned source = source_lane(*static_cast<const ShuffleOperands*>(exchange.in[lane]), lane);
        *static_cast<std::uint64_t*>(exchange.out[lane]) =
            (exchange.mask >> source & 1) != 0 ? static_cast<const ShuffleOperands*>(exchange.in[source])->value
                                               : kUndefinedLane;
    }
}

}  // namespace

std::uint64_t shuffle(ShuffleKind kind, std::uint32_t mask, std::uint64_t value, int operand, int width) {
    static const char* const names[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
    const char* name = names[static_cast<int>(kind)];
    if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
        raise(FaultKind::InvalidArgument, std::string(name) + ": width " + std::to_string(width) +
                                              " is not a power of two up to 32");
    const ShuffleOperands operands{kind, value, operand, width};
    std::uint64_t result = 0;
    warp_collective(mask, name, &operands, &result, exchange_values);
    return result;
}

std::uint32_t ballot(std::uint32_t mask, bool predicate, const char* operation) {
    std::uint32_t result = 0;
    warp_collective(mask, operation, &predicate, &result, [](const WarpExchange& exchange) {
        std::uint32_t votes = 0;
        for (unsigned lane = 0; lane < kWarpSize; ++lane)
            if ((exchange.mask >> lane & 1) != 0 && *static_cast<const bool*>(exchange.in[lane])) votes |= 1u << lane;
        for (unsigned lane = 0; lane < kWarpSize; ++lane)
            if ((exchange.mask >> lane & 1) != 0) *static_cast<std::uint32_t*>(exchange.out[lane]) = votes;
    });
    return result;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#endif
void multiply_add_16x8(const float* a, const float* b, int depth, double (&sum)[16][8]) {
    for (int k = 0; k < depth; ++k) {
        double column[8];
        for (int n = 0; n < 8; ++n) column[n] = static_cast<double>(b[n * depth + k]);
        for (int m = 0; m < 16; ++m) {
            const double value = static_cast<double>(a[m * depth + k]);
            for (int n = 0; n < 8; ++n) sum[m][n] += value * column[n];
        }
    }
}

}  // namespace emulator

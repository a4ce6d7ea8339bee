// Shuffles, votes, __syncwarp and atomics, as CUDA intrinsics and as PTX wrappers, against plain arithmetic.
#include "../../ptx/shuffle.h"
#include "harness.h"

using emulator::DeviceArray;
using emulator::LaunchConfig;
using harness::contains;
using harness::fault_of;
using harness::under_all_schedules;

namespace {

LaunchConfig two_warps() {
    LaunchConfig config;
    config.block = dim3(64);
    return config;
}

// Runs `kernel(thread) -> value` on two warps and compares with `expected(thread)` under all schedules.
template <class Kernel, class Expected>
void compare(Kernel kernel, Expected expected) {
    under_all_schedules(two_warps(), [&](const LaunchConfig& config) {
        DeviceArray<std::uint32_t> out("out", std::vector<std::uint32_t>(64, 0));
        emulator::launch(config, [&, p = out.data()] { p[threadIdx.x] = kernel(threadIdx.x); });
        const auto result = out.read();
        for (std::uint32_t t = 0; t < 64; ++t) CHECK(result[t] == expected(t));
    });
}

constexpr std::uint32_t kFull = 0xffffffffu;
std::uint32_t value(std::uint32_t thread) { return thread * thread + 17; }

}  // namespace

TEST(shfl_idx_reads_the_named_lane) {
    compare([](std::uint32_t t) { return ptx::shfl_idx(kFull, value(t), (t * 7) % 32); },
            [](std::uint32_t t) { return value(t / 32 * 32 + t * 7 % 32); });
}

TEST(shfl_up_keeps_the_lowest_lanes) {
    compare([](std::uint32_t t) { return ptx::shfl_up(kFull, value(t), 5); },
            [](std::uint32_t t) { return t % 32 < 5 ? value(t) : value(t - 5); });
}

TEST(shfl_down_keeps_the_highest_lanes) {
    compare([](std::uint32_t t) { return ptx::shfl_down(kFull, value(t), 9); },
            [](std::uint32_t t) { return t % 32 > 22 ? value(t) : value(t + 9); });
}

TEST(shfl_bfly_exchanges_lanes) {
    compare([](std::uint32_t t) { return ptx::shfl_bfly(kFull, value(t), 13); },
            [](std::uint32_t t) { return value(t ^ 13); });
}

TEST(shuffles_stay_within_their_width) {
    compare([](std::uint32_t t) { return __shfl_sync(kFull, value(t), 11, 8); },
            [](std::uint32_t t) { return value(t / 8 * 8 + 3); });
    compare([](std::uint32_t t) { return __shfl_down_sync(kFull, value(t), 3, 8); },
            [](std::uint32_t t) { return t % 8 > 4 ? value(t) : value(t + 3); });
    compare([](std::uint32_t t) { return __shfl_up_sync(kFull, value(t), 3, 8); },
            [](std::uint32_t t) { return t % 8 < 3 ? value(t) : value(t - 3); });
    // A later segment may not be read, an earlier one may.
    compare([](std::uint32_t t) { return __shfl_xor_sync(kFull, value(t), 16, 16); },
            [](std::uint32_t t) { return t % 32 < 16 ? value(t) : value(t - 16); });
}

TEST(shuffles_move_eight_byte_values) {
    compare([](std::uint32_t t) {
        const double shifted = __shfl_xor_sync(kFull, 1.0 / (t + 1), 1);
        return static_cast<std::uint32_t>(shifted == 1.0 / ((t ^ 1) + 1));
    }, [](std::uint32_t) { return 1u; });
}

TEST(a_butterfly_sums_a_warp) {
    compare([](std::uint32_t t) {
        std::uint32_t sum = value(t);
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFull, sum, offset);
        return sum;
    }, [](std::uint32_t t) {
        std::uint32_t sum = 0;
        for (std::uint32_t i = 0; i < 32; ++i) sum += value(t / 32 * 32 + i);
        return sum;
    });
}

TEST(two_halves_of_a_warp_may_diverge) {
    compare([](std::uint32_t t) {
        if (t % 32 < 16) return __shfl_xor_sync(0x0000ffffu, value(t), 3);
        return __ballot_sync(0xffff0000u, t % 3 == 0);
    }, [](std::uint32_t t) {
        if (t % 32 < 16) return value(t ^ 3);
        std::uint32_t votes = 0;
        for (std::uint32_t lane = 16; lane < 32; ++lane)
            if ((t / 32 * 32 + lane) % 3 == 0) votes |= 1u << lane;
        return votes;
    });
}

TEST(votes_agree_with_counting) {
    compare([](std::uint32_t t) {
        return static_cast<std::uint32_t>(__any_sync(kFull, t == 40) * 4 + __all_sync(kFull, t < 40) * 2 +
                                          __all_sync(kFull, t != 5));
    }, [](std::uint32_t t) { return t < 32 ? 2u : 5u; });
}

TEST(syncwarp_orders_shared_memory_within_a_warp) {
    auto config = two_warps();
    config.dynamic_shared_bytes = 64 * 4;
    under_all_schedules(config, [](const LaunchConfig& c) {
        DeviceArray<std::uint32_t> out("out", std::vector<std::uint32_t>(64, 0));
        emulator::launch(c, [p = out.data()] {
            auto* shared = ptx::dynamic_shared<std::uint32_t>();
            shared[threadIdx.x] = value(threadIdx.x);
            __syncwarp();
            p[threadIdx.x] = shared[threadIdx.x ^ 31];
        });
        const auto result = out.read();
        for (std::uint32_t t = 0; t < 64; ++t) CHECK(result[t] == value(t ^ 31));
    });
}

TEST(atomics_lose_nothing) {
    LaunchConfig config;
    config.grid = dim3(6);
    config.block = dim3(96);
    config.resident_blocks = 3;
    under_all_schedules(config, [](const LaunchConfig& c) {
        DeviceArray<std::uint32_t> cells("cells", {0u, 0u, 1000u, 0u, 0u});
        DeviceArray<float> sum("sum", std::vector<float>{0.0f});
        emulator::launch(c, [p = cells.data(), s = sum.data()] {
            const std::uint32_t id = blockIdx.x * 96 + threadIdx.x;
            atomicAdd(p, 1u);
            atomicMax(p + 1, id);
            atomicMin(p + 2, id + 3);
            std::uint32_t seen = 0, old;
            while ((old = atomicCAS(p + 3, seen, seen + 2)) != seen) seen = old;
            atomicExch(p + 4, 7u);
            atomicAdd(s, 0.5f);
        });
        const auto result = cells.read();
        CHECK(result[0] == 576 && result[1] == 575 && result[2] == 3 && result[3] == 1152 && result[4] == 7);
        CHECK(sum.read()[0] == 288.0f);
    });
}

TEST(a_lane_outside_the_mask_is_reported) {
    const auto message = fault_of([] {
        emulator::launch(two_warps(), [] { __shfl_xor_sync(0x7fffffffu, 1, 1); });
    });
    CHECK(contains(message, "warp mismatch"));
}

TEST(a_missing_lane_is_a_deadlock_that_names_the_collective) {
    const auto message = fault_of([] {
        emulator::launch(two_warps(), [] {
            if (threadIdx.x != 9) __shfl_xor_sync(kFull, 1, 1);
        });
    });
    CHECK(contains(message, "threads 0-8, 10-31 at warp collective shfl.bfly of lanes 0-31"));
    CHECK(contains(message, "threads 9, 32-63 exited"));
}

TEST(lanes_in_different_collectives_are_reported) {
    const auto message = fault_of([] {
        emulator::launch(two_warps(), [] {
            if (threadIdx.x % 2 == 0)
                __shfl_xor_sync(kFull, 1, 1);
            else
                __shfl_down_sync(kFull, 1, 1u);
        });
    });
    CHECK(contains(message, "another lane of the mask executes shfl."));
}

TEST(a_lane_outside_the_mask_gives_poison) {
    LaunchConfig config;
    config.block = dim3(32);
    DeviceArray<int> nans("nans", std::vector<int>(32, 0));
    emulator::launch(config, [p = nans.data()] {
        if (threadIdx.x < 16) p[threadIdx.x] = std::isnan(__shfl_down_sync(0xffffu, 1.0f, 8));
    });
    const auto result = nans.read();
    for (int lane = 0; lane < 16; ++lane) CHECK(result[lane] == (lane >= 8));
}

TEST_MAIN

// wgmma on the emulator: what is in flight, what is read when, and what is reported. The numbers of all shapes and layouts
// are those of the conformance tests (crates/cuda/tests/conformance.rs).
#include "../../ptx/proxy_fence.h"
#include "../../ptx/register_budget.h"
#include "../../ptx/wgmma.h"
#include "harness.h"

using emulator::Completion;
using emulator::DeviceArray;
using emulator::LaunchConfig;
using harness::contains;
using harness::fault_of;
using harness::under_all_schedules;

namespace {

constexpr ptx::Swizzle kNone = ptx::Swizzle::None;

LaunchConfig warpgroup(unsigned threads = 128) {
    LaunchConfig config;
    config.block = dim3(threads);
    config.dynamic_shared_bytes = 4096;
    return config;
}

// A (64 x 16) all ones and B (8 x 16) all `value`, without swizzle: every element of the product is 16 value.
struct Tiles {
    uint64_t a, b;
    __nv_bfloat16 *a_elements, *b_elements;
};
Tiles fill(float value) {
    auto* elements = ptx::dynamic_shared<__nv_bfloat16>();
    for (unsigned i = threadIdx.x; i < 64 * 16; i += 128) elements[i] = __float2bfloat16(1.0f);
    for (unsigned i = threadIdx.x; i < 8 * 16; i += 128) elements[1024 + i] = __float2bfloat16(value);
    const auto base = ptx::shared_address(elements);
    return {ptx::wgmma_descriptor(base, 128, 256, kNone), ptx::wgmma_descriptor(base + 2048, 128, 256, kNone), elements,
            elements + 1024};
}

void publish() {
    ptx::fence_proxy_async_shared();
    __syncthreads();
}

// The fault of one warpgroup that executes `body`, the first one of all schedules.
std::string first_fault(const std::function<void()>& body, unsigned threads = 128) {
    std::string fault;
    under_all_schedules(warpgroup(threads), [&](const LaunchConfig& config) {
        if (fault.empty()) fault = fault_of([&] { emulator::launch(config, body); });
    });
    return fault;
}

}  // namespace

TEST(accumulators_are_undefined_until_the_wait) {
    under_all_schedules(warpgroup(), [](const LaunchConfig& config) {
        DeviceArray<float> out("out", 128 * 3);
        emulator::launch(config, [o = out.data()] {
            const auto tiles = fill(2.0f);
            publish();
            float d[4] = {};
            ptx::wgmma_fence();
            ptx::wgmma_bf16<8>(d, tiles.a, tiles.b, false);
            ptx::wgmma_commit_group();
            ptx::wgmma_bf16<8>(d, tiles.a, tiles.b, true);
            ptx::wgmma_commit_group();
            o[threadIdx.x * 3] = std::isnan(d[0]);
            ptx::wgmma_wait_group<1>();  // the second group still has them
            o[threadIdx.x * 3 + 1] = std::isnan(d[3]);
            ptx::wgmma_wait_group<0>();
            o[threadIdx.x * 3 + 2] = d[1];
        });
        const float late = config.completion == Completion::Lazy ? 1.0f : 0.0f;
        const auto result = out.read();
        for (unsigned i = 0; i < 128; ++i)
            CHECK(result[i * 3] == late && result[i * 3 + 1] == late && result[i * 3 + 2] == 64.0f);
    });
}

TEST(operands_are_read_as_late_as_the_wait) {
    under_all_schedules(warpgroup(), [](const LaunchConfig& config) {
        DeviceArray<float> out("out", 128);
        emulator::launch(config, [o = out.data()] {
            const auto tiles = fill(1.0f);
            publish();
            float d[4];
            ptx::wgmma_fence();
            ptx::wgmma_bf16<8>(d, tiles.a, tiles.b, false);
            ptx::wgmma_commit_group();
            __syncthreads();
            tiles.b_elements[threadIdx.x] = __float2bfloat16(3.0f);
            publish();
            ptx::wgmma_wait_group<0>();
            o[threadIdx.x] = d[0];
        });
        const float expected = config.completion == Completion::Lazy ? 48.0f : 16.0f;
        for (const float value : out.read()) CHECK(value == expected);
    });
}

TEST(ordinary_writes_reach_wgmma_only_through_a_proxy_fence) {
    under_all_schedules(warpgroup(), [](const LaunchConfig& config) {
        DeviceArray<float> out("out", 128);
        emulator::launch(config, [o = out.data()] {
            auto tiles = fill(1.0f);
            publish();
            tiles.b_elements[threadIdx.x] = __float2bfloat16(3.0f);
            __syncthreads();
            float d[4];
            ptx::wgmma_fence();
            ptx::wgmma_bf16<8>(d, tiles.a, tiles.b, false);
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
            o[threadIdx.x] = d[0];
        });
        for (const float value : out.read()) CHECK(value == 16.0f);
    });
}

TEST(misused_wgmma_is_reported) {
    const auto run = [](auto between, bool fence, bool wait) {
        return [=] {
            const auto tiles = fill(1.0f);
            publish();
            float d[4] = {};
            if (fence) ptx::wgmma_fence();
            ptx::wgmma_bf16<8>(d, tiles.a, tiles.b, true);
            between(d, tiles);
            ptx::wgmma_commit_group();
            if (wait) ptx::wgmma_wait_group<0>();
        };
    };
    const auto nothing = [](float (&)[4], const Tiles&) {};
    CHECK(first_fault(run(nothing, true, true)).empty());
    CHECK(contains(first_fault(run(nothing, false, true)), "no wgmma.fence"));
    CHECK(contains(first_fault(run(nothing, true, false)), "exits with a wgmma in flight"));
    CHECK(contains(first_fault(run([](float (&d)[4], const Tiles&) { d[2] = 0.0f; }, true, true)),
                   "accumulator registers were written while a wgmma"));
    const auto second = [](bool fence) {
        return [=](float (&d)[4], const Tiles& tiles) {
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
            d[0] *= 2.0f;
            if (fence) ptx::wgmma_fence();
            ptx::wgmma_bf16<8>(d, tiles.a, tiles.b, true);
        };
    };
    CHECK(first_fault(run(second(true), true, true)).empty());
    CHECK(contains(first_fault(run(second(false), true, true)), "accumulators changed since the last wgmma"));
}

TEST(warpgroups_must_be_whole_and_agree) {
    const auto body = [](unsigned odd_warp, bool skip) {
        return [=] {
            const auto tiles = fill(1.0f);
            publish();
            float d[4], e[8];
            ptx::wgmma_fence();
            const unsigned warp = threadIdx.x / 32;
            if (warp != odd_warp) ptx::wgmma_bf16<8>(d, tiles.a, tiles.b, false);
            else if (!skip) ptx::wgmma_bf16<16>(e, tiles.a, tiles.b, false);
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
        };
    };
    CHECK(first_fault(body(4, false)).empty());
    CHECK(contains(first_fault(body(2, false)), "different instructions"));
    const auto missing = first_fault(body(1, true));
    CHECK(contains(missing, "deadlock") && contains(missing, "wgmma.wait_group of warpgroup 0"));
    CHECK(contains(first_fault(body(4, false), 96), "fewer than 128 threads"));
}

TEST(descriptors_are_checked) {
    const auto with = [](uint32_t offset, ptx::Swizzle swizzle, uint64_t bits) {
        return first_fault([=] {
            fill(1.0f);
            publish();
            const auto base = ptx::shared_address(ptx::dynamic_shared<char>());
            const auto a = ptx::wgmma_descriptor(base + offset, 128, 256, swizzle) | bits;
            float d[4];
            ptx::wgmma_fence();
            ptx::wgmma_bf16<8>(d, a, ptx::wgmma_descriptor(base, 128, 256, kNone), false);
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
        });
    };
    CHECK(with(0, kNone, 0).empty());
    CHECK(contains(with(0, kNone, uint64_t{1} << 50), "base offset"));
    CHECK(contains(with(0, kNone, uint64_t{1} << 15), "bits outside its fields"));
    CHECK(contains(with(128, ptx::Swizzle::B128, 0), "128-byte swizzle's pattern"));
    CHECK(contains(with(3072, kNone, 0), "out of bounds"));
}

TEST(registers_move_between_warpgroups) {
    const auto run = [](bool release) {
        return first_fault(
            [=] {
                if (threadIdx.x < 128) {
                    if (release) ptx::setmaxnreg_dec<24>();
                } else {
                    ptx::setmaxnreg_inc<240>();
                }
            },
            384);
    };
    CHECK(run(true).empty());
    const auto stuck = run(false);
    CHECK(contains(stuck, "deadlock") && contains(stuck, "setmaxnreg.inc"));
    CHECK(contains(first_fault([] { ptx::setmaxnreg_dec<240>(), ptx::setmaxnreg_inc<24>(); }), "setmaxnreg.inc to 24"));
    CHECK(contains(first_fault([] {
                       if (threadIdx.x < 96) ptx::setmaxnreg_dec<24>();
                   }),
                   "deadlock"));
}

TEST_MAIN

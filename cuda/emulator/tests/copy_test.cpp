// Loads and stores with cache hints, and cp.async, against plain copies.
#include "../../ptx/cp_async.h"
#include "../../ptx/load_store.h"
#include "harness.h"

using emulator::Completion;
using emulator::DeviceArray;
using emulator::LaunchConfig;
using harness::contains;
using harness::fault_of;
using harness::under_all_schedules;

namespace {

std::vector<std::uint32_t> numbers(std::size_t count) {
    std::vector<std::uint32_t> values(count);
    harness::Values random(5);
    for (auto& value : values) value = random.bits();
    return values;
}

LaunchConfig one_block(unsigned threads, std::size_t shared = 0) {
    LaunchConfig config;
    config.block = dim3(threads);
    config.dynamic_shared_bytes = shared;
    return config;
}

}  // namespace

TEST(hinted_loads_and_stores_move_the_bytes) {
    const auto host = numbers(64 * 4 * 5);
    under_all_schedules(one_block(64), [&](const LaunchConfig& config) {
        DeviceArray<std::uint32_t> in("in", host), out("out", host.size() + 64);
        emulator::launch(config, [i = in.data(), o = out.data()] {
            const auto policy = threadIdx.x % 2 == 0 ? ptx::createpolicy_evict_first() : ptx::createpolicy_evict_last();
            const unsigned t = threadIdx.x * 4;
            ptx::st_global_cg_v4(o + t, ptx::ld_global_nc_v4(i + t));
            ptx::st_global_cs_v4(o + 256 + t, ptx::ld_global_nc_v4(i + 256 + t, policy));
            ptx::st_global_cg_v4(o + 512 + t, ptx::ld_global_cg_v4(i + 512 + t));
            ptx::st_global_cs_v4(o + 768 + t, ptx::ld_global_cs_v4(i + 768 + t));
            for (unsigned k = 0; k < 4; ++k) ptx::st_global_cs_u32(o + 1024 + t + k, ptx::ld_global_nc_u32(i + 1024 + t + k));
            ptx::st_global_cs_u32(o + 1280 + threadIdx.x, threadIdx.x);
        });
        const auto result = out.read();
        for (std::size_t k = 0; k < host.size(); ++k) CHECK(result[k] == host[k]);
        for (std::size_t k = 0; k < 64; ++k) CHECK(result[host.size() + k] == k);
    });
}

TEST(misaligned_vector_loads_are_reported) {
    DeviceArray<std::uint32_t> in("in", numbers(64));
    const auto message = fault_of([&] { emulator::launch(one_block(1), [i = in.data()] { ptx::ld_global_nc_v4(i + 1); }); });
    CHECK(contains(message, "misaligned"));
    CHECK(contains(message, "byte 4 of 'in'"));
}

TEST(a_vector_load_over_the_end_is_reported) {
    DeviceArray<std::uint32_t> in("in", numbers(6));
    const auto message = fault_of([&] { emulator::launch(one_block(1), [i = in.data()] { ptx::ld_global_cg_v4(i + 4); }); });
    CHECK(contains(message, "ld.global.cg.v4 reads 16 bytes at byte 16 of 'in' (24 bytes)"));
}

TEST(loads_of_unwritten_floats_are_reported) {
    DeviceArray<float> in("activations", 8);
    in.data()[0] = in.data()[1] = in.data()[2] = 0.0f;
    const auto message = fault_of([&] { emulator::launch(one_block(1), [i = in.data()] { ptx::ld_global_cs_v4(i); }); });
    CHECK(contains(message, "uninitialised read"));
    CHECK(contains(message, "byte 12 of 'activations'"));
}

TEST(writing_what_was_read_as_read_only_is_reported) {
    DeviceArray<std::uint32_t> data("data", numbers(4));
    const auto message = fault_of([&] {
        emulator::launch(one_block(1), [p = data.data()] { p[2] = ptx::ld_global_nc_v4(p).z + 1; });
    });
    CHECK(contains(message, "read-only violated"));
}

TEST(cp_async_copies_every_size) {
    const auto host = numbers(32 * 11);
    under_all_schedules(one_block(32, 32 * 44), [&](const LaunchConfig& config) {
        DeviceArray<std::uint32_t> in("in", host), out("out", host.size());
        emulator::launch(config, [i = in.data(), o = out.data()] {
            auto* shared = ptx::dynamic_shared<std::uint32_t>();
            const auto base = ptx::shared_address(shared);
            const unsigned t = threadIdx.x;
            ptx::cp_async_cg_16(base + t * 16, i + t * 4);
            ptx::cp_async_ca<16>(base + 512 + t * 16, i + 128 + t * 4);
            ptx::cp_async_commit_group();
            ptx::cp_async_ca<8>(base + 1024 + t * 8, i + 256 + t * 2);
            ptx::cp_async_ca<4>(base + 1280 + t * 4, i + 320 + t);
            ptx::cp_async_wait_all();
            __syncthreads();
            for (unsigned k = t; k < 32 * 11; k += 32) o[k] = shared[k];
        });
        CHECK(out.read() == host);
    });
}

TEST(cp_async_zero_fills_what_it_does_not_read) {
    const auto host = numbers(8);
    under_all_schedules(one_block(1, 32), [&](const LaunchConfig& config) {
        DeviceArray<std::uint32_t> in("in", host), out("out", 8);
        emulator::launch(config, [i = in.data(), o = out.data()] {
            auto* shared = ptx::dynamic_shared<std::uint32_t>();
            ptx::cp_async_cg_16_zfill(ptx::shared_address(shared), i, 8);
            ptx::cp_async_cg_16_zfill(ptx::shared_address(shared + 4), nullptr, 0);
            ptx::cp_async_commit_group();
            ptx::cp_async_wait_group<0>();
            for (unsigned k = 0; k < 8; ++k) o[k] = shared[k];
        });
        CHECK((out.read() == std::vector<std::uint32_t>{host[0], host[1], 0, 0, 0, 0, 0, 0}));
    });
}

TEST(cp_async_groups_complete_in_order_and_only_when_waited_for) {
    DeviceArray<float> in("in", std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8});
    for (auto completion : {Completion::Eager, Completion::Lazy}) {
        auto config = one_block(1, 32);
        config.completion = completion;
        DeviceArray<float> out("out", 6);
        emulator::launch(config, [i = in.data(), o = out.data()] {
            auto* shared = ptx::dynamic_shared<float>();
            for (unsigned g = 0; g < 2; ++g) {
                ptx::cp_async_cg_16(ptx::shared_address(shared + 4 * g), i + 4 * g);
                ptx::cp_async_commit_group();
            }
            // isnan as 0 or 1, since a NaN would look unwritten
            o[0] = std::isnan(shared[0]);
            o[1] = std::isnan(shared[4]);
            ptx::cp_async_wait_group<1>();
            o[2] = shared[3];
            o[3] = std::isnan(shared[7]);
            ptx::cp_async_wait_group<0>();
            o[4] = shared[3];
            o[5] = shared[7];
        });
        const float late = completion == Completion::Lazy ? 1.0f : 0.0f;
        CHECK((out.read() == std::vector<float>{late, late, 4, late, 4, 8}));
    }
}

TEST(cp_async_checks_both_addresses) {
    DeviceArray<std::uint32_t> in("in", numbers(8));
    const auto fault = [&](unsigned shared_word, unsigned global_word) {
        return fault_of([&] {
            emulator::launch(one_block(1, 32), [=, i = in.data()] {
                ptx::cp_async_cg_16(ptx::shared_address(ptx::dynamic_shared<std::uint32_t>()) + 4 * shared_word,
                                    i + global_word);
            });
        });
    };
    CHECK(fault(4, 4).empty());
    CHECK(contains(fault(5, 0), "out of bounds"));
    CHECK(contains(fault(2, 0), "misaligned"));
    CHECK(contains(fault(0, 5), "out of bounds"));
    CHECK(contains(fault(0, 2), "misaligned"));
}

TEST_MAIN

// Bulk and tensor copies on the emulator: layouts, zeros outside, when stores read and write, and what is reported.
#include "../../ptx/proxy_fence.h"
#include "../../ptx/tensor_copy.h"
#include "harness.h"

using emulator::Completion;
using emulator::DeviceArray;
using emulator::LaunchConfig;
using emulator::TensorMapSpec;
using harness::contains;
using harness::fault_of;
using harness::under_all_schedules;

namespace {

LaunchConfig one_warp(std::size_t shared) {
    LaunchConfig config;
    config.block = dim3(32);
    config.dynamic_shared_bytes = shared;
    return config;
}

// A packed tensor of 2-byte elements.
TensorMapSpec packed(const void* address, std::vector<std::uint64_t> dims, std::vector<std::uint32_t> box, std::uint32_t swizzle) {
    TensorMapSpec spec{reinterpret_cast<std::uint64_t>(address), 2, static_cast<std::uint32_t>(dims.size()), {}, {}, {}, swizzle};
    std::uint64_t stride = 2;
    for (std::size_t d = 0; d < dims.size(); ++d) {
        spec.dims[d] = dims[d];
        spec.strides[d] = stride;
        spec.box[d] = box[d];
        stride *= dims[d];
    }
    return spec;
}

ptx::TensorMap encode(const TensorMapSpec& spec) {
    ptx::TensorMap map;
    if (const auto problem = emulator::encode_tensor_map(spec, map.words)) throw harness::CheckFailed{*problem};
    return map;
}

std::vector<std::uint16_t> numbers(std::size_t count) {
    std::vector<std::uint16_t> values(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<std::uint16_t>(i + 1);
    return values;
}

// One thread loads a box and waits for it.
template <int Rank>
void load(const ptx::TensorMap& map, const int32_t (&at)[Rank], uint32_t bytes) {
    PTX_SHARED_ARRAY(uint64_t, full, 1);
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(full, bytes);
        ptx::cp_async_bulk_tensor_load(ptx::dynamic_shared<char>(), &map, at, full);
    }
    __syncthreads();
    ptx::mbarrier_wait_parity(full, 0);
}

}  // namespace

TEST(a_box_of_five_dimensions_lands_in_order_with_zeros_outside) {
    const std::uint64_t dims[5] = {16, 3, 2, 3, 2};
    const auto host = numbers(16 * 3 * 2 * 3 * 2);
    under_all_schedules(one_warp(8 * 2 * 2 * 2 * 2 * 2), [&](const LaunchConfig& config) {
        DeviceArray<std::uint16_t> in("in", host), out("out", 128);
        const auto map = encode(packed(in.data(), {16, 3, 2, 3, 2}, {8, 2, 2, 2, 2}, 0));
        emulator::launch(config, [&, o = out.data()] {
            load(map, {12, -1, 1, 1, 0}, 256);
            for (unsigned i = threadIdx.x; i < 128; i += 32) o[i] = ptx::dynamic_shared<std::uint16_t>()[i];
        });
        const auto result = out.read();
        for (int i = 0; i < 128; ++i) {
            const int at[5] = {12 + i % 8, -1 + i / 8 % 2, 1 + i / 16 % 2, 1 + i / 32 % 2, i / 64};
            std::size_t index = 0;
            bool inside = true;
            for (int d = 4; d >= 0; --d) {
                inside &= at[d] >= 0 && at[d] < static_cast<int>(dims[d]);
                index = index * dims[d] + static_cast<std::size_t>(at[d]);
            }
            CHECK(result[static_cast<std::size_t>(i)] == (inside ? host[index] : 0));
        }
    });
}

TEST(swizzles_exchange_chunks_by_line) {
    for (const unsigned span : {32u, 64u, 128u}) {
        const unsigned columns = span / 2, rows = 16;
        const auto host = numbers(columns * rows);
        under_all_schedules(one_warp(span * rows), [&](const LaunchConfig& config) {
            DeviceArray<std::uint16_t> in("in", host), raw("raw", host.size()), back("back", host.size());
            const auto map = encode(packed(in.data(), {columns, rows}, {columns, rows}, span));
            const auto map_back = encode(packed(back.data(), {columns, rows}, {columns, rows}, span));
            emulator::launch(config, [&, o = raw.data()] {
                load(map, {0, 0}, span * rows);
                auto* shared = ptx::dynamic_shared<std::uint16_t>();
                for (unsigned i = threadIdx.x; i < columns * rows; i += 32) o[i] = shared[i];
                if (threadIdx.x == 0) {
                    ptx::cp_async_bulk_tensor_store(&map_back, {0, 0}, shared);
                    ptx::cp_async_bulk_commit_group();
                    ptx::cp_async_bulk_wait_group<0>();
                }
            });
            CHECK(back.read() == host);
            const auto result = raw.read();
            for (unsigned row = 0; row < rows; ++row)
                for (unsigned column = 0; column < columns; ++column) {
                    // Row r of a span of S bytes lies in 128-byte line r S / 128; chunks trade places by that number.
                    const unsigned line = row * span / 128, chunk = (column / 8) ^ line % (span / 16);
                    CHECK(result[row * columns + chunk * 8 + column % 8] == host[row * columns + column]);
                }
        });
    }
}

TEST(stores_leave_out_what_is_outside) {
    under_all_schedules(one_warp(256), [](const LaunchConfig& config) {
        const std::vector<std::uint16_t> zeros(8 * 3, 0);
        DeviceArray<std::uint16_t> out("out", zeros);
        const auto map = encode(packed(out.data(), {8, 3}, {16, 4}, 0));
        emulator::launch(config, [&] {
            auto* shared = ptx::dynamic_shared<std::uint16_t>();
            for (unsigned i = threadIdx.x; i < 64; i += 32) shared[i] = static_cast<std::uint16_t>(i + 1);
            ptx::fence_proxy_async_shared();
            __syncthreads();
            if (threadIdx.x == 0) {
                ptx::cp_async_bulk_tensor_store(&map, {-4, 1}, shared);
                ptx::cp_async_bulk_commit_group();
                ptx::cp_async_bulk_wait_group_read<0>();
            }
        });
        const auto result = out.read();
        for (unsigned row = 0; row < 3; ++row)
            for (unsigned column = 0; column < 8; ++column)
                CHECK(result[row * 8 + column] == (row == 0 ? 0u : (row - 1) * 16 + column + 4 + 1));
    });
}

TEST(bulk_stores_read_and_write_as_late_as_the_waits) {
    under_all_schedules(one_warp(64), [](const LaunchConfig& config) {
        DeviceArray<float> destination("destination", 8), out("out", 3);
        emulator::launch(config, [d = destination.data(), o = out.data()] {
            if (threadIdx.x != 0) return;
            auto* shared = ptx::dynamic_shared<float>();
            const auto set = [&](float value) {
                for (unsigned i = 0; i < 8; ++i) shared[i] = value;
                ptx::fence_proxy_async_shared();
            };
            set(1.0f);
            ptx::cp_async_bulk_store(d, shared, 32);
            ptx::cp_async_bulk_commit_group();
            set(2.0f);  // too early: the store may not have read
            ptx::cp_async_bulk_wait_group_read<0>();
            set(3.0f);
            o[0] = std::isnan(d[0]);
            ptx::cp_async_bulk_wait_group<0>();
            o[1] = d[0];
            o[2] = d[7];
        });
        const bool lazy = config.completion == Completion::Lazy;
        CHECK((out.read() == std::vector<float>{lazy ? 1.0f : 0.0f, lazy ? 2.0f : 1.0f, lazy ? 2.0f : 1.0f}));
    });
}

TEST(impossible_tensor_maps_are_refused) {
    DeviceArray<std::uint16_t> tensor("tensor", numbers(1024));
    const auto problem = [&](auto change) {
        auto spec = packed(tensor.data(), {64, 16}, {64, 8}, 128);
        change(spec);
        ptx::TensorMap map;
        return emulator::encode_tensor_map(spec, map.words).value_or("");
    };
    CHECK(problem([](TensorMapSpec&) {}).empty());
    CHECK(contains(problem([](TensorMapSpec& s) { s.address += 8; }), "multiple of 16"));
    CHECK(contains(problem([](TensorMapSpec& s) { s.rank = 1; }), "dimensions"));
    CHECK(contains(problem([](TensorMapSpec& s) { s.dims[1] = 0; }), "0 elements"));
    CHECK(contains(problem([](TensorMapSpec& s) { s.box[1] = 257; }), "257 elements in dimension 1"));
    CHECK(contains(problem([](TensorMapSpec& s) { s.strides[1] = 136; }), "stride of dimension 1 is 136"));
    CHECK(contains(problem([](TensorMapSpec& s) { s.box[0] = 4, s.swizzle = 0; }), "8 bytes wide"));
    CHECK(contains(problem([](TensorMapSpec& s) { s.box[0] = 128; }), "256 bytes wide; with a swizzle of 128"));
    CHECK(contains(problem([](TensorMapSpec& s) { s.swizzle = 48; }), "swizzle of 48"));
}

TEST(misused_tensor_copies_are_reported) {
    DeviceArray<std::uint16_t> tensor("tensor", numbers(1024));
    const auto map = encode(packed(tensor.data(), {64, 16}, {64, 8}, 128));
    auto beyond = packed(tensor.data(), {64, 17}, {64, 8}, 128);
    const auto too_long = encode(beyond);
    const auto fault = [&](auto body) {
        return fault_of([&] {
            emulator::launch(one_warp(4096), [&] {
                if (threadIdx.x == 0) body(ptx::dynamic_shared<char>());
            });
        });
    };
    const auto load_from = [&](const ptx::TensorMap* from, int32_t row, unsigned offset) {
        return fault([=](char* shared) {
            PTX_SHARED_ARRAY(uint64_t, full, 1);
            ptx::mbarrier_init(full, 1);
            ptx::mbarrier_arrive_expect_tx(full, 1024);
            ptx::cp_async_bulk_tensor_load(shared + offset, from, {0, row}, full);
            ptx::mbarrier_wait_parity(full, 0);
        });
    };
    CHECK(load_from(&map, 0, 0).empty());
    CHECK(contains(load_from(&map, 0, 64), "misaligned"));
    CHECK(contains(load_from(&map, 0, 4096 - 512), "out of bounds"));
    CHECK(contains(load_from(&too_long, 9, 0), "out of bounds"));
    const ptx::TensorMap none{};
    CHECK(contains(load_from(&none, 0, 0), "no tensor map"));
    CHECK(contains(fault([&](char*) {
                       const ptx::TensorMap copy = map;
                       ptx::prefetch_tensormap(&copy);
                   }),
                   "local copy"));
    CHECK(contains(fault([&](char* shared) { ptx::cp_async_bulk_tensor_store(&map, {0, 0, 0}, shared); }), "3 dimensions"));
    CHECK(contains(fault([&](char* shared) {
                       ptx::cp_async_bulk_tensor_store(&map, {0, 0}, shared);
                       ptx::cp_async_bulk_commit_group();
                   }),
                   "bulk stores still read"));
    CHECK(contains(fault([&](char* shared) { ptx::cp_async_bulk_store(tensor.data(), shared, 24); }), "multiple of 16"));
}

TEST_MAIN

// Threads, blocks, memories, barriers and fault reports of the emulator.
#include "../../ptx/named_barrier.h"
#include "../../ptx/synchronising_access.h"
#include "harness.h"

using emulator::DeviceArray;
using emulator::FaultKind;
using emulator::LaunchConfig;
using harness::contains;
using harness::fault_of;
using harness::under_all_schedules;

TEST(every_thread_of_a_three_dimensional_grid_runs_once) {
    LaunchConfig config;
    config.grid = dim3(3, 2, 2);
    config.block = dim3(5, 3, 4);
    config.resident_blocks = 4;
    under_all_schedules(config, [](const LaunchConfig& c) {
        const unsigned threads = c.block.count();
        DeviceArray<unsigned> counts("counts", std::vector<unsigned>(c.grid.count() * threads, 0));
        unsigned* p = counts.data();
        emulator::launch(c, [=] {
            const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
            const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
            p[block * threads + thread] += 1;
        });
        for (unsigned count : counts.read()) CHECK(count == 1);
    });
}

// Reverses 256 values per block through shared memory.
static void reverse(const float* in, float* out) {
    PTX_SHARED_ARRAY(float, tile, 256);
    const unsigned base = blockIdx.x * 256;
    tile[threadIdx.x] = in[base + threadIdx.x];
    __syncthreads();
    out[base + threadIdx.x] = tile[255 - threadIdx.x];
}

TEST(static_shared_memory_belongs_to_one_of_several_resident_blocks) {
    std::vector<float> host(4 * 256);
    for (std::size_t i = 0; i < host.size(); ++i) host[i] = static_cast<float>(i);
    LaunchConfig config;
    config.grid = dim3(4);
    config.block = dim3(256);
    config.resident_blocks = 4;
    under_all_schedules(config, [&](const LaunchConfig& c) {
        DeviceArray<float> in("in", host), out("out", host.size());
        emulator::launch(c, [i = in.data(), o = out.data()] { reverse(i, o); });
        const auto result = out.read();
        for (unsigned b = 0; b < 4; ++b)
            for (unsigned t = 0; t < 256; ++t) CHECK(result[b * 256 + t] == host[b * 256 + 255 - t]);
    });
}

TEST(shared_memory_starts_as_nan_in_every_block) {
    LaunchConfig config;
    config.grid = dim3(3);
    config.block = dim3(32);
    config.dynamic_shared_bytes = 128;
    config.resident_blocks = 1;
    DeviceArray<int> nans("nans", std::vector<int>(96, 0));
    emulator::launch(config, [p = nans.data()] {
        auto* shared = ptx::dynamic_shared<float>();
        PTX_SHARED_ARRAY(float, fixed, 32);
        p[blockIdx.x * 32 + threadIdx.x] = std::isnan(shared[threadIdx.x]) && std::isnan(fixed[threadIdx.x]);
        shared[threadIdx.x] = fixed[threadIdx.x] = 1.0f;
    });
    for (int nan : nans.read()) CHECK(nan == 1);
}

TEST(a_seed_gives_one_schedule_and_seeds_differ) {
    const auto order = [](std::uint64_t seed) {
        LaunchConfig config;
        config.block = dim3(128);
        config.seed = seed;
        std::vector<unsigned> sequence;
        emulator::launch(config, [&] { sequence.push_back(threadIdx.x); });
        return sequence;
    };
    CHECK(order(7) == order(7));
    CHECK(order(7) != order(8));
}

TEST(every_warp_starves_under_some_seed) {
    bool last[4] = {};
    for (std::uint64_t seed = 1; seed <= 64; ++seed) {
        LaunchConfig config;
        config.block = dim3(128);
        config.seed = seed;
        unsigned final_warp = 0;
        emulator::launch(config, [&] { final_warp = threadIdx.x / 32; });
        last[final_warp] = true;
    }
    for (bool starved : last) CHECK(starved);
}

TEST(named_barriers_pass_data_between_producer_and_consumer_warps) {
    LaunchConfig config;
    config.block = dim3(64);
    config.dynamic_shared_bytes = 32 * sizeof(int);
    under_all_schedules(config, [](const LaunchConfig& c) {
        DeviceArray<int> out("out", std::vector<int>(8 * 32, -1));
        emulator::launch(c, [p = out.data()] {
            auto* slot = ptx::dynamic_shared<int>();
            const unsigned lane = threadIdx.x % 32;
            for (int round = 0; round < 8; ++round) {
                if (threadIdx.x < 32) {
                    if (round > 0) ptx::bar_sync(2, 64);  // the slot is free again
                    slot[lane] = round * 100 + static_cast<int>(lane);
                    ptx::bar_arrive(1, 64);
                } else {
                    ptx::bar_sync(1, 64);
                    p[round * 32 + static_cast<int>(lane)] = slot[31 - lane];
                    if (round < 7) ptx::bar_arrive(2, 64);
                }
            }
        });
        const auto result = out.read();
        for (int round = 0; round < 8; ++round)
            for (int lane = 0; lane < 32; ++lane) CHECK(result[round * 32 + lane] == round * 100 + 31 - lane);
    });
}

TEST(a_deadlock_names_the_barrier_and_the_threads) {
    LaunchConfig config;
    config.name = "half";
    config.block = dim3(96);
    const auto message = fault_of([&] {
        emulator::launch(config, [] {
            if (threadIdx.x < 64) __syncthreads();
        });
    });
    CHECK(contains(message, "deadlock: in 'half'"));
    CHECK(contains(message, "barrier 0 (__syncthreads at core_test.cpp:"));
    CHECK(contains(message, "64 of 96 threads arrived"));
    CHECK(contains(message, "threads 0-63 at barrier 0"));
    CHECK(contains(message, "threads 64-95 exited"));
}

TEST(different_syncthreads_do_not_match) {
    LaunchConfig config;
    config.block = dim3(64);
    const auto message = fault_of([&] {
        emulator::launch(config, [] {
            if (threadIdx.x < 32)
                __syncthreads();
            else
                __syncthreads();
        });
    });
    CHECK(contains(message, "divergent barrier"));
}

TEST(named_barriers_with_two_counts_are_reported) {
    LaunchConfig config;
    config.block = dim3(96);
    const auto message = fault_of([&] { emulator::launch(config, [] { ptx::bar_sync(3, threadIdx.x < 32 ? 64 : 96); }); });
    CHECK(contains(message, "divergent barrier"));
    CHECK(contains(message, "barrier 3 is used with"));
}

TEST(a_fault_names_the_allocation_read_past_its_end) {
    LaunchConfig config;
    config.block = dim3(32);
    DeviceArray<float> in("weights", std::vector<float>(1024, 1.0f)), out("out", 32);
    const auto message = fault_of(
        [&] { emulator::launch(config, [i = in.data(), o = out.data()] { o[threadIdx.x] = i[1024 + threadIdx.x]; }); });
    CHECK(contains(message, "out of bounds"));
    CHECK(contains(message, "of 'weights' (4096 bytes)"));
}

TEST(a_write_before_an_allocation_damages_its_red_zone) {
    LaunchConfig config;
    DeviceArray<float> out("out", 32);
    const auto message = fault_of([&] { emulator::launch(config, [o = out.data()] { o[-3] = 1.0f; }); });
    CHECK(contains(message, "red zone overwritten at byte -12 of 'out'"));
}

TEST(a_write_behind_shared_memory_damages_its_red_zone) {
    LaunchConfig config;
    config.dynamic_shared_bytes = 64;
    const auto message =
        fault_of([&] { emulator::launch(config, [] { ptx::dynamic_shared<float>()[16] = 1.0f; }); });
    CHECK(contains(message, "red zone of shared memory overwritten at shared address 1088"));
}

TEST(a_stack_overflow_is_a_fault) {
    LaunchConfig config;
    const auto message = fault_of([&] {
        emulator::launch(config, [] {
            volatile char frame[200 * 1024];
            for (std::size_t i = sizeof(frame); i > 0; i -= 1024) frame[i - 1] = 1;
        });
    });
    CHECK(contains(message, "overflowed its stack"));
}

TEST(an_unwritten_output_element_is_reported) {
    LaunchConfig config;
    config.block = dim3(31);
    DeviceArray<__nv_bfloat16> out("out", 32);
    emulator::launch(config, [o = out.data()] { o[threadIdx.x] = __float2bfloat16(0.0f); });
    CHECK(contains(fault_of([&] { out.read(); }), "element 31 of 'out' was never written"));
}

TEST(an_exception_in_a_kernel_reaches_the_host) {
    const auto message = fault_of([] { emulator::launch({}, [] { throw std::runtime_error("bad page"); }); });
    CHECK(contains(message, "kernel exception"));
    CHECK(contains(message, "bad page"));
}

TEST(impossible_launches_are_refused) {
    const auto refused = [](const LaunchConfig& config) {
        return contains(fault_of([&] { emulator::launch(config, [] {}); }), "invalid argument");
    };
    LaunchConfig threads, shared, grid, tall, resident;
    threads.block = dim3(1025);
    shared.dynamic_shared_bytes = 227 * 1024 + 1;
    grid.grid = dim3(0);
    tall.grid = dim3(1, 65536);
    resident.resident_blocks = 0;
    CHECK(refused(threads) && refused(shared) && refused(grid) && refused(tall) && refused(resident));
}

TEST(a_launch_after_a_fault_works) {
    LaunchConfig config;
    config.block = dim3(64);
    CHECK(!fault_of([&] { emulator::launch(config, [] { if (threadIdx.x == 0) __syncthreads(); }); }).empty());
    DeviceArray<float> out("out", 64);
    emulator::launch(config, [o = out.data()] {
        __syncthreads();
        o[threadIdx.x] = 1.0f;
    });
    CHECK(out.read()[63] == 1.0f);
}

TEST_MAIN

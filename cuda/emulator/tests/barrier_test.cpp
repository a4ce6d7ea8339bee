// mbarriers, bulk copies, and synchronising accesses between blocks.
#include "../../ptx/bulk_copy.h"
#include "../../ptx/system_access.h"
#include "harness.h"

using emulator::Completion;
using emulator::DeviceArray;
using emulator::LaunchConfig;
using harness::contains;
using harness::fault_of;
using harness::under_all_schedules;

namespace {

constexpr unsigned kStages = 3, kTiles = 10, kTileFloats = 64;

LaunchConfig block(unsigned threads) {
    LaunchConfig config;
    config.block = dim3(threads);
    return config;
}

// A producer thread streams tiles through a ring of bulk copies; the two consumer warps double them.
void ring(const float* in, float* out) {
    PTX_SHARED_ARRAY(float, tiles, kStages* kTileFloats);
    PTX_SHARED_ARRAY(uint64_t, full, kStages);
    PTX_SHARED_ARRAY(uint64_t, empty, kStages);
    if (threadIdx.x == 0) {
        for (unsigned s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(&full[s], 1);
            ptx::mbarrier_init(&empty[s], 64);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 64) {
        for (unsigned i = 0; i < kTiles; ++i) {
            const unsigned s = i % kStages;
            ptx::mbarrier_wait_parity(&empty[s], (i / kStages & 1) ^ 1);
            ptx::mbarrier_arrive_expect_tx(&full[s], kTileFloats * 4);
            ptx::cp_async_bulk_load(&tiles[s * kTileFloats], in + i * kTileFloats, kTileFloats * 4, &full[s]);
        }
    } else if (threadIdx.x < 64) {
        for (unsigned i = 0; i < kTiles; ++i) {
            const unsigned s = i % kStages;
            ptx::mbarrier_wait_parity(&full[s], i / kStages & 1);
            out[i * kTileFloats + threadIdx.x] = 2 * tiles[s * kTileFloats + threadIdx.x];
            ptx::mbarrier_arrive(&empty[s]);
        }
    }
}

}  // namespace

TEST(a_ring_of_bulk_copies_delivers_every_tile) {
    std::vector<float> host(kTiles * kTileFloats);
    harness::Values random(2);
    for (auto& x : host) x = random.next();
    under_all_schedules(block(96), [&](const LaunchConfig& config) {
        DeviceArray<float> in("in", host), out("out", host.size());
        emulator::launch(config, [i = in.data(), o = out.data()] { ring(i, o); });
        const auto result = out.read();
        for (std::size_t k = 0; k < host.size(); ++k) CHECK(result[k] == 2 * host[k]);
    });
}

TEST(phases_alternate) {
    DeviceArray<int> out("out", std::vector<int>(6, -1));
    emulator::launch(block(1), [o = out.data()] {
        PTX_SHARED_ARRAY(uint64_t, barrier, 1);
        ptx::mbarrier_init(barrier, 2);
        o[0] = ptx::mbarrier_test_wait_parity(barrier, 1);  // the phase before the first counts as complete
        ptx::mbarrier_arrive(barrier);
        o[1] = ptx::mbarrier_test_wait_parity(barrier, 0);
        ptx::mbarrier_arrive(barrier);
        o[2] = ptx::mbarrier_test_wait_parity(barrier, 0);
        o[3] = ptx::mbarrier_test_wait_parity(barrier, 1);
        ptx::mbarrier_arrive(barrier);
        ptx::mbarrier_expect_tx(barrier, 64);
        ptx::mbarrier_arrive(barrier);
        o[4] = ptx::mbarrier_test_wait_parity(barrier, 1);  // bytes are missing
        o[5] = 1;
        ptx::mbarrier_inval(barrier);
    });
    CHECK((out.read() == std::vector<int>{1, 0, 1, 0, 0, 1}));
}

TEST(an_mbarrier_deadlock_names_the_barrier_and_what_is_missing) {
    DeviceArray<float> in("in", std::vector<float>(16, 1.0f));
    const auto message = fault_of([&] {
        emulator::launch(block(32), [i = in.data()] {
            PTX_SHARED_ARRAY(float, tile, 16);
            PTX_SHARED_ARRAY(uint64_t, barrier, 1);
            if (threadIdx.x == 0) {
                ptx::mbarrier_init(barrier, 1);
                ptx::mbarrier_arrive_expect_tx(barrier, 80);
                ptx::cp_async_bulk_load(tile, i, 64, barrier);
            }
            __syncthreads();
            ptx::mbarrier_wait_parity(barrier, 0);
        });
    });
    CHECK(contains(message, "deadlock"));
    CHECK(contains(message, "threads 0-31 at mbarrier at shared address"));
    CHECK(contains(message, "(0 of 1 arrivals and 16 bytes pending)"));
}

TEST(misused_mbarriers_are_reported) {
    const auto use = [](void (*body)(uint64_t*)) {
        return fault_of([&] {
            emulator::launch(block(1), [=] {
                PTX_SHARED_ARRAY(uint64_t, barrier, 1);
                body(barrier);
            });
        });
    };
    CHECK(contains(use([](uint64_t* b) { ptx::mbarrier_arrive(b); }), "no initialised mbarrier"));
    CHECK(contains(use([](uint64_t* b) { ptx::mbarrier_init(b, 0); }), "count 0 is not in"));
    CHECK(contains(use([](uint64_t* b) {
                       ptx::mbarrier_init(b, 1);
                       ptx::mbarrier_expect_tx(b, 16);
                       ptx::mbarrier_arrive(b);
                       ptx::mbarrier_arrive(b);
                   }),
                   "more arrivals than the count"));
    CHECK(contains(use([](uint64_t* b) {
                       ptx::mbarrier_init(b, 1);
                       ptx::mbarrier_inval(b);
                       ptx::mbarrier_wait_parity(b, 0);
                   }),
                   "no initialised mbarrier"));
}

TEST(a_polling_loop_that_cannot_end_is_a_deadlock) {
    DeviceArray<std::uint32_t> flag("flag", std::vector<std::uint32_t>{0});
    const auto message = fault_of([&] {
        emulator::launch(block(33), [f = flag.data()] {
            if (threadIdx.x == 32)
                while (ptx::ld_acquire_gpu(f) == 0) {
                }
        });
    });
    CHECK(contains(message, "threads 32 at ld.acquire.gpu polling memory"));
}

// Blocks hand a value around: block b waits for b - 1's flag, so that all must be resident.
TEST(blocks_pass_values_through_flags) {
    LaunchConfig config = block(32);
    config.grid = dim3(5);
    config.resident_blocks = 5;
    under_all_schedules(config, [](const LaunchConfig& c) {
        DeviceArray<std::uint32_t> flags("flags", std::vector<std::uint32_t>(6, 0));
        DeviceArray<float> values("values", std::vector<float>(6, 0.0f));
        flags.data()[0] = 1;
        emulator::launch(c, [f = flags.data(), v = values.data()] {
            if (threadIdx.x != 0) return;
            const unsigned b = blockIdx.x;
            while ((b % 2 == 0 ? ptx::ld_acquire_gpu(f + b) : ptx::ld_acquire_sys(f + b)) == 0) {
            }
            v[b + 1] = v[b] + 1;
            if (b % 2 == 0) {
                ptx::fence_acq_rel_gpu();
                ptx::st_release_gpu(f + b + 1, 1);
            } else {
                ptx::fence_acq_rel_sys();
                ptx::st_release_sys(f + b + 1, 1);
            }
        });
        CHECK(values.read()[5] == 5.0f);
    });
}

TEST(waiting_for_a_block_that_is_not_resident_is_a_deadlock) {
    LaunchConfig config = block(1);
    config.grid = dim3(2);
    config.resident_blocks = 1;
    unsigned deadlocks = 0;
    for (auto seed : harness::kSeeds) {
        config.seed = seed;
        DeviceArray<std::uint32_t> flag("flag", std::vector<std::uint32_t>{0});
        deadlocks += contains(fault_of([&] {
            emulator::launch(config, [f = flag.data()] {
                if (blockIdx.x == 0)
                    while (ptx::ld_relaxed_gpu(f) == 0) {
                    }
                else
                    ptx::st_relaxed_gpu(f, 1);
            });
        }), "deadlock");
    }
    CHECK(deadlocks > 0);  // blocks start in any order, so some seeds get away with it
}

// The last block to finish adds up what the others left (the split-K pattern).
TEST(the_last_block_sees_all_partial_results) {
    LaunchConfig config = block(32);
    config.grid = dim3(7);
    config.resident_blocks = 3;
    under_all_schedules(config, [](const LaunchConfig& c) {
        DeviceArray<std::uint32_t> counters("counters", std::vector<std::uint32_t>(3, 0));
        DeviceArray<float> partial("partial", 7), total("total", 1);
        emulator::launch(c, [n = counters.data(), p = partial.data(), t = total.data()] {
            ptx::red_add_release_gpu(n + 1, 1);
            ptx::red_add_release_sys(n + 2, 2);
            if (threadIdx.x != 0) return;
            p[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
            if (ptx::atom_add_acq_rel_gpu(n, 1) == gridDim.x - 1) {
                float sum = 0;
                for (unsigned b = 0; b < gridDim.x; ++b) sum += p[b];
                *t = sum;
            }
        });
        CHECK(total.read()[0] == 28.0f);
        const auto n = counters.read();
        CHECK(n[0] == 7 && n[1] == 224 && n[2] == 448);
    });
}

TEST(blocks_exchange_vectors_and_locks_of_system_scope) {
    LaunchConfig config;
    config.grid = dim3(4);
    config.block = dim3(1);
    config.resident_blocks = 4;
    under_all_schedules(config, [](const LaunchConfig& config) {
        const std::vector<std::uint32_t> zeros(16, 0);
        DeviceArray<std::uint32_t> words("words", zeros), lock("lock", std::vector<std::uint32_t>{0, 0, 0}), out("out", zeros);
        emulator::launch(config, [w = words.data(), l = lock.data(), o = out.data()] {
            const unsigned b = blockIdx.x;
            // Each word doubles as its own flag.
            ptx::st_relaxed_sys_v4(w + 4 * b, make_uint4(b + 1, b + 2, b + 3, b + 4));
            const unsigned from = (b + 1) % 4;
            uint4 v = ptx::ld_relaxed_sys_v4(w + 4 * from);
            while (v.x == 0 || v.y == 0 || v.z == 0 || v.w == 0) v = ptx::ld_relaxed_sys_v4(w + 4 * from);
            o[4 * b] = v.x, o[4 * b + 1] = v.y, o[4 * b + 2] = v.z, o[4 * b + 3] = v.w;
            // A lock around a plain counter, taken once by exchange and once by compare and swap.
            while (ptx::atom_exch_acq_rel_sys(l, 1) != 0) emulator::poll({emulator::Wait::Kind::Polling, 0, 0, "lock", {}});
            ptx::st_relaxed_sys(l + 1, ptx::ld_relaxed_sys(l + 1) + 1);
            ptx::st_release_sys(l, 0);
            while (ptx::atom_cas_acq_rel_gpu(l, 0, 2) != 0) emulator::poll({emulator::Wait::Kind::Polling, 0, 0, "lock", {}});
            ptx::st_relaxed_sys(l + 2, ptx::ld_relaxed_sys(l + 2) + b);
            ptx::st_release_sys(l, 0);
        });
        const auto result = out.read(), locks = lock.read();
        for (unsigned i = 0; i < 16; ++i) CHECK(result[i] == (i / 4 + 1) % 4 + 1 + i % 4);
        CHECK(locks[1] == 4 && locks[2] == 0 + 1 + 2 + 3);
    });
}

TEST_MAIN

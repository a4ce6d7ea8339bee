// Clusters and programmatic dependent launch on the emulator.
#include "../../ptx/cluster.h"
#include "../../ptx/launch_control.h"
#include "harness.h"

using emulator::DeviceArray;
using emulator::LaunchConfig;
using harness::contains;
using harness::fault_of;
using harness::under_all_schedules;

namespace {

LaunchConfig clusters(unsigned blocks, unsigned cluster, unsigned threads) {
    LaunchConfig config;
    config.grid = dim3(blocks, 2);
    config.block = dim3(threads);
    config.cluster = cluster;
    return config;
}

std::string first_fault(const std::function<void()>& body) {
    std::string fault;
    under_all_schedules(clusters(2, 2, 32), [&](const LaunchConfig& config) {
        if (fault.empty()) fault = fault_of([&] { emulator::launch(config, body); });
    });
    return fault;
}

}  // namespace

TEST(clusters_are_neighbours_along_x) {
    under_all_schedules(clusters(6, 3, 1), [](const LaunchConfig& config) {
        DeviceArray<std::uint32_t> out("out", 12);
        emulator::launch(config, [o = out.data()] {
            o[blockIdx.y * 6 + blockIdx.x] = ptx::cluster_rank() * 10 + ptx::cluster_size();
        });
        const auto result = out.read();
        for (unsigned i = 0; i < 12; ++i) CHECK(result[i] == i % 6 % 3 * 10 + 3);
    });
}

TEST(blocks_read_and_write_each_others_memory) {
    under_all_schedules(clusters(8, 4, 32), [](const LaunchConfig& config) {
        DeviceArray<std::uint32_t> out("out", 16 * 64);
        emulator::launch(config, [o = out.data()] {
            PTX_SHARED_ARRAY(std::uint32_t, words, 64);
            PTX_SHARED_ARRAY(uint4, vectors, 1);
            const unsigned t = threadIdx.x, rank = ptx::cluster_rank();
            words[t] = rank * 100 + t;
            ptx::cluster_barrier();
            const auto right = ptx::mapa(ptx::shared_address(words), (rank + 1) % 4);
            ptx::st_shared_cluster_u32(right + 4 * (32 + t), ptx::ld_shared_cluster_u32(right + 4 * t) + 1000);
            if (t == 0) ptx::st_shared_cluster_v4(ptx::mapa(ptx::shared_address(vectors), rank ^ 1), make_uint4(rank, 1, 2, 3));
            ptx::cluster_barrier();
            // What the left neighbour read here and wrote back.
            const unsigned block = blockIdx.y * 8 + blockIdx.x;
            o[block * 64 + t] = words[32 + t];
            o[block * 64 + 32 + t] = ptx::ld_shared_cluster_v4(ptx::shared_address(vectors)).x;
        });
        const auto result = out.read();
        for (unsigned i = 0; i < 16 * 64; ++i) {
            const unsigned rank = i / 64 % 4, t = i % 64;
            CHECK(result[i] == (t < 32 ? rank * 100 + t + 1000 : (rank ^ 1)));
        }
    });
}

TEST(remote_arrivals_complete_a_barrier) {
    under_all_schedules(clusters(4, 4, 32), [](const LaunchConfig& config) {
        DeviceArray<std::uint32_t> flags("flags", std::vector<std::uint32_t>(8, 0)), out("out", std::vector<std::uint32_t>(2, 0));
        emulator::launch(config, [f = flags.data(), o = out.data()] {
            PTX_SHARED_ARRAY(uint64_t, barrier, 1);
            const unsigned rank = ptx::cluster_rank(), row = blockIdx.y;
            if (threadIdx.x == 0) {
                ptx::mbarrier_init(barrier, 4);
                ptx::fence_mbarrier_init();
            }
            ptx::cluster_barrier();
            if (threadIdx.x == 0) {
                f[row * 4 + rank] = 1;
                ptx::mbarrier_arrive_cluster(ptx::mapa(ptx::shared_address(barrier), 0));
                if (rank == 0) {
                    ptx::mbarrier_wait_parity(barrier, 0);
                    for (unsigned i = 0; i < 4; ++i) o[row] += f[row * 4 + i];
                }
            }
            ptx::cluster_barrier();
        });
        CHECK((out.read() == std::vector<std::uint32_t>{4, 4}));
    });
}

TEST(exited_threads_no_longer_count_at_the_cluster_barrier) {
    under_all_schedules(clusters(4, 2, 64), [](const LaunchConfig& config) {
        emulator::launch(config, [] {
            if (threadIdx.x % 3 == 0) return;
            ptx::cluster_barrier();
            ptx::cluster_barrier();
        });
    });
}

TEST(misused_clusters_are_reported) {
    CHECK(contains(first_fault([] { ptx::cluster_barrier_arrive(), ptx::cluster_barrier_arrive(); }), "has arrived and not waited"));
    CHECK(contains(first_fault([] { ptx::cluster_barrier_wait(); }), "has not arrived"));
    CHECK(contains(first_fault([] { ptx::mapa(1024, 2); }), "rank 2 in a cluster of 2"));
    const auto exited = first_fault([] {
        PTX_SHARED_ARRAY(std::uint32_t, words, 32);
        words[threadIdx.x] = 1;
        ptx::cluster_barrier();
        if (ptx::cluster_rank() == 0) ptx::ld_shared_cluster_u32(ptx::mapa(ptx::shared_address(words), 1));
    });
    CHECK(contains(exited, "exited block") && contains(exited, "block 1 of its cluster"));
    const auto stuck = first_fault([] {
        if (ptx::cluster_rank() == 0) {
            ptx::cluster_barrier();
        } else {
            PTX_SHARED_ARRAY(uint64_t, never, 1);
            if (threadIdx.x == 0) ptx::mbarrier_init(never, 1);
            __syncthreads();
            ptx::mbarrier_wait_parity(never, 0);
        }
    });
    CHECK(contains(stuck, "deadlock") && contains(stuck, "32 of 64 threads of the cluster arrived"));
    CHECK(contains(fault_of([] { emulator::launch(clusters(3, 2, 1), [] {}); }), "clusters of 2 blocks in a grid of 3"));
}

TEST(dependents_are_launched_only_by_grids_that_wait) {
    CHECK(first_fault([] { ptx::griddepcontrol_launch_dependents(), ptx::griddepcontrol_wait(); }).empty());
    CHECK(first_fault([] { ptx::griddepcontrol_wait(); }).empty());
    CHECK(contains(first_fault([] { ptx::griddepcontrol_launch_dependents(); }), "without griddepcontrol.wait"));
}

TEST_MAIN

// Mutation test of the peer-to-peer all-reduce (cuda/comm): the kernels as they are, with one barrier, load or store of their
// protocol replaced by a wrong one. Every bug must be caught under some seed, and the right kernels must pass under all.
#include <deque>
#include <unordered_map>

#include "../../ptx/synchronising_access.h"
#include "harness.h"

namespace {

enum class Bug {
    None,
    PublishesBeforeWritten,   // no barrier between writing a slice and announcing it
    ReadsBeforeArrival,       // no barrier between waiting for the announcements and reading
    AcceptsRoundBefore,       // takes an announcement of the round before for one of this
    AnnouncesRoundAhead,      // announces a round before it is written
    AnnouncesToItself,        // other ranks never hear of it
};
Bug bug = Bug::None;

// Barriers that a thread has passed: in an exchange, the first is before the announcement, the second after the wait.
std::unordered_map<const emulator::Thread*, unsigned> barriers;

void barrier() {
    const unsigned number = barriers[&emulator::this_thread()]++ % 2;
    if (number == 0 && bug == Bug::PublishesBeforeWritten) return;
    if (number == 1 && bug == Bug::ReadsBeforeArrival) return;
    __syncthreads();
}

}  // namespace

namespace ptx {

inline std::uint32_t tested_ld_acquire_sys(const std::uint32_t* address) {
    return ld_acquire_sys(address) + (bug == Bug::AcceptsRoundBefore ? 1 : 0);
}
inline void tested_st_release_sys(std::uint32_t* address, std::uint32_t value) {
    if (bug == Bug::AnnouncesToItself) return;
    st_release_sys(address, value + (bug == Bug::AnnouncesRoundAhead ? 1 : 0));
}

}  // namespace ptx

#define __syncthreads barrier
#define ld_acquire_sys tested_ld_acquire_sys
#define st_release_sys tested_st_release_sys
#include "../../comm/all_reduce_one_shot.cu"
#define kThreads kTwoShotThreads
#include "../../comm/all_reduce_two_shot.cu"
#undef kThreads
#undef __syncthreads
#undef ld_acquire_sys
#undef st_release_sys

using emulator::DeviceArray;

namespace {

// Whether all ranks end with the sums, after many rounds on slices of 64 bytes.
bool run(bool two_shot, unsigned ranks, std::uint64_t seed) {
    constexpr unsigned kUnits = 4 * 60;
    const std::size_t region_words = longhaul::kDataWord + longhaul::kMostBlocks * 2 * 16;
    std::deque<DeviceArray<std::uint32_t>> regions;
    longhaul::AllReduceParams p{};
    for (unsigned rank = 0; rank < ranks; ++rank)
        p.peers.regions[rank] = regions.emplace_back("region", std::vector<std::uint32_t>(region_words, 0)).data();
    p.peers.ranks = ranks;
    p.peers.slice_bytes = 64;
    p.peers.most_polls = ~0u;
    p.units = kUnits;
    // Small whole numbers: sums are exact.
    std::vector<float> values(ranks * kUnits * 4), sums(kUnits * 4, 0.0f);
    harness::Values random(7);
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<float>(random.bits() % 1000);
        sums[i % sums.size()] += values[i];
    }
    DeviceArray<float> x("x", values);
    p.x = p.out = x.data();
    emulator::LaunchConfig config;
    config.name = two_shot ? "all_reduce_two_shot" : "all_reduce_one_shot";
    config.grid = dim3(1, ranks);
    config.block = dim3(32);
    config.resident_blocks = ranks;
    config.seed = seed;
    barriers.clear();
    emulator::launch(config, [&] {
        two_shot ? longhaul::all_reduce_two_shot<float>(p) : longhaul::all_reduce_one_shot<float>(p);
    });
    const auto result = x.read();
    for (std::size_t i = 0; i < result.size(); ++i)
        if (result[i] != sums[i % sums.size()]) return false;
    return true;
}

// Seeds, of both kernels and several group sizes, under which `planted` passes unnoticed; `total` of all.
unsigned unnoticed(Bug planted, unsigned& total) {
    bug = planted;
    unsigned passed = 0;
    total = 0;
    for (bool two_shot : {false, true})
        for (unsigned ranks : {2u, 3u, 8u})
            for (auto seed : harness::kSeeds) {
                bool right = false;
                const auto fault = harness::fault_of([&] { right = run(two_shot, ranks, seed); });
                passed += fault.empty() && right;
                ++total;
            }
    bug = Bug::None;
    return passed;
}

}  // namespace

TEST(the_right_kernels_pass) {
    unsigned total = 0;
    CHECK(unnoticed(Bug::None, total) == total);
}

TEST(every_bug_is_caught) {
    for (auto planted : {Bug::PublishesBeforeWritten, Bug::ReadsBeforeArrival, Bug::AcceptsRoundBefore,
                         Bug::AnnouncesRoundAhead, Bug::AnnouncesToItself}) {
        unsigned total = 0;
        const unsigned passed = unnoticed(planted, total);
        if (passed * 4 > total)
            throw harness::CheckFailed{"bug " + std::to_string(static_cast<int>(planted)) + " passes " +
                                       std::to_string(passed) + " of " + std::to_string(total) + " runs"};
    }
}

TEST_MAIN

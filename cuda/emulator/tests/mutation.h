// What mutation tests share. A bug counts as caught if, under at least one combination of completion mode and seed, the
// launch raises a fault or the output differs from plain arithmetic; the kernel without it must pass under all.
#pragma once

#include "harness.h"

namespace mutation_test {

inline std::vector<float> random_values(std::size_t count) {
    std::vector<float> values(count);
    harness::Values random(9);
    for (auto& value : values) value = random.next();
    return values;
}

inline bool close(const std::vector<float>& result, const std::vector<double>& expected) {
    for (std::size_t i = 0; i < expected.size(); ++i)
        if (!(std::fabs(result[i] - expected[i]) <= 1e-4)) return false;
    return true;
}

template <class Bug>
bool survives(bool (*run)(Bug, emulator::LaunchConfig), Bug bug, const emulator::LaunchConfig& config) {
    try {
        return run(bug, config);
    } catch (const emulator::Fault&) {
        return false;
    }
}

template <class Bug>
void expect_caught(bool (*run)(Bug, emulator::LaunchConfig), Bug bug, std::uint64_t seeds = 5) {
    for (auto completion : {emulator::Completion::Eager, emulator::Completion::Lazy})
        for (std::uint64_t seed = 1; seed <= seeds; ++seed) {
            emulator::LaunchConfig config;
            config.completion = completion;
            config.seed = seed;
            if (!survives(run, bug, config)) return;
        }
    throw harness::CheckFailed{"the planted bug passed under every mode and seed"};
}

// More seeds than elsewhere: a right kernel that fails under one is a bug of the emulator.
template <class Bug>
void expect_right(bool (*run)(Bug, emulator::LaunchConfig)) {
    for (auto completion : {emulator::Completion::Eager, emulator::Completion::Lazy})
        for (std::uint64_t seed = 1; seed <= 16; ++seed) {
            emulator::LaunchConfig config;
            config.completion = completion;
            config.seed = seed;
            CHECK(run(Bug::Right, config));
        }
}

}  // namespace mutation_test

#define RIGHT(kernel, Kernel) \
    TEST(right_##kernel) { ::mutation_test::expect_right<mutation::Kernel>(run_##kernel); }
#define MUTANT(kernel, Kernel, bug) \
    TEST(kernel##_##bug) { ::mutation_test::expect_caught(run_##kernel, mutation::Kernel::bug); }

// Mutation test: every planted bug must be caught, and the right kernels must pass, over modes and seeds.
//
// A bug counts as caught if, under at least one combination of completion mode and seed, the launch raises a fault or
// the output differs from plain arithmetic.
#include "harness.h"
#include "mutation_kernels.h"

using emulator::DeviceArray;
using emulator::LaunchConfig;
using harness::CheckFailed;

namespace {

std::vector<float> random_values(std::size_t count) {
    std::vector<float> values(count);
    harness::Values random(9);
    for (auto& value : values) value = random.next();
    return values;
}

bool close(const std::vector<float>& result, const std::vector<double>& expected) {
    for (std::size_t i = 0; i < expected.size(); ++i)
        if (!(std::fabs(result[i] - expected[i]) <= 1e-4)) return false;
    return true;
}

bool run_gemm(mutation::Gemm bug, LaunchConfig config) {
    const unsigned depth = mutation::kGemmDepth;
    const auto values = random_values(24 * depth);
    std::vector<__nv_bfloat16> a, b;
    for (std::size_t i = 0; i < values.size(); ++i) (i < 16 * depth ? a : b).push_back(__float2bfloat16(values[i]));
    std::vector<double> expected;
    for (unsigned i = 0; i < 16; ++i)
        for (unsigned j = 0; j < 8; ++j) {
            double sum = 0;
            for (unsigned k = 0; k < depth; ++k)
                sum += static_cast<double>(__bfloat162float(a[i * depth + k])) * __bfloat162float(b[j * depth + k]);
            expected.push_back(sum);
        }
    config.block = dim3(128);
    DeviceArray<__nv_bfloat16> da("a", a), db("b", b);
    DeviceArray<float> out("out", expected.size());
    emulator::launch(config, [&, pa = da.data(), pb = db.data(), o = out.data()] { mutation::gemm(bug, pa, pb, o); });
    return close(out.read(), expected);
}

bool run_reduce(mutation::Reduce bug, LaunchConfig config) {
    const unsigned rows = 3, n = 300;
    const auto values = random_values(rows * n);
    std::vector<double> expected(rows, 0.0);
    for (unsigned i = 0; i < rows * n; ++i) expected[i / n] += values[i];
    config.grid = dim3(rows);
    config.block = dim3(128);
    DeviceArray<float> in("in", values), out("out", rows);
    emulator::launch(config, [&, i = in.data(), o = out.data()] { mutation::reduce(bug, i, o, rows, n); });
    return close(out.read(), expected);
}

bool run_reverse(mutation::Reverse bug, LaunchConfig config) {
    const auto values = random_values(64);
    std::vector<double> expected;
    for (unsigned t = 0; t < 64; ++t) expected.push_back(values[t ^ 31]);
    config.block = dim3(64);
    DeviceArray<float> in("in", values), out("out", 64);
    emulator::launch(config, [&, i = in.data(), o = out.data()] { mutation::reverse(bug, i, o); });
    return close(out.read(), expected);
}

bool run_ring(mutation::Ring bug, LaunchConfig config) {
    const auto values = random_values(mutation::kRingTiles * mutation::kRingFloats);
    config.block = dim3(96);
    DeviceArray<float> in("in", values), out("out", values.size());
    emulator::launch(config, [&, i = in.data(), o = out.data()] { mutation::ring(bug, i, o); });
    return close(out.read(), std::vector<double>(values.begin(), values.end()));
}

bool run_handover(mutation::Handover bug, LaunchConfig config) {
    std::vector<double> expected;
    for (unsigned i = 0; i < 128; ++i) expected.push_back(i / 32 * 32 + 31 - i % 32);
    config.block = dim3(64);
    DeviceArray<float> out("out", 128);
    emulator::launch(config, [&, o = out.data()] { mutation::handover(bug, o); });
    return close(out.read(), expected);
}

bool run_split_k(mutation::SplitK bug, LaunchConfig config) {
    const auto values = random_values(12);
    double sum = 0;
    for (float value : values) sum += value;
    config.grid = dim3(6);
    config.block = dim3(32);
    config.resident_blocks = 6;
    DeviceArray<float> in("in", values), partial("partial", 6), out("out", 1);
    DeviceArray<std::uint32_t> counter("counter", std::vector<std::uint32_t>{0});
    emulator::launch(config, [&, i = in.data(), p = partial.data(), c = counter.data(), o = out.data()] {
        mutation::split_k(bug, i, p, c, o);
    });
    return close(out.read(), {sum});
}

// The kernel passes everywhere without the bug and fails somewhere with it.
template <class Bug>
void expect_caught(bool (*run)(Bug, LaunchConfig), Bug bug) {
    int caught = 0;
    harness::under_all_schedules({}, [&](const LaunchConfig& config) {
        try {
            if (!run(bug, config)) ++caught;
        } catch (const emulator::Fault&) {
            ++caught;
        }
    });
    if (caught == 0) throw CheckFailed{"the planted bug passed under every mode and seed"};
}

template <class Bug>
void expect_right(bool (*run)(Bug, LaunchConfig)) {
    harness::under_all_schedules({}, [&](const LaunchConfig& config) { CHECK(run(Bug::Right, config)); });
}

}  // namespace

TEST(right_gemm) { expect_right(run_gemm); }
TEST(right_reduce) { expect_right(run_reduce); }
TEST(right_reverse) { expect_right(run_reverse); }
TEST(right_ring) { expect_right(run_ring); }
TEST(right_handover) { expect_right(run_handover); }
TEST(right_split_k) { expect_right(run_split_k); }

#define MUTANT(kernel, Kernel, bug) \
    TEST(kernel##_##bug) { expect_caught(run_##kernel, mutation::Kernel::bug); }

MUTANT(gemm, Gemm, NoWait)
MUTANT(gemm, Gemm, ShallowWait)
MUTANT(gemm, Gemm, NoCommit)
MUTANT(gemm, Gemm, NoBarrier)
MUTANT(gemm, Gemm, EarlyReuse)
MUTANT(gemm, Gemm, WrongSwizzle)
MUTANT(gemm, Gemm, MisalignedRow)
MUTANT(gemm, Gemm, NoClear)
MUTANT(reduce, Reduce, NoBarrier)
MUTANT(reduce, Reduce, ShortMask)
MUTANT(reduce, Reduce, OffByOneRead)
MUTANT(reduce, Reduce, OffByOneWrite)
MUTANT(reduce, Reduce, WriteBefore)
MUTANT(reduce, Reduce, BeyondShared)
MUTANT(reduce, Reduce, DivergentBarrier)
MUTANT(reduce, Reduce, SkippedRow)
MUTANT(reduce, Reduce, ShortLoop)
MUTANT(reduce, Reduce, WrongOffset)
MUTANT(reduce, Reduce, Misindexed)
MUTANT(reverse, Reverse, NoSyncWarp)
MUTANT(ring, Ring, NoEmptyWait)
MUTANT(ring, Ring, NoFullWait)
MUTANT(ring, Ring, TooManyBytes)
MUTANT(ring, Ring, TooFewBytes)
MUTANT(ring, Ring, WrongCount)
MUTANT(ring, Ring, WrongParity)
MUTANT(ring, Ring, NoInitBarrier)
MUTANT(ring, Ring, NoInit)
MUTANT(ring, Ring, NoArrive)
MUTANT(ring, Ring, LateExpect)
MUTANT(handover, Handover, NoSync)
MUTANT(handover, Handover, WrongCount)
MUTANT(handover, Handover, WrongId)
MUTANT(handover, Handover, NoFreeWait)
MUTANT(split_k, SplitK, WrongLast)
MUTANT(split_k, SplitK, WaitForAll)
MUTANT(split_k, SplitK, ReadOnlyPartials)

TEST_MAIN

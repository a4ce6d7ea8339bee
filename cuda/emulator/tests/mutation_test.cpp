// Mutation test: every planted bug must be caught, and the right kernels must pass, over modes and seeds.
#include "mutation.h"
#include "mutation_kernels.h"

using emulator::DeviceArray;
using emulator::LaunchConfig;
using mutation_test::close;
using mutation_test::random_values;

namespace {

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

}  // namespace

RIGHT(gemm, Gemm)
RIGHT(reduce, Reduce)
RIGHT(reverse, Reverse)
RIGHT(ring, Ring)
RIGHT(handover, Handover)
RIGHT(split_k, SplitK)

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

// Races between blocks show in some schedules only.
TEST(split_k_EarlyCount) { mutation_test::expect_caught(run_split_k, mutation::SplitK::EarlyCount, 32); }
TEST(split_k_PlainCount) { mutation_test::expect_caught(run_split_k, mutation::SplitK::PlainCount, 32); }

TEST_MAIN

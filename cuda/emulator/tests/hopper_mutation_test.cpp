// Mutation test of sm_90 kernels: see mutation_test.cpp.
#include "hopper_mutation_kernels.h"
#include "mutation.h"

using emulator::DeviceArray;
using emulator::LaunchConfig;
using mutation_test::close;
using mutation_test::random_values;

namespace {

ptx::TensorMap map_of(const void* address, std::uint32_t element_bytes, std::vector<std::uint64_t> dims,
                      std::vector<std::uint32_t> box, std::uint32_t swizzle) {
    emulator::TensorMapSpec spec{reinterpret_cast<std::uint64_t>(address), element_bytes, static_cast<std::uint32_t>(dims.size()),
                                 {}, {}, {}, swizzle};
    std::uint64_t stride = element_bytes;
    for (std::size_t d = 0; d < dims.size(); ++d) {
        spec.dims[d] = dims[d];
        spec.strides[d] = stride;
        spec.box[d] = box[d];
        stride *= dims[d];
    }
    ptx::TensorMap map;
    if (const auto problem = emulator::encode_tensor_map(spec, map.words)) throw harness::CheckFailed{*problem};
    return map;
}

bool run_wgmma(mutation::Wgmma bug, LaunchConfig config) {
    const unsigned rows = mutation::kWgmmaRows, columns = mutation::kWgmmaColumns, depth = mutation::kWgmmaDepth;
    const auto values = random_values((rows + columns) * depth);
    std::vector<__nv_bfloat16> a, b;
    for (std::size_t i = 0; i < values.size(); ++i) (i < rows * depth ? a : b).push_back(__float2bfloat16(values[i]));
    std::vector<double> expected;
    for (unsigned i = 0; i < rows; ++i)
        for (unsigned j = 0; j < columns; ++j) {
            double sum = 0;
            for (unsigned k = 0; k < depth; ++k)
                sum += static_cast<double>(__bfloat162float(a[i * depth + k])) * __bfloat162float(b[j * depth + k]);
            expected.push_back(sum);
        }
    config.block = dim3(mutation::kWgmmaThreads);
    config.dynamic_shared_bytes = mutation::kWgmmaSharedBytes;
    DeviceArray<__nv_bfloat16> da("a", a), db("b", b);
    DeviceArray<float> out("out", expected.size());
    const ptx::TensorMap maps[3] = {map_of(da.data(), 2, {depth, rows}, {64, 64}, 128),
                                    map_of(db.data(), 2, {depth, columns}, {64, 32}, 128),
                                    map_of(out.data(), 4, {columns, rows}, {32, 64}, 128)};
    emulator::launch(config, [&] { mutation::wgmma_gemm(bug, &maps[0], &maps[1], &maps[2]); });
    return close(out.read(), expected);
}

bool run_cluster(mutation::Cluster bug, LaunchConfig config) {
    const unsigned blocks = 2 * mutation::kClusterBlocks;
    const auto values = random_values(blocks * 64), rows = random_values(128);
    std::vector<double> expected;
    for (unsigned i = 0; i < blocks * 64; ++i) {
        const unsigned block = i / 64, neighbour = block / 4 * 4 + (block + 1) % 4;
        expected.push_back(static_cast<double>(values[neighbour * 64 + i % 64]) + rows[64 + i % 64]);
    }
    config.grid = dim3(blocks);
    config.block = dim3(mutation::kClusterThreads);
    config.cluster = mutation::kClusterBlocks;
    config.dynamic_shared_bytes = 256;
    DeviceArray<float> in("in", values), broadcast("broadcast", rows), out("out", blocks * 64);
    const ptx::TensorMap map = map_of(broadcast.data(), 4, {64, 2}, {64, 1}, 0);
    emulator::launch(config, [&, i = in.data(), o = out.data()] { mutation::cluster_exchange(bug, &map, i, o); });
    return close(out.read(), expected);
}

}  // namespace

RIGHT(wgmma, Wgmma)
RIGHT(cluster, Cluster)

MUTANT(wgmma, Wgmma, NoWait)
MUTANT(wgmma, Wgmma, ShallowWait)
MUTANT(wgmma, Wgmma, WrongSwizzle)
MUTANT(wgmma, Wgmma, WrongStride)
MUTANT(wgmma, Wgmma, WrongAdvance)
MUTANT(wgmma, Wgmma, TransposedB)
MUTANT(wgmma, Wgmma, NoRegisterFence)
MUTANT(wgmma, Wgmma, TouchedInFlight)
MUTANT(wgmma, Wgmma, MissingWarp)
MUTANT(wgmma, Wgmma, WarpsDiffer)
MUTANT(wgmma, Wgmma, NoClear)
MUTANT(wgmma, Wgmma, WrongExpect)
MUTANT(wgmma, Wgmma, NoFullWait)
MUTANT(wgmma, Wgmma, NoEmptyWait)
MUTANT(wgmma, Wgmma, EarlyRelease)
MUTANT(wgmma, Wgmma, NoProxyFence)
MUTANT(wgmma, Wgmma, EarlyProxyFence)
MUTANT(wgmma, Wgmma, NoStagingBarrier)
MUTANT(wgmma, Wgmma, NoStoreReadWait)
MUTANT(wgmma, Wgmma, NoStoreCommit)
MUTANT(wgmma, Wgmma, NoLastStoreWait)
MUTANT(wgmma, Wgmma, LocalMap)
MUTANT(wgmma, Wgmma, WrongCoordinate)
MUTANT(cluster, Cluster, NoBarrier)
MUTANT(cluster, Cluster, NoLastBarrier)
MUTANT(cluster, Cluster, WrongRank)
MUTANT(cluster, Cluster, NoInitBarrier)
MUTANT(cluster, Cluster, WrongMask)
MUTANT(cluster, Cluster, WrongExpect)
MUTANT(cluster, Cluster, NoRemoteArrive)

TEST_MAIN

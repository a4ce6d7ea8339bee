// Copies KV blocks of all layers, K and V, in one launch: within the pool (a forked sequence gets its own block), from the
// pool to a contiguous buffer (swap out) and back. One block a (pair, plane, part); a plane is the K or the V of a layer.
//
// No destination is a source or another pair's destination (the host has checked), so the order of blocks does not matter.
#include "../common/kernel.h"

namespace longhaul {
namespace {

using ptx::uint32_t;
using ptx::uint64_t;
using ptx::uint8_t;

struct CopyBlocksParams {
    const void* source;
    void* destination;
    const uint2* pairs;  // [gridDim.x]: (source block, destination block)
    // Distances in units of T between planes, and between blocks of a plane.
    uint64_t source_plane;
    uint64_t source_block;
    uint64_t destination_plane;
    uint64_t destination_block;
    uint64_t units;  // of one block in one plane
};

constexpr uint32_t kThreads = 256;
constexpr uint32_t kUnitsPerThread = 4;

template <class T>
__device__ __forceinline__ void copy_blocks(const CopyBlocksParams& p) {
    const uint2 pair = p.pairs[blockIdx.x];
    const T* source = static_cast<const T*>(p.source) + blockIdx.y * p.source_plane + pair.x * p.source_block;
    T* destination =
        static_cast<T*>(p.destination) + blockIdx.y * p.destination_plane + pair.y * p.destination_block;
    const uint64_t first = static_cast<uint64_t>(blockIdx.z) * kThreads * kUnitsPerThread + threadIdx.x;
    T value[kUnitsPerThread];
#pragma unroll
    for (uint32_t i = 0; i < kUnitsPerThread; ++i)
        if (first + i * kThreads < p.units) value[i] = source[first + i * kThreads];
#pragma unroll
    for (uint32_t i = 0; i < kUnitsPerThread; ++i)
        if (first + i * kThreads < p.units) destination[first + i * kThreads] = value[i];
}

}  // namespace

LONGHAUL_KERNEL(copy_blocks_16, CopyBlocksParams, kThreads, copy_blocks<uint4>)
LONGHAUL_KERNEL(copy_blocks_1, CopyBlocksParams, kThreads, copy_blocks<uint8_t>)

}  // namespace longhaul

// Small kernels of sm_90 (wgmma, tensor maps, clusters), each with a switch that plants one typical bug; see
// mutation_kernels.h.
#pragma once

#include "../../ptx/cluster.h"
#include "../../ptx/launch_control.h"
#include "../../ptx/named_barrier.h"
#include "../../ptx/proxy_fence.h"
#include "../../ptx/register_budget.h"
#include "../../ptx/tensor_copy.h"
#include "../../ptx/wgmma.h"

namespace mutation {

// Two tiles of a product D[128, 32] = A[128, 128] * B[32, 128]ᵀ, bf16 to f32: one producer thread, a ring of two stages of
// depth 64 in 128-byte swizzle, one warpgroup of wgmma, a staging buffer stored by the copy engine.
enum class Wgmma {
    Right, NoWait, ShallowWait, WrongSwizzle, WrongStride, WrongAdvance, TransposedB, NoRegisterFence, TouchedInFlight,
    MissingWarp, WarpsDiffer, NoClear, WrongExpect, NoFullWait, NoEmptyWait, EarlyRelease, NoProxyFence, EarlyProxyFence,
    NoStagingBarrier, NoStoreReadWait, NoStoreCommit, NoLastStoreWait, LocalMap, WrongCoordinate,
};

inline constexpr unsigned kWgmmaRows = 128, kWgmmaColumns = 32, kWgmmaDepth = 128, kWgmmaThreads = 256;
inline constexpr unsigned kWgmmaSharedBytes = 2 * (64 + 32) * 128 + 64 * 128;

inline void wgmma_gemm(Wgmma bug, const ptx::TensorMap* a, const ptx::TensorMap* b, const ptx::TensorMap* d) {
    constexpr unsigned stage_bytes = (64 + 32) * 128, tiles = 2, steps = kWgmmaDepth / 64;
    auto* shared = ptx::dynamic_shared<unsigned char>();
    PTX_SHARED_ARRAY(uint64_t, full, 2);
    PTX_SHARED_ARRAY(uint64_t, empty, 2);
    const unsigned t = threadIdx.x;
    if (t == 0) {
        for (unsigned s = 0; s < 2; ++s) {
            ptx::mbarrier_init(&full[s], 1);
            ptx::mbarrier_init(&empty[s], 4);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (t >= 128) {
        ptx::setmaxnreg_dec<40>();
        if (t != 128) return;
        ptx::TensorMap copy = *a;
        for (unsigned i = 0; i < tiles * steps; ++i) {
            const unsigned s = i % 2;
            unsigned char* stage = shared + s * stage_bytes;
            const auto depth = static_cast<int32_t>(i % steps * 64);
            const auto row = static_cast<int32_t>(i / steps * 64);
            if (bug != Wgmma::NoEmptyWait) ptx::mbarrier_wait_parity(&empty[s], (i / 2 & 1) ^ 1);
            ptx::mbarrier_arrive_expect_tx(&full[s], bug == Wgmma::WrongExpect ? 64 * 128 : stage_bytes);
            ptx::cp_async_bulk_tensor_load(stage, bug == Wgmma::LocalMap ? &copy : a, {depth, row}, &full[s]);
            ptx::cp_async_bulk_tensor_load(stage + 64 * 128, b, {depth, bug == Wgmma::WrongCoordinate ? row : 0}, &full[s]);
        }
        return;
    }
    ptx::setmaxnreg_inc<232>();
    unsigned char* staging = shared + 2 * stage_bytes;
    const unsigned warp = t / 32, lane = t % 32;
    float acc[16] = {};
    for (unsigned tile = 0; tile < tiles; ++tile) {
        const auto epilogue = [&] {
            for (unsigned i = 0; i < 16; ++i) {
                const unsigned row = warp * 16 + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
                const unsigned chunk = column / 4 ^ row % 8;
                std::memcpy(staging + row * 128 + chunk * 16 + column % 4 * 4, &acc[i], 4);
            }
        };
        for (unsigned k = 0; k < steps; ++k) {
            const unsigned i = tile * steps + k, s = i % 2;
            const auto base = ptx::shared_address(shared + s * stage_bytes);
            if (bug != Wgmma::NoFullWait) ptx::mbarrier_wait_parity(&full[s], i / 2 & 1);
            if (bug == Wgmma::EarlyRelease && lane == 0) ptx::mbarrier_arrive(&empty[s]);
            if (bug != Wgmma::NoRegisterFence) ptx::wgmma_fence();
            if (!(bug == Wgmma::MissingWarp && warp == 3 && i == 3)) {
                for (unsigned j = 0; j < 4; ++j) {
                    const auto swizzle = bug == Wgmma::WrongSwizzle ? ptx::Swizzle::B64 : ptx::Swizzle::B128;
                    const uint32_t stride = bug == Wgmma::WrongStride ? 512 : 1024;
                    const uint32_t step = j * (bug == Wgmma::WrongAdvance ? 16 : 32);
                    const uint32_t skew = bug == Wgmma::WarpsDiffer && warp == 2 ? 32 : 0;
                    const auto da = ptx::wgmma_descriptor(base + step, 16, stride, swizzle);
                    const auto db = ptx::wgmma_descriptor(base + 64 * 128 + (step + skew) % 128, 16, stride, swizzle);
                    const bool add = k > 0 || j > 0 || (bug == Wgmma::NoClear && tile > 0);
                    if (bug == Wgmma::TransposedB)
                        ptx::wgmma_bf16<32, ptx::Major::K, ptx::Major::MN>(acc, da, db, add);
                    else
                        ptx::wgmma_bf16<32>(acc, da, db, add);
                }
            }
            if (bug == Wgmma::TouchedInFlight) acc[3] += 0.0f;
            ptx::wgmma_commit_group();
            if (bug == Wgmma::ShallowWait) ptx::wgmma_wait_group<1>();
            else if (bug != Wgmma::NoWait) ptx::wgmma_wait_group<0>();
            if (bug != Wgmma::EarlyRelease && lane == 0) ptx::mbarrier_arrive(&empty[s]);
        }
        if (bug == Wgmma::NoWait || bug == Wgmma::ShallowWait) {
            epilogue();
            ptx::wgmma_wait_group<0>();
        }
        if (tile > 0) {
            if (t == 0 && bug != Wgmma::NoStoreReadWait) ptx::cp_async_bulk_wait_group_read<0>();
            ptx::bar_sync(1, 128);
        }
        if (bug == Wgmma::EarlyProxyFence) ptx::fence_proxy_async_shared();
        if (bug != Wgmma::NoWait && bug != Wgmma::ShallowWait) epilogue();
        if (bug != Wgmma::NoProxyFence && bug != Wgmma::EarlyProxyFence) ptx::fence_proxy_async_shared();
        if (bug != Wgmma::NoStagingBarrier) ptx::bar_sync(1, 128);
        if (t == 0) {
            ptx::cp_async_bulk_tensor_store(d, {0, static_cast<int32_t>(tile * 64)}, staging);
            if (bug != Wgmma::NoStoreCommit) ptx::cp_async_bulk_commit_group();
        }
    }
    if (t == 0 && bug != Wgmma::NoLastStoreWait) ptx::cp_async_bulk_wait_group_read<0>();
}

// The blocks of a cluster pass a tile around: each reads its neighbour's, one broadcasts to all.
enum class Cluster { Right, NoBarrier, NoLastBarrier, WrongRank, NoInitBarrier, WrongMask, WrongExpect, NoRemoteArrive };

inline constexpr unsigned kClusterBlocks = 4, kClusterThreads = 64;

// out[block][64]: the neighbour's value plus the broadcast one. `map`: a row of 64 floats in a tensor of 2 rows.
inline void cluster_exchange(Cluster bug, const ptx::TensorMap* map, const float* in, float* out) {
    auto* tile = ptx::dynamic_shared<float>();  // 64 broadcast floats
    PTX_SHARED_ARRAY(float, own, 64);
    PTX_SHARED_ARRAY(uint64_t, full, 1);
    PTX_SHARED_ARRAY(uint64_t, ready, 1);
    const unsigned t = threadIdx.x, rank = ptx::cluster_rank(), blocks = ptx::cluster_size();
    if (t == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init(ready, blocks);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(full, bug == Cluster::WrongExpect ? 128 : 256);
    }
    own[t] = in[blockIdx.x * 64 + t];
    if (bug != Cluster::NoInitBarrier) ptx::cluster_barrier();
    else __syncthreads();
    // Every block tells block 0 that it is ready for the broadcast.
    if (t == 0 && bug != Cluster::NoRemoteArrive)
        ptx::mbarrier_arrive_cluster(ptx::mapa(ptx::shared_address(ready), 0));
    if (rank == 0 && t == 0) {
        ptx::mbarrier_wait_parity(ready, 0);
        const uint16_t all = static_cast<uint16_t>((1u << blocks) - 1);
        ptx::cp_async_bulk_tensor_load_multicast(tile, map, {0, 1}, full, bug == Cluster::WrongMask ? all / 2 : all);
    }
    const uint32_t neighbour = (rank + (bug == Cluster::WrongRank ? blocks - 1 : 1)) % blocks;
    const auto there = ptx::mapa(ptx::shared_address(own), neighbour);
    float value = __uint_as_float(ptx::ld_shared_cluster_u32(there + 4 * t));
    if (bug == Cluster::NoBarrier) {
        // The second exchange overwrites what the neighbour may still read.
        own[t] = value;
    }
    ptx::mbarrier_wait_parity(full, 0);
    out[blockIdx.x * 64 + t] = value + tile[t];
    if (bug != Cluster::NoLastBarrier) ptx::cluster_barrier();
}

}  // namespace mutation

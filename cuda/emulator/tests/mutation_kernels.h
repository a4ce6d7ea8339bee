// Small kernels, each with a switch that plants one typical bug. Every kernel checks nothing itself; its caller
// compares the output with plain arithmetic.
#pragma once

#include "../../ptx/bulk_copy.h"
#include "../../ptx/cp_async.h"
#include "../../ptx/load_store.h"
#include "../../ptx/matrix_move.h"
#include "../../ptx/mma.h"
#include "../../ptx/named_barrier.h"
#include "../../ptx/synchronising_access.h"

namespace mutation {

// A 16 x 8 product over depth 64 in steps of 16: cp.async double buffer, 32-byte rows, swizzled halves, ldmatrix, mma.
enum class Gemm { Right, NoWait, ShallowWait, NoCommit, NoBarrier, EarlyReuse, WrongSwizzle, MisalignedRow, NoClear };

inline constexpr unsigned kGemmDepth = 64;

// 128 threads: warp 0 multiplies, all load. `a` is 16 x 64, `b` 8 x 64, both bf16 with the depth innermost.
inline void gemm(Gemm bug, const __nv_bfloat16* a, const __nv_bfloat16* b, float* out) {
    PTX_SHARED_ARRAY(unsigned char, tiles, 2 * 24 * 32);
    const unsigned t = threadIdx.x;
    const auto base = ptx::shared_address(tiles);
    // The two 16-byte halves of a row trade places every four rows.
    const auto place = [](unsigned stage, unsigned row, unsigned half) {
        return stage * 768 + row * 32 + (half ^ (row / 4 & 1)) * 16;
    };
    const auto load = [&](unsigned step) {
        if (t < 48) {
            const unsigned row = t / 2, half = t % 2;
            const auto* source = (row < 16 ? a + row * kGemmDepth : b + (row - 16) * kGemmDepth) + step * 16 + half * 8;
            const unsigned offset = bug == Gemm::WrongSwizzle ? (step & 1) * 768 + row * 32 + half * 16
                                                              : place(step & 1, row, half);
            ptx::cp_async_cg_16(base + offset, source);
        }
        if (bug != Gemm::NoCommit) ptx::cp_async_commit_group();
    };
    float d[4];
    for (float& x : d) x = 0.0f;
    if (bug == Gemm::NoClear) {
        PTX_SHARED_ARRAY(float, accumulators, 4);
        for (int e = 0; e < 4; ++e) d[e] = accumulators[e];
    }
    load(0);
    for (unsigned step = 0; step < kGemmDepth / 16; ++step) {
        if (step + 1 < kGemmDepth / 16) {
            load(step + 1);
            ptx::cp_async_wait_group<1>();
        } else if (bug == Gemm::ShallowWait) {
            ptx::cp_async_wait_group<1>();
        } else if (bug != Gemm::NoWait) {
            ptx::cp_async_wait_group<0>();
        }
        if (bug != Gemm::NoBarrier) __syncthreads();
        if (t < 32) {
            uint32_t fa[4], fb[2];
            const unsigned stage = step & 1;
            ptx::ldmatrix_x4(fa, base + place(stage, t % 16, t / 16) + (bug == Gemm::MisalignedRow ? 8 : 0));
            ptx::ldmatrix_x2(fb, base + place(stage, 16 + t % 8, t / 8 & 1));
            ptx::mma_m16n8k16_bf16(d, fa, fb);
        }
        if (bug != Gemm::EarlyReuse) __syncthreads();
    }
    if (t < 32)
        for (int e = 0; e < 4; ++e) out[(t / 4 + e / 2 * 8) * 8 + t % 4 * 2 + e % 2] = d[e];
}

// Sum of each row of `n` values by one block of 128 threads, with a tail.
enum class Reduce {
    Right, NoBarrier, ShortMask, OffByOneRead, OffByOneWrite, WriteBefore, BeyondShared, DivergentBarrier, SkippedRow,
    ShortLoop, WrongOffset, Misindexed,
};

inline void reduce(Reduce bug, const float* in, float* out, unsigned rows, unsigned n) {
    PTX_SHARED_ARRAY(float, partial, 4);
    const unsigned t = threadIdx.x, row = blockIdx.x;
    if (bug == Reduce::SkippedRow && row + 1 == rows) return;
    float sum = 0;
    const unsigned last = bug == Reduce::OffByOneRead ? n + 1 : bug == Reduce::ShortLoop ? n - 1 : n;
    for (unsigned i = t; i < last; i += 128) sum += in[row * n + i];
    const uint32_t mask = bug == Reduce::ShortMask ? 0x7fffffffu : 0xffffffffu;
    for (int offset = bug == Reduce::WrongOffset ? 8 : 16; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(mask, sum, offset);
    if (t % 32 == 0) partial[t / 32 + (bug == Reduce::BeyondShared ? 1 : 0)] = sum;
    if (bug == Reduce::DivergentBarrier) {
        if (t < 64) __syncthreads();
    } else if (bug != Reduce::NoBarrier) {
        __syncthreads();
    }
    if (t == 0) {
        const float total = partial[0] + partial[1] + partial[2] + partial[3];
        unsigned where = bug == Reduce::Misindexed ? rows - 1 - row : row;
        if (bug == Reduce::WriteBefore && row == 0)
            out[-1] = total;
        else
            out[where] = total;
        if (bug == Reduce::OffByOneWrite && row + 1 == rows) out[rows] = 0.0f;
    }
}

// Reversal within each warp through shared memory.
enum class Reverse { Right, NoSyncWarp };

inline void reverse(Reverse bug, const float* in, float* out) {
    PTX_SHARED_ARRAY(float, tile, 64);
    const unsigned t = threadIdx.x;
    tile[t] = in[t];
    if (bug != Reverse::NoSyncWarp) __syncwarp();
    out[t] = tile[t ^ 31];
}

// A producer thread streams tiles through a ring of bulk copies to two consumer warps.
enum class Ring {
    Right, NoEmptyWait, NoFullWait, TooManyBytes, TooFewBytes, WrongCount, WrongParity, NoInitBarrier, NoInit, NoArrive,
    LateExpect,
};

inline constexpr unsigned kRingStages = 2, kRingTiles = 6, kRingFloats = 64;

inline void ring(Ring bug, const float* in, float* out) {
    PTX_SHARED_ARRAY(float, tiles, kRingStages* kRingFloats);
    PTX_SHARED_ARRAY(uint64_t, full, kRingStages);
    PTX_SHARED_ARRAY(uint64_t, empty, kRingStages);
    const unsigned t = threadIdx.x;
    if (t == 0 && bug != Ring::NoInit) {
        for (unsigned s = 0; s < kRingStages; ++s) {
            ptx::mbarrier_init(&full[s], 1);
            ptx::mbarrier_init(&empty[s], bug == Ring::WrongCount ? 65 : 64);
        }
        ptx::fence_mbarrier_init();
    }
    if (bug != Ring::NoInitBarrier) __syncthreads();
    if (t == 64) {
        for (unsigned i = 0; i < kRingTiles; ++i) {
            const unsigned s = i % kRingStages;
            const uint32_t bytes = kRingFloats * 4 + (bug == Ring::TooManyBytes ? 16 : 0) - (bug == Ring::TooFewBytes ? 16 : 0);
            if (bug != Ring::NoEmptyWait) ptx::mbarrier_wait_parity(&empty[s], (i / kRingStages & 1) ^ 1);
            if (bug == Ring::LateExpect) ptx::mbarrier_arrive(&full[s]);
            else ptx::mbarrier_arrive_expect_tx(&full[s], bytes);
            ptx::cp_async_bulk_load(&tiles[s * kRingFloats], in + i * kRingFloats, kRingFloats * 4, &full[s]);
            if (bug == Ring::LateExpect) ptx::mbarrier_expect_tx(&full[s], bytes);
        }
    } else if (t < 64) {
        for (unsigned i = 0; i < kRingTiles; ++i) {
            const unsigned s = i % kRingStages;
            const uint32_t parity = (i / kRingStages & 1) ^ (bug == Ring::WrongParity ? 1u : 0u);
            if (bug != Ring::NoFullWait) ptx::mbarrier_wait_parity(&full[s], parity);
            out[i * kRingFloats + t] = tiles[s * kRingFloats + t];
            if (bug != Ring::NoArrive) ptx::mbarrier_arrive(&empty[s]);
        }
    }
}

// Two warps hand a slot over with named barriers.
enum class Handover { Right, NoSync, WrongCount, WrongId, NoFreeWait };

inline void handover(Handover bug, float* out) {
    PTX_SHARED_ARRAY(float, slot, 32);
    const unsigned lane = threadIdx.x % 32;
    for (unsigned round = 0; round < 4; ++round) {
        if (threadIdx.x < 32) {
            if (round > 0 && bug != Handover::NoFreeWait) ptx::bar_sync(2, 64);
            slot[lane] = static_cast<float>(round * 32 + lane);
            ptx::bar_arrive(1, bug == Handover::WrongCount ? 32 : 64);
        } else {
            if (bug != Handover::NoSync) ptx::bar_sync(bug == Handover::WrongId ? 3 : 1, 64);
            out[round * 32 + lane] = slot[31 - lane];
            if (round < 3 && bug != Handover::NoFreeWait) ptx::bar_arrive(2, 64);
        }
    }
}

// Split-K: each block writes a partial sum, the last one to finish adds them up.
enum class SplitK { Right, WrongLast, WaitForAll, ReadOnlyPartials, EarlyCount, PlainCount };

inline void split_k(SplitK bug, const float* in, float* partial, uint32_t* counter, float* out) {
    if (threadIdx.x != 0) return;
    const unsigned b = blockIdx.x, blocks = gridDim.x;
    if (bug == SplitK::ReadOnlyPartials) ptx::ld_global_nc_u32(counter);
    uint32_t before = 0;
    if (bug == SplitK::EarlyCount) before = ptx::atom_add_acq_rel_gpu(counter, 1);
    partial[b] = in[2 * b] + in[2 * b + 1];
    if (bug == SplitK::PlainCount) {
        before = ptx::ld_relaxed_gpu(counter);
        ptx::st_relaxed_gpu(counter, before + 1);
    } else if (bug != SplitK::EarlyCount) {
        before = ptx::atom_add_acq_rel_gpu(counter, 1);
    }
    if (bug == SplitK::WaitForAll) {
        while (ptx::ld_acquire_gpu(counter) != blocks + 1) {
        }
    }
    if (before == blocks - (bug == SplitK::WrongLast ? 2 : 1)) {
        float sum = 0;
        for (unsigned i = 0; i < blocks; ++i) sum += partial[i];
        *out = sum;
    }
}

}  // namespace mutation

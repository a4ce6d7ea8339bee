// Loads and stores with cache hints and of system scope, atomics, reductions, and memory order between blocks.
#include "../ptx/load_store.h"
#include "../ptx/system_access.h"
#include "conformance.h"

namespace conformance {

// One block. a: 16 bytes a thread; out: the same through each of 7 pairs of load and store, then a word a thread.
__device__ inline void hints(const Params& p) {
    const auto* in = static_cast<const uint4*>(p.a);
    auto* out = static_cast<uint4*>(p.out);
    const uint32_t t = threadIdx.x, n = blockDim.x;
    ptx::st_global_cg_v4(out + t, ptx::ld_global_nc_v4(in + t));
    ptx::st_global_cs_v4(out + n + t, ptx::ld_global_nc_v4(in + t, ptx::createpolicy_evict_first()));
    ptx::st_global_cg_v4(out + 2 * n + t, ptx::ld_global_nc_v4(in + t, ptx::createpolicy_evict_last()));
    ptx::st_global_cs_v4(out + 3 * n + t, ptx::ld_global_cg_v4(in + t));
    ptx::st_global_cg_v4(out + 4 * n + t, ptx::ld_global_cs_v4(in + t));
    ptx::st_relaxed_sys_v4(out + 5 * n + t, ptx::ld_relaxed_sys_v4(in + t));
    auto* words = reinterpret_cast<uint32_t*>(out + 6 * n);
    ptx::st_global_cs_u32(words + t, ptx::ld_global_nc_u32(static_cast<const uint32_t*>(p.a) + t));
}

// Cooperative grid of one thread a block. out: counters, zero before: 0 and 1 tickets of atom.add, 2 and 3 sums of
// reductions, 4 exchange, 5 compare and swap, 6 the last block's sum of what all wrote to `b` before they took a ticket,
// 7 a flag passed from block to block, 8 the sum of the flags seen.
__device__ inline void atomics(const Params& p) {
    if (threadIdx.x != 0) return;
    auto* out = static_cast<uint32_t*>(p.out);
    auto* partial = static_cast<uint32_t*>(const_cast<void*>(p.b));
    const uint32_t b = blockIdx.x, blocks = gridDim.x;
    ptx::st_relaxed_gpu(partial + b, b + 1);
    ptx::fence_acq_rel_gpu();
    if (ptx::atom_add_acq_rel_gpu(out, 1) == blocks - 1) {
        uint32_t sum = 0;
        for (uint32_t i = 0; i < blocks; ++i) sum += ptx::ld_relaxed_gpu(partial + i);
        ptx::st_relaxed_sys(out + 6, sum);
    }
    ptx::red_add_release_gpu(out + 2, b);
    ptx::red_add_release_sys(out + 3, b + 1);
    // Every value goes in once and comes out once, but the last one in: the sum of those that came out tells which.
    ptx::atom_add_acq_rel_gpu(out + 1, ptx::atom_exch_acq_rel_sys(out + 4, b + 1));
    uint32_t expected = ptx::ld_relaxed_sys(out + 5);
    for (;;) {
        const uint32_t seen = ptx::atom_cas_acq_rel_gpu(out + 5, expected, expected + 3);
        if (seen == expected) break;
        expected = seen;
    }
    // A token from block 0 to the last one.
    if (b == 0) {
        ptx::fence_acq_rel_sys();
        ptx::st_release_gpu(out + 7, 1);
    } else {
        uint32_t token = ptx::ld_acquire_gpu(out + 7);
        while (token != b) token = b % 2 == 0 ? ptx::ld_acquire_gpu(out + 7) : ptx::ld_acquire_sys(out + 7);
        ptx::st_relaxed_gpu(out + 8, ptx::ld_relaxed_gpu(out + 8) + token);
        if (b % 2 == 0) ptx::st_release_gpu(out + 7, b + 1);
        else ptx::st_release_sys(out + 7, b + 1);
    }
}

}  // namespace conformance

LONGHAUL_KERNEL(conformance_hints, conformance::Params, 128, conformance::hints)
LONGHAUL_KERNEL(conformance_atomics, conformance::Params, 32, conformance::atomics)

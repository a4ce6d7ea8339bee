// All-reduce of small messages: every rank reads all ranks' data and sums it, in rank order, so all hold the same bits.
//
// One round a piece; (ranks - 1) times the message comes in over the links. Sums are f32, rounded once.
#include "../common/kernel.h"
#include "peer_exchange.h"

namespace longhaul {
namespace {

constexpr unsigned kThreads = 512;

template <class T>
__device__ __forceinline__ void all_reduce_one_shot(const AllReduceParams& p) {
    PTX_SHARED_ARRAY(uint32_t, gave_up, 4);
    PeerExchange exchange(p.peers, gave_up);
    const uint4* x = static_cast<const uint4*>(p.x) + blockIdx.y * p.units;
    uint4* out = static_cast<uint4*>(p.out) + blockIdx.y * p.units;
    const uint32_t slice = p.peers.slice_bytes / 16;
    const BlockPart part(p.units);
    for (ptx::uint64_t at = part.begin; at < part.end; at += slice) {
        const uint32_t count = static_cast<uint32_t>(part.end - at < slice ? part.end - at : slice);
        uint4* outgoing = exchange.outgoing();
        for (uint32_t unit = threadIdx.x; unit < count; unit += blockDim.x)
            ptx::st_global_cg_v4(outgoing + unit, ptx::ld_global_cs_v4(x + at + unit));
        exchange.exchange();
        for (uint32_t unit = threadIdx.x; unit < count; unit += blockDim.x)
            ptx::st_global_cg_v4(out + at + unit, pack_bits(sum_incoming<T>(exchange, p.peers.ranks, unit)));
    }
    if (part.begin < part.end) exchange.finish();
}

}  // namespace

LONGHAUL_KERNEL(all_reduce_one_shot_bf16, AllReduceParams, kThreads, all_reduce_one_shot<Bf16>)
LONGHAUL_KERNEL(all_reduce_one_shot_f32, AllReduceParams, kThreads, all_reduce_one_shot<float>)

}  // namespace longhaul

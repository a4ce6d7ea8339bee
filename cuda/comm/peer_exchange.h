// Exchanges of data between ranks through memory that all of them have mapped.
//
// Every rank has a region: a status word, a round counter a block, flags, and two slices a block. In a round a block writes
// its part into its own slice, tells the blocks of the same index on all ranks (release), waits until all of them have told
// it (acquire), and reads their slices. Slices alternate: round n + 2 writes where n did, and a block gets there only after
// all others have announced n + 1, which each does after it has read what n brought. Blocks of different indices share
// nothing, so launches with different grids may follow each other; counters live in the region, so a recorded launch may
// be replayed. A wait ends when the rank has come, after so many polls, or when the host says that the group has ended.
//
// The blocks of an index must run at once on all ranks. One launch can carry several ranks (gridDim.y of them), which is
// how one GPU, or the emulator, runs a whole group. Mirrored in crates/cuda/src/ops/comm.rs.
#pragma once

#include "../common/element.h"
#include "../ptx/convert.h"
#include "../ptx/load_store.h"
#include "../ptx/synchronising_access.h"
#include "../ptx/system_access.h"

namespace longhaul {

inline constexpr uint32_t kMostRanks = 16;
inline constexpr uint32_t kMostBlocks = 64;
inline constexpr uint32_t kAborted = 0xffffffffu;
// Polls of a flag between looks at the abort word, which lies on the far side of the bus.
inline constexpr uint32_t kAbortPolls = 128;

struct PeerParams {
    void* regions[kMostRanks];  // of every rank, as mapped here
    uint32_t ranks;
    uint32_t first_rank;   // of the launch: blocks with blockIdx.y 0
    uint32_t slice_bytes;  // a multiple of 16
    uint32_t most_polls;   // of one flag, before a block gives up
    const uint32_t* abort;  // host memory: not 0 once the group has ended, or null
};

// Words at the start of a region.
inline constexpr uint32_t kStatusWord = 0;  // 0, 1 + the rank that was waited for in vain, or kAborted
inline constexpr uint32_t kCounterWord = 16;
inline constexpr uint32_t kFlagWord = kCounterWord + kMostBlocks;
inline constexpr uint32_t kDataWord = kFlagWord + kMostBlocks * kMostRanks;
static_assert(kDataWord % 4 == 0, "slices are aligned to 16 bytes");

class PeerExchange {
public:
    // `gave_up` is a word of shared memory.
    __device__ __forceinline__ PeerExchange(const PeerParams& params, uint32_t* gave_up)
        : p_(params), gave_up_(gave_up), rank_(params.first_rank + blockIdx.y) {
        round_ = *word(rank_, kCounterWord + blockIdx.x);
        // Once a rank was waited for in vain, nobody waits any more.
        if (threadIdx.x == 0) *gave_up = *word(rank_, kStatusWord);
    }

    __device__ __forceinline__ uint32_t rank() const { return rank_; }

    // This rank's slice for the next round.
    __device__ __forceinline__ uint4* outgoing() const { return slice(rank_, round_ + 1); }

    // What `rank` sent in the last round.
    __device__ __forceinline__ const uint4* incoming(uint32_t rank) const { return slice(rank, round_); }

    // A round. All threads of the block; what they wrote to the outgoing slice before is what the others get.
    __device__ __forceinline__ void exchange() {
        ++round_;
        __syncthreads();
        if (threadIdx.x < p_.ranks) {
            ptx::st_release_sys(flag(threadIdx.x, rank_), round_);
            for (uint32_t polls = 0; *gave_up_ == 0; ++polls) {
                const uint32_t seen = ptx::ld_acquire_sys(flag(rank_, threadIdx.x));
                if (static_cast<ptx::int32_t>(seen - round_) >= 0) break;
                const bool aborted =
                    polls % kAbortPolls == kAbortPolls - 1 && p_.abort != nullptr && ptx::ld_relaxed_sys(p_.abort) != 0;
                if (aborted || polls == p_.most_polls) {
                    *gave_up_ = 1;
                    ptx::st_release_sys(word(rank_, kStatusWord), aborted ? kAborted : threadIdx.x + 1);
                }
            }
        }
        __syncthreads();
    }

    // To be called once after the last round.
    __device__ __forceinline__ void finish() const {
        if (threadIdx.x == 0) *word(rank_, kCounterWord + blockIdx.x) = round_;
    }

private:
    __device__ __forceinline__ uint32_t* word(uint32_t rank, uint32_t index) const {
        return static_cast<uint32_t*>(p_.regions[rank]) + index;
    }
    // Where `source` announces its rounds to `rank`.
    __device__ __forceinline__ uint32_t* flag(uint32_t rank, uint32_t source) const {
        return word(rank, kFlagWord + blockIdx.x * kMostRanks + source);
    }
    __device__ __forceinline__ uint4* slice(uint32_t rank, uint32_t round) const {
        const ptx::uint64_t offset = static_cast<ptx::uint64_t>(2 * blockIdx.x + round % 2) * p_.slice_bytes;
        return reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(word(rank, kDataWord)) + offset);
    }

    const PeerParams& p_;
    uint32_t* gave_up_;
    uint32_t rank_;
    uint32_t round_;
};

// 16 bytes of elements, widened.
template <class T>
struct Pack {
    static constexpr uint32_t kElements = 16 / sizeof(T);
    float values[kElements];
};

template <class T>
__device__ __forceinline__ Pack<T> unpack(uint4 bits);
template <>
__device__ __forceinline__ Pack<float> unpack<float>(uint4 bits) {
    return {{__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)}};
}
template <>
__device__ __forceinline__ Pack<Bf16> unpack<Bf16>(uint4 bits) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    Pack<Bf16> pack;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
        pack.values[2 * i] = __uint_as_float(words[i] << 16);
        pack.values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return pack;
}

__device__ __forceinline__ uint4 pack_bits(const Pack<float>& pack) {
    return {__float_as_uint(pack.values[0]), __float_as_uint(pack.values[1]), __float_as_uint(pack.values[2]),
            __float_as_uint(pack.values[3])};
}
__device__ __forceinline__ uint4 pack_bits(const Pack<Bf16>& pack) {
    uint32_t words[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
        words[i] = ptx::cvt_bf16x2(pack.values[2 * i], pack.values[2 * i + 1]);
    return {words[0], words[1], words[2], words[3]};
}

// Sum of unit `unit` of all ranks' slices, in rank order.
template <class T>
__device__ __forceinline__ Pack<T> sum_incoming(const PeerExchange& exchange, uint32_t ranks, uint32_t unit) {
    Pack<T> sum = unpack<T>(ptx::ld_global_cg_v4(exchange.incoming(0) + unit));
    for (uint32_t rank = 1; rank < ranks; ++rank) {
        const Pack<T> next = unpack<T>(ptx::ld_global_cg_v4(exchange.incoming(rank) + unit));
#pragma unroll
        for (uint32_t i = 0; i < Pack<T>::kElements; ++i) sum.values[i] += next.values[i];
    }
    return sum;
}

// Parameters of an all-reduce of `units` 16-byte units a rank.
struct AllReduceParams {
    PeerParams peers;
    const void* x;  // the ranks of the launch one after the other
    void* out;      // may be x
    ptx::uint64_t units;
};

// The part of a message that a block exchanges: whole units, cut into pieces that fit a slice.
struct BlockPart {
    ptx::uint64_t begin, end;

    __device__ __forceinline__ explicit BlockPart(ptx::uint64_t units) {
        const ptx::uint64_t each = (units + gridDim.x - 1) / gridDim.x;
        begin = each * blockIdx.x < units ? each * blockIdx.x : units;
        end = begin + each < units ? begin + each : units;
    }
};

}  // namespace longhaul

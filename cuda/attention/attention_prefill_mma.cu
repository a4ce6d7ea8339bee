// Prefill attention with mma.sync: flash attention over the paged cache, causal, plain or dual-chunk positions in one pass.
//
// A block takes 64 packed query rows of one KV head of one sequence: the group's heads of consecutive tokens, so that a
// group of 7 fills its rows as well as one of 8. Four warps of 16 rows share tiles of up to 64 keys, two stages of
// cp.async. No tile crosses a chunk boundary; where the chunk of the keys changes what the queries are rotated to, the
// query tile is rotated anew. Late tiles, which meet the most keys, start first.
#include "../common/kernel.h"
#include "flash_tile.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kRows = 64;

template <uint32_t HeadDim>
struct Prefill {
    static constexpr uint32_t kTileBytes = kTileTokens * HeadDim * 2;

    const AttentionParams& p;
    const SequenceInfo& sequence;
    uint32_t kv_head, first_packed, packed_rows;
    unsigned char* shared;

    __device__ __forceinline__ uint32_t position_of(uint32_t packed) const {
        return sequence.kv_len - sequence.rows + packed / p.kv.group();
    }
    __device__ __forceinline__ uint32_t head_of(uint32_t packed) const {
        return kv_head * p.kv.group() + packed % p.kv.group();
    }
    __device__ __forceinline__ uint32_t row_of(uint32_t packed) const {
        return sequence.first_row + packed / p.kv.group();
    }

    // Rotates the query tile against keys of chunk `key_chunk`.
    __device__ __forceinline__ void rotate(uint32_t key_chunk) const {
        constexpr uint32_t half = HeadDim / 2;
        for (uint32_t i = threadIdx.x; i < kRows * half; i += kThreads) {
            const uint32_t row = i / half, packed = first_packed + row;
            if (packed < packed_rows) {
                const Bf16* q = static_cast<const Bf16*>(p.q) + static_cast<uint64_t>(row_of(packed)) * p.q_stride +
                                head_of(packed) * HeadDim;
                rotate_pair<HeadDim>(p, q, position_of(packed), key_chunk, shared, row, i % half);
            } else {
                store_rotated<HeadDim>(shared, row, i % half, 0.0f, 0.0f);
            }
        }
    }

    // Tokens of the tile that begins at `begin`: up to 64, within one chunk and below `end`.
    __device__ __forceinline__ uint32_t tile_tokens(uint32_t begin, uint32_t end) const {
        uint32_t stop = begin + kTileTokens < end ? begin + kTileTokens : end;
        if (p.rope.chunk_len != 0) {
            const uint32_t boundary = (begin / p.rope.chunk_len + 1) * p.rope.chunk_len;
            stop = stop < boundary ? stop : boundary;
        }
        return stop - begin;
    }

    // Names the rotation of the query tile against keys of a chunk: from two chunks before the first row's on, all chunks
    // further back take the same one.
    __device__ __forceinline__ uint32_t rotation(uint32_t first_position, uint32_t key_chunk) const {
        return p.rope.chunk_of(first_position) >= key_chunk + 2 ? ~1u : key_chunk;
    }

    __device__ __forceinline__ void run() const {
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const uint32_t tile = ptx::shared_address(shared), ring = tile + kRows * HeadDim * 2;
        const uint32_t last_packed = first_packed + kRows < packed_rows ? first_packed + kRows - 1 : packed_rows - 1;
        const uint32_t first_position = position_of(first_packed), last_position = position_of(last_packed);
        const uint32_t end = last_position + 1;
        FlashState<HeadDim> state;
        state.reset();
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) {
            const uint32_t packed = first_packed + warp * 16 + lane / 4 + r * 8;
            const bool inside = packed < packed_rows;
            state.last_key[r] = inside ? position_of(packed) : 0;
            state.scale[r] = inside ? p.step->logit_scale(row_of(packed)) * kLog2E : 0.0f;
        }
        uint32_t begin = 0, count = tile_tokens(0, end), stage = 0, rotated = ~0u;
        load_tile<HeadDim, kThreads>(p, sequence, kv_head, begin, count, ring, ring + kTileBytes);
        ptx::cp_async_commit_group();
        while (begin < end) {
            const uint32_t wanted = rotation(first_position, p.rope.chunk_of(begin));
            if (wanted != rotated) {
                __syncthreads();
                rotate(p.rope.chunk_of(begin));
                __syncthreads();
                state.load_queries(tile, warp * 16);
                rotated = wanted;
            }
            const uint32_t next = begin + count, next_count = next < end ? tile_tokens(next, end) : 0;
            const uint32_t next_ring = ring + (stage ^ 1) * 2 * kTileBytes;
            ptx::cp_async_wait_group<0>();
            __syncthreads();
            // Everybody has finished the tile that the next one overwrites.
            if (next < end)
                load_tile<HeadDim, kThreads>(p, sequence, kv_head, next, next_count, next_ring, next_ring + kTileBytes);
            ptx::cp_async_commit_group();
            const uint32_t keys = ring + stage * 2 * kTileBytes, values = keys + kTileBytes;
            if (count == kTileTokens && begin + kTileTokens <= first_position + 1)
                state.template attend<kTileTokens, false>(keys, values, 0, begin, next);
            else
                state.template attend<kTileTokens, true>(keys, values, 0, begin, next);
            stage ^= 1;
            begin = next;
            count = next_count;
        }
        state.finish();
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) {
            const uint32_t packed = first_packed + warp * 16 + lane / 4 + r * 8;
            if (packed >= packed_rows) continue;
            const float factor = 1.0f / state.sum[r];
            Bf16* out = static_cast<Bf16*>(p.out) + static_cast<uint64_t>(row_of(packed)) * p.out_stride +
                        head_of(packed) * HeadDim + lane % 4 * 2;
#pragma unroll
            for (uint32_t n = 0; n < HeadDim / 8; ++n)
                *reinterpret_cast<uint32_t*>(out + n * 8) =
                    ptx::cvt_bf16x2(state.out[n][2 * r] * factor, state.out[n][2 * r + 1] * factor);
        }
    }
};

template <uint32_t HeadDim>
__device__ __forceinline__ void attention_prefill(const AttentionParams& p) {
    // Tiles of all sequences follow each other; the last ones come first.
    const StepHeader& step = *p.step;
    uint32_t index = blockIdx.x;
    for (uint32_t i = step.prefill_count; i-- > 0;) {
        const SequenceInfo& sequence = step.sequence(step.words()[step.prefill_sequences + i]);
        const uint32_t packed_rows = sequence.rows * p.kv.group(), tiles = (packed_rows + kRows - 1) / kRows;
        if (index < tiles) {
            const Prefill<HeadDim> work{p, sequence, blockIdx.y, (tiles - 1 - index) * kRows, packed_rows,
                                        ptx::dynamic_shared<unsigned char>()};
            work.run();
            return;
        }
        index -= tiles;
    }
}

}  // namespace

LONGHAUL_KERNEL(attention_prefill_mma_hd64_bf16, AttentionParams, kThreads, attention_prefill<64>)
LONGHAUL_KERNEL(attention_prefill_mma_hd128_bf16, AttentionParams, kThreads, attention_prefill<128>)

}  // namespace longhaul

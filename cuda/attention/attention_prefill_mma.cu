// Prefill attention with mma.sync: flash attention over the paged cache, causal, plain or dual-chunk positions in one pass.
//
// A block takes 128 (or 64) packed query rows of one KV head of one sequence: the group's heads of consecutive tokens, so
// that a group of 7 fills its rows as well as one of 8. Four warps of two (or one) tiles of 16 rows share tiles of up to 64
// keys. No tile crosses a chunk boundary; where the chunk of the keys changes what the queries are rotated to, the query
// tile is rotated anew. A row meets its keys in tiles that depend on the keys' positions only: neither the prompt's cut
// into steps nor the rows beside it change a bit. Late tiles, which meet the most keys, start first.
//
// Copies of V run under Q K^T of the same tile, copies of the next K under softmax and P V; two barriers a tile.
// Derived, head_dim 128, a tile of 128 rows x 64 keys: 32 KB copied for 1024 mma; ldmatrix moves 192 B an mma in Q K^T (Q is
// read again: registers are for O and S) and 128 B in P V, 1.25 cycles of shared memory where an mma takes about 1.4 (H100)
// to 2 (A100); with one tile of rows a warp it were 2.3. 64 KB of shared memory and at most 255 registers: 2 blocks a
// multiprocessor on sm_80 and sm_90. 64 rows: 48 KB, for sm_89 and for grids that would not fill the device.
#include "../common/kernel.h"
#include "flash_tile.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWarps = kThreads / 32;

template <uint32_t HeadDim, uint32_t Tiles>
struct Prefill {
    static constexpr uint32_t kRows = kWarps * Tiles * 16;
    static constexpr uint32_t kRowBytes = HeadDim * 2;
    static constexpr uint32_t kChunks = HeadDim / 8;
    static constexpr uint32_t kRowsAtOnce = kThreads / kChunks;  // rows of a tile that one copy of every thread fills
    static constexpr uint32_t kPieces = kTileTokens / kPiece;

    const AttentionParams& p;
    // Of the sequence: tokens before the step, first row in the step, offset of the block table.
    uint32_t cached, first_row, table;
    uint32_t kv_head, first_head, group;  // the KV head, and the query heads that read it
    uint32_t first_packed, packed_rows;
    unsigned char* shared;

    __device__ __forceinline__ uint32_t position_of(uint32_t packed) const {
        return cached + packed / group;
    }

    // Rotates the query tile against keys of chunk `key_chunk`.
    __device__ __forceinline__ void rotate(uint32_t key_chunk) const {
        constexpr uint32_t chunks = kChunks / 2;
        for (uint32_t i = threadIdx.x; i < kRows * chunks; i += kThreads) {
            const uint32_t row = i / chunks, packed = first_packed + row;
            if (packed < packed_rows) {
                const uint32_t token = packed / group, head = first_head + packed % group;
                const uint32_t step_row = first_row + token;
                const Bf16* q = static_cast<const Bf16*>(p.q) + static_cast<uint64_t>(step_row) * p.q_stride + head * HeadDim;
                rotate_chunk<HeadDim>(p.rope, q, cached + token, key_chunk,
                                      p.step->logit_scale(step_row) * kLog2E, shared, row, i % chunks);
            } else {
                clear_chunk<HeadDim>(shared, row, i % chunks);
            }
        }
    }

    // Tokens of the tile that begins at `begin`: up to 64, within one chunk and below `end`.
    __device__ __forceinline__ uint32_t tile_tokens(uint32_t begin, uint32_t boundary, uint32_t end) const {
        uint32_t stop = begin + kTileTokens < end ? begin + kTileTokens : end;
        stop = stop < boundary ? stop : boundary;
        return stop - begin;
    }

    // Pool blocks of the tile of `count` keys at `at`, one for each 16 keys.
    __device__ __forceinline__ void look_up(KvCursor at, uint32_t count, uint32_t (&blocks)[kPieces]) const {
#pragma unroll
        for (uint32_t piece = 0; piece < kPieces; ++piece) {
            blocks[piece] = piece * kPiece < count ? p.step->words()[at.entry] : 0;
            at.advance(kPiece, p.kv.block_size);
        }
    }

    // Copies the tile of `count` keys that begins in slot `slot` from one plane of the pool; further rows are zero.
    __device__ __forceinline__ void load(const void* plane, const uint32_t (&blocks)[kPieces], uint32_t slot,
                                         uint32_t count, uint32_t tile) const {
        const uint32_t row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
        const uint32_t head_elements = p.kv.block_size * HeadDim, block_elements = p.kv.kv_heads * head_elements;
        const Bf16* base = static_cast<const Bf16*>(plane) + kv_head * head_elements + row * HeadDim + chunk * 8;
        const uint32_t to = tile + swizzled<HeadDim>(row, chunk);
#pragma unroll
        for (uint32_t piece = 0; piece < kPieces; ++piece) {
            const Bf16* source = base + static_cast<uint64_t>(blocks[piece]) * block_elements + slot * HeadDim;
#pragma unroll
            for (uint32_t r = piece * kPiece; r < (piece + 1) * kPiece; r += kRowsAtOnce)
                ptx::cp_async_cg_16_zfill(to + r * kRowBytes, source + (r - piece * kPiece) * HeadDim,
                                          r + row < count ? 16 : 0);
            slot = slot + kPiece == p.kv.block_size ? 0 : slot + kPiece;
        }
    }

    __device__ __forceinline__ void run() const {
        const uint32_t lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * Tiles * 16;
        const uint32_t keys = ptx::shared_address(shared) + kRows * kRowBytes, values = keys + kTileTokens * kRowBytes;
        const uint32_t query = ptx::shared_address(shared) + swizzled<HeadDim>(warp_row + lane % 16, lane / 16);
        const uint32_t last_packed = (first_packed + kRows < packed_rows ? first_packed + kRows : packed_rows) - 1;
        const uint32_t first_position = position_of(first_packed), end = position_of(last_packed) + 1;
        const uint32_t chunk_len = p.rope.chunk_len == 0 ? ~0u : p.rope.chunk_len;

        FlashState<HeadDim, Tiles, 2> state;
        state.reset();
        uint32_t begin = 0, boundary = chunk_len, count = tile_tokens(0, boundary, end);
        uint32_t blocks[kPieces];
        KvCursor at{table, 0};
        look_up(at, count, blocks);
        load(p.kv.keys, blocks, at.slot, count, keys);
        ptx::cp_async_commit_group();
        rotate(0);
        while (true) {
            // K is there; everybody has read the last V.
            ptx::cp_async_wait_group<0>();
            __syncthreads();
            load(p.kv.values, blocks, at.slot, count, values);
            ptx::cp_async_commit_group();
            const uint32_t next = begin + count;
            const bool chunk_ends = next == boundary;
            const bool unmasked = count == kTileTokens && next <= first_position + 1;
            uint32_t next_count = 0;
            if (next < end) {
                if (chunk_ends) boundary += chunk_len;
                next_count = tile_tokens(next, boundary, end);
                at.advance(count, p.kv.block_size);
                look_up(at, next_count, blocks);
            }
            float score[Tiles][kTileTokens / 8][4];
            state.template multiply<kTileTokens>(
                keys,
                [&](uint32_t k, uint32_t (&a)[Tiles][4]) {
#pragma unroll
                    for (uint32_t t = 0; t < Tiles; ++t) ptx::ldmatrix_x4(a[t], (query ^ (k * 32)) + t * 16 * kRowBytes);
                },
                score);
            // V is there; everybody has read K and Q.
            ptx::cp_async_wait_group<0>();
            __syncthreads();
            if (next < end) load(p.kv.keys, blocks, at.slot, next_count, keys);
            ptx::cp_async_commit_group();
            if (!unmasked)
                state.template mask<kTileTokens>(score, [&](uint32_t t, uint32_t r) {
                    const uint32_t packed = first_packed + warp_row + t * 16 + r * 8 + lane / 4;
                    // Rows that are not there count as the last: what they see is of no consequence, but finite.
                    const uint32_t own = position_of(packed < packed_rows ? packed : packed_rows - 1);
                    return static_cast<int32_t>((own < next ? own : next - 1) - begin);
                });
            state.template weigh<kTileTokens>(score);
            state.template accumulate<kTileTokens>(values, score);
            if (next >= end) break;
            // Chunks from the one before the first row's on have a rotation each; what lies further back shares one.
            if (chunk_ends && next / chunk_len + 1 >= first_position / chunk_len) rotate(next / chunk_len);
            begin = next;
            count = next_count;
        }
        state.finish();
#pragma unroll
        for (uint32_t t = 0; t < Tiles; ++t)
#pragma unroll
            for (uint32_t r = 0; r < 2; ++r) {
                const uint32_t packed = first_packed + warp_row + t * 16 + r * 8 + lane / 4;
                if (packed >= packed_rows) continue;
                const float factor = 1.0f / state.sum[t][r];
                Bf16* out = static_cast<Bf16*>(p.out) +
                            static_cast<uint64_t>(first_row + packed / group) * p.out_stride +
                            (first_head + packed % group) * HeadDim + lane % 4 * 2;
#pragma unroll
                for (uint32_t n = 0; n < HeadDim / 8; ++n)
                    *reinterpret_cast<uint32_t*>(out + n * 8) =
                        ptx::cvt_bf16x2(state.out[t][n][2 * r] * factor, state.out[t][n][2 * r + 1] * factor);
            }
    }
};

template <uint32_t HeadDim, uint32_t Tiles>
__device__ __forceinline__ void attention_prefill(const AttentionParams& p) {
    using Work = Prefill<HeadDim, Tiles>;
    // Tiles of all sequences follow each other; the last ones come first.
    const StepHeader& step = *p.step;
    const uint32_t kv_head = blockIdx.y, group = p.kv.query_heads_of(kv_head);
    uint32_t index = blockIdx.x;
    for (uint32_t i = step.prefill_count; i-- > 0;) {
        const SequenceInfo& sequence = step.sequence(step.words()[step.prefill_sequences + i]);
        const uint32_t packed_rows = sequence.rows * group, tiles = (packed_rows + Work::kRows - 1) / Work::kRows;
        if (index < tiles) {
            const Work work{p,
                            sequence.kv_len - sequence.rows,
                            sequence.first_row,
                            sequence.block_table,
                            kv_head,
                            p.kv.first_query_head(kv_head),
                            group,
                            (tiles - 1 - index) * Work::kRows,
                            packed_rows,
                            ptx::dynamic_shared<unsigned char>()};
            work.run();
            return;
        }
        index -= tiles;
    }
}

}  // namespace

LONGHAUL_KERNEL(attention_prefill_mma_hd64_64_bf16, AttentionParams, kThreads, attention_prefill<64, 1>)
LONGHAUL_KERNEL(attention_prefill_mma_hd64_128_bf16, AttentionParams, kThreads, attention_prefill<64, 2>)
LONGHAUL_KERNEL(attention_prefill_mma_hd128_64_bf16, AttentionParams, kThreads, attention_prefill<128, 1>)
LONGHAUL_KERNEL(attention_prefill_mma_hd128_128_bf16, AttentionParams, kThreads, attention_prefill<128, 2>)

}  // namespace longhaul

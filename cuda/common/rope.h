// Rotation tables and position scheme on the device: plain RoPE, YaRN and Dual Chunk Attention.
//
// NeoX pairing (d, d + head_dim / 2). Source: docs/architecture.md, "Positions"; arXiv 2402.17463. Mirrored by
// crates/cuda/src/rope.rs.
#pragma once

#include "../ptx/target.h"

namespace longhaul {

using ptx::uint32_t;

struct RopeParams {
    const float* cos;  // [rows, head_dim / 2]
    const float* sin;
    uint32_t rows;        // of the tables
    uint32_t chunk_size;  // C: the largest rotated query position; 0 = plain positions
    uint32_t chunk_len;   // L = C - w: period of the key positions; 0 = plain positions
    uint32_t reserved;

    // Table row that rotates the key at `position`.
    __device__ uint32_t key_row(uint32_t position) const { return chunk_len == 0 ? position : position % chunk_len; }

    // Table row that rotates the query at `position` against keys of chunk `key_chunk` (0 for plain positions).
    __device__ uint32_t query_row(uint32_t position, uint32_t key_chunk) const {
        if (chunk_len == 0) return position;
        const uint32_t chunk = position / chunk_len, offset = position % chunk_len;
        const uint32_t distance = chunk - (key_chunk < chunk ? key_chunk : chunk);
        if (distance == 0) return offset;
        const uint32_t row = distance == 1 ? offset + chunk_len : 2 * chunk_len - 1;
        return row < chunk_size ? row : chunk_size;
    }

    // Chunk of the key at `position`; 0 for plain positions.
    __device__ uint32_t chunk_of(uint32_t position) const { return chunk_len == 0 ? 0 : position / chunk_len; }
};

}  // namespace longhaul

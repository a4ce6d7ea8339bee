// The integers of one step in device memory: a header, then packed arrays that the header locates.
//
// One host-to-device copy a step fills it. Kernels take its address and read the true lengths from it, so that a
// recorded launch stays right when lengths change. Mirrored by crates/cuda/src/step.rs.
#pragma once

#include "../ptx/target.h"

namespace longhaul {

using ptx::uint32_t;
using ptx::uint64_t;

// The rows of one sequence: a prefill chunk (rows > 1) or a decode row.
struct SequenceInfo {
    uint32_t first_row;    // in the step
    uint32_t rows;
    uint32_t kv_len;       // tokens in the cache once the step has written its rows
    uint32_t block_table;  // offset of its first entry, in words from the header
};

struct StepHeader {
    uint32_t rows;        // of all sequences
    uint32_t sequences;
    uint32_t logit_rows;
    uint32_t max_kv_len;  // over the sequences
    // Offsets of arrays, in 4-byte words from the header.
    uint32_t ids;           // u32 [rows]
    uint32_t positions;     // u32 [rows], absolute
    uint32_t logit_scales;  // f32 [rows]
    uint32_t row_sequence;  // u32 [rows]: index of the row's sequence
    uint32_t sequence_info; // SequenceInfo [sequences]
    uint32_t logit_row_ids; // u32 [logit_rows]
    uint32_t decode_sequences;   // u32 [decode_count]: sequences with one row
    uint32_t decode_count;
    uint32_t prefill_sequences;  // u32 [prefill_count]: sequences with more than one row
    uint32_t prefill_count;
    uint32_t reserved[2];

    __device__ const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(this); }
    __device__ uint32_t id(uint32_t row) const { return words()[ids + row]; }
    __device__ uint32_t position(uint32_t row) const { return words()[positions + row]; }
    __device__ float logit_scale(uint32_t row) const { return __uint_as_float(words()[logit_scales + row]); }
    __device__ uint32_t sequence_of(uint32_t row) const { return words()[row_sequence + row]; }
    __device__ const SequenceInfo& sequence(uint32_t index) const {
        return reinterpret_cast<const SequenceInfo*>(words() + sequence_info)[index];
    }
    // Pool block that holds token `position` of the sequence.
    __device__ uint32_t block(const SequenceInfo& sequence, uint32_t position, uint32_t block_size) const {
        return words()[sequence.block_table + position / block_size];
    }
    __device__ const uint32_t* block_table(const SequenceInfo& sequence) const {
        return words() + sequence.block_table;
    }
    __device__ uint32_t logit_row(uint32_t index) const { return words()[logit_row_ids + index]; }
};

}  // namespace longhaul

// The routing of a step on the device. Mirrored by crates/cuda/src/ops/moe.rs.
#pragma once

#include "../ptx/target.h"

namespace longhaul {

using ptx::uint32_t;
using ptx::uint64_t;

// A slot is a (row, choice) pair: slot = row * top_k + choice. A place is a slot's position when slots are ordered by
// expert. Slots of experts that other ranks hold have no place.
inline constexpr uint32_t kNowhere = 0xffffffffu;

struct Routing {
    uint32_t* slot_expert;    // [slots], counted from the rank's first expert
    float* slot_weight;       // [slots]
    uint32_t* slot_place;     // [slots], or kNowhere
    uint32_t* permuted_slot;  // [slots], by place: offsets[experts] of them
    uint32_t* offsets;        // [experts + 1]: first place of each expert
    uint32_t rows;
    uint32_t experts;         // of the rank
    uint32_t top_k;
    uint32_t reserved;
};

}  // namespace longhaul

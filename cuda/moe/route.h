// Routing of a mixture of experts: softmax over all experts, top-k, counts, and the permutation that brings an expert's rows
// together. Everything stays on the device; ranks are computed, never grabbed, so the permutation is the same every time: by
// expert, then row, then slot.
//
// moe_route        one block for up to kRouteRows rows: a decode step is one launch
// moe_route_choose, moe_route_scan, moe_route_place   more rows: top-k and counts of every kRouteRows rows, offsets of
//                  experts and groups of rows, places
//
// Source of the rule: Qwen2MoeSparseMoeBlock of transformers (softmax in f32 over all experts, then top-k). Mirrored by
// crates/cuda/src/ops/moe.rs.
#pragma once

#include "../common/kernel.h"
#include "../common/reduce.h"
#include "moe.h"

namespace longhaul {

struct RouteParams {
    const float* scores;  // [rows, scores_stride]
    Routing routing;
    uint32_t* counts;  // [groups, experts]: slots of each expert in a group, then in the groups before it; null in moe_route
    uint32_t scores_stride;
    uint32_t normalise;  // divide the chosen weights by their sum
    uint32_t first_expert;    // of the rank
    uint32_t router_experts;  // of all ranks: columns of scores
};

inline constexpr uint32_t kRouteRows = 64;  // of a group
inline constexpr uint32_t kMostExperts = 512;
inline constexpr uint32_t kPerLane = kMostExperts / 32;

// Top-k of one row by one warp: k rounds of the largest probability, the lower index on a tie.
__device__ __forceinline__ void choose_experts(const RouteParams& p, uint32_t row) {
    const Routing& r = p.routing;
    const uint32_t lane = threadIdx.x % 32;
    const float* scores = p.scores + static_cast<uint64_t>(row) * p.scores_stride;
    const float minus_infinity = __uint_as_float(0xff800000u);
    float value[kPerLane], largest = minus_infinity;
#pragma unroll
    for (uint32_t i = 0; i < kPerLane; ++i) {
        const uint32_t expert = i * 32 + lane;
        value[i] = expert < p.router_experts ? scores[expert] : minus_infinity;
        largest = Max{}(largest, value[i]);
    }
    largest = warp_reduce(largest, Max{});
    float sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kPerLane; ++i) {
        value[i] = expf(value[i] - largest);
        sum += value[i];
    }
    sum = warp_reduce(sum, Sum{});
    float chosen_sum = 0.0f;
    uint32_t* experts = r.slot_expert + static_cast<uint64_t>(row) * r.top_k;
    float* weights = r.slot_weight + static_cast<uint64_t>(row) * r.top_k;
    for (uint32_t slot = 0; slot < r.top_k; ++slot) {
        float best = -1.0f;
        uint32_t index = kMostExperts;
#pragma unroll
        for (uint32_t i = 0; i < kPerLane; ++i)
            if (value[i] > best) {
                best = value[i];
                index = i * 32 + lane;
            }
#pragma unroll
        for (uint32_t distance = 16; distance > 0; distance /= 2) {
            const float other = __uint_as_float(ptx::shfl_bfly(kFullWarp, __float_as_uint(best), distance));
            const uint32_t other_index = ptx::shfl_bfly(kFullWarp, index, distance);
            if (other > best || (other == best && other_index < index)) {
                best = other;
                index = other_index;
            }
        }
        // Scores that are not numbers choose nothing; any expert will do, the row's logits will not be finite anyway.
        if (index >= p.router_experts) {
            index = slot % p.router_experts;
            best = __uint_as_float(0x7fffffffu);
        }
#pragma unroll
        for (uint32_t i = 0; i < kPerLane; ++i)
            if (index == i * 32 + lane) value[i] = -1.0f;
        const float weight = best / sum;
        chosen_sum += weight;
        if (lane == 0) {
            const uint32_t local = index - p.first_expert;
            experts[slot] = local;
            // Slots of this rank get their place later.
            if (local >= r.experts) r.slot_place[static_cast<uint64_t>(row) * r.top_k + slot] = kNowhere;
            weights[slot] = weight;
        }
    }
    __syncwarp();
    if (p.normalise != 0 && lane < r.top_k) weights[lane] = weights[lane] / chosen_sum;
}

// Calls f(expert, count) in lane 0 of some warp for every expert: its slots among `count` from `first`. Each warp counts whole
// experts: the slots in order, 32 at a time.
template <class F>
__device__ __forceinline__ void count_slots(const Routing& r, uint32_t first, uint32_t slots, F f) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (uint32_t expert = warp; expert < r.experts; expert += warps) {
        uint32_t count = 0;
        for (uint32_t base = 0; base < slots; base += 32) {
            const bool mine = base + lane < slots && r.slot_expert[first + base + lane] == expert;
            count += __popc(__ballot_sync(kFullWarp, mine));
        }
        if (lane == 0) f(expert, count);
    }
}

// Places of the `slots` slots from `first`; place_of(expert) is that of the expert's first among them.
template <class F>
__device__ __forceinline__ void place_slots(const Routing& r, uint32_t first, uint32_t slots, F place_of) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (uint32_t expert = warp; expert < r.experts; expert += warps) {
        uint32_t place = place_of(expert);
        for (uint32_t base = 0; base < slots; base += 32) {
            const uint32_t slot = first + base + lane;
            const bool mine = base + lane < slots && r.slot_expert[slot] == expert;
            const uint32_t ballot = __ballot_sync(kFullWarp, mine);
            if (mine) {
                const uint32_t at = place + __popc(ballot & ((1u << lane) - 1));
                r.permuted_slot[at] = slot;
                r.slot_place[slot] = at;
            }
            place += __popc(ballot);
        }
    }
}

// Exclusive sums of `counts` over experts to r.offsets, by a whole block; `sums` is kMostExperts words of shared memory.
template <class F>
__device__ __forceinline__ void offset_experts(const Routing& r, uint32_t* sums, F count_of) {
    for (uint32_t expert = threadIdx.x; expert < r.experts; expert += blockDim.x) sums[expert] = count_of(expert);
    __syncthreads();
    if (threadIdx.x < 32) {
        // A warp takes 32 experts at a time.
        uint32_t before = 0;
        for (uint32_t base = 0; base < r.experts; base += 32) {
            const uint32_t expert = base + threadIdx.x;
            const uint32_t count = expert < r.experts ? sums[expert] : 0;
            uint32_t to = count;
#pragma unroll
            for (uint32_t distance = 1; distance < 32; distance *= 2) {
                const uint32_t other = ptx::shfl_up(kFullWarp, to, distance);
                if (threadIdx.x >= distance) to += other;
            }
            if (expert < r.experts) r.offsets[expert] = before + to - count;
            before += ptx::shfl_idx(kFullWarp, to, 31);
        }
        if (threadIdx.x == 0) r.offsets[r.experts] = before;
    }
    __syncthreads();
}

}  // namespace longhaul

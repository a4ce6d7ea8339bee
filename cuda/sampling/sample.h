// What the kernels of a draw share. Mirrored by crates/cuda/src/ops/sampling.rs.
//
// sample_scores    (chunks, rows)  every logit once: finite check, log-sum-exp, bias, penalties, mask, argmax
// sample_histogram (chunks, rows)  rows that draw: masses by distance to the largest score, and the likely candidates
// sample_rows      (rows)          the argmax, or temperature -> top-k -> top-p -> min-p -> draw, exact and without a sort
//
// Where the vocabulary is cut in slices, one a rank, the first two see a slice, and the host asks (sample_slices in
// crates/backend/src/slices) what lies in windows of the order; the masses are the same, and so is the token:
//
// sample_parts     (chunks, windows)  counts and masses of the parts of a window
// sample_members   (chunks, windows)  the candidates in a window
//
// Bytes of a row of v logits: greedy reads 4 v. A draw reads 8 v, and its candidates (8 bytes each, at most 256 KiB) once
// for top-k, once for top-p and once for itself. Rules that change scores write 4 v more, in the chunks that they touch. At
// v = 152064 a row is 75 blocks, so that one row alone reads with most of the chip. The last kernel has one block a row and
// reads all scores again only where what it looks for is none of the candidates or these do not fit: flat distributions.
//
// Chunks depend on the vocabulary alone and masses are integers, so a row draws the same in any batch and in any order of
// atomics. The reference is crates/cpu/src/sampling.rs; Philox numbers come from the host (crates/backend/src/sampling.rs).
#pragma once

#include "../common/kernel.h"
#include "../common/reduce.h"

namespace longhaul {

using ptx::uint32_t;
using ptx::uint64_t;

struct SampleRow {
    float temperature;  // 0 = the largest score
    uint32_t top_k;     // 0 = all
    float top_p;
    float min_p;
    float repetition_penalty;
    float uniform;
    // Words from the start of `rows`; 0 = none.
    uint32_t lists;  // [3, chunks + 1] words: where the entries of each chunk start, for each of SampleList
    uint32_t mask;   // bit i of word i / 32: whether the id may be drawn
};

// Lists of a row, ordered by chunk. Ids of one list are distinct.
enum SampleList : uint32_t {
    kSeen = 0,    // (id, f32 to subtract after the repetition penalty)
    kBias = 1,    // (id, f32 to add)
    kBanned = 2,  // id
};

// What a chunk of a row contributes.
struct SamplePartial {
    float largest;      // of the raw logits
    float sum;          // of exp(logit - largest)
    uint32_t best_key;  // of the scores, as order_key orders them
    uint32_t best_id;   // the lowest id of that score
    uint32_t finite;
    uint32_t changed;   // the chunk's scores lie in `scores`, not in `logits`
    float best_logit;   // the raw logit of best_id
};

inline constexpr uint32_t kChunk = 2048;  // logits
inline constexpr uint32_t kBins = 2048;
inline constexpr float kBinsPerUnit = 64.0f;            // of the score: the last bin is all that is 32 below the largest
inline constexpr double kMassUnit = 1099511627776.0;    // 2^40: the mass of the largest weight

struct SampleHistogram {
    uint64_t masses[kBins];
    uint64_t total;
    uint64_t above_min_p;
    uint32_t counts[kBins];
    uint32_t candidates;  // may be more than most_candidates: then the list is of no use
    uint32_t reserved[3];
};

struct SampleCandidate {
    float score;
    uint32_t id;
};

enum SampleStatus : uint32_t { kNotFinite = 0, kDrawn = 1, kNothingAllowed = 2 };

struct SampleResult {
    uint32_t id;
    float logprob;  // of the id under the raw logits
    uint32_t status;
    uint32_t reserved;
};

struct SampleParams {
    const float* logits;  // [rows, stride], rows aligned to 16 bytes
    float* scores;        // [rows, stride]: where some row has lists or a mask, else null
    const SampleRow* rows;
    SamplePartial* partials;       // [rows, chunks]
    SampleHistogram* histograms;   // [rows]: where some row draws, else null
    SampleCandidate* candidates;   // [rows, most_candidates], likewise; most_candidates is even
    SampleResult* results;
    const float* largest;  // [rows]: the largest scores of all slices; null where this is all of the vocabulary
    uint32_t vocab;        // ids of the slice
    uint32_t stride;
    uint32_t most_candidates;
    uint32_t first_id;  // of the slice

    __device__ __forceinline__ uint32_t chunks() const { return (vocab + kChunk - 1) / kChunk; }
    __device__ __forceinline__ const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(rows); }
    // Scores of a chunk of a row, from its first.
    __device__ __forceinline__ const float* chunk(uint32_t row, uint32_t chunk) const {
        const bool changed = partials[static_cast<uint64_t>(row) * chunks() + chunk].changed != 0;
        return (changed ? scores : logits) + static_cast<uint64_t>(row) * stride + chunk * kChunk;
    }
};

// Ascending where scores descend.
__device__ __forceinline__ uint32_t order_key(float score) {
    const uint32_t bits = __float_as_uint(score);
    return ~((bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u);
}
__device__ __forceinline__ float score_of_key(uint32_t key) {
    const uint32_t bits = ~key;
    return __uint_as_float((bits & 0x80000000u) != 0 ? bits & 0x7fffffffu : ~bits);
}
// From likely to unlikely, the lower id first among equals.
__device__ __forceinline__ uint64_t order_place(uint32_t key, uint32_t id) {
    return static_cast<uint64_t>(key) << 32 | id;
}

// Weights of a row's scores. Every kernel computes the same bits.
struct SampleWeights {
    float largest, temperature;

    __device__ __forceinline__ uint32_t bin(float score) const {
        return static_cast<uint32_t>(fminf((largest - score) * kBinsPerUnit, static_cast<float>(kBins - 1)));
    }
    __device__ __forceinline__ float weight(float score) const { return expf((score - largest) / temperature); }
    __device__ __forceinline__ uint64_t mass(float weight) const {
        return static_cast<uint64_t>(static_cast<double>(weight) * kMassUnit);
    }
    // Bins whose members are candidates: weights down to e^-12 or further. A choice of speed, never of the result.
    __device__ __forceinline__ uint32_t candidate_bins() const {
        return static_cast<uint32_t>(fminf(fmaxf(12.0f * temperature, 1.0f) * kBinsPerUnit, static_cast<float>(kBins - 1)));
    }
};

__device__ __forceinline__ uint64_t warp_min(uint64_t value) {
#pragma unroll
    for (uint32_t distance = 16; distance > 0; distance /= 2) {
        const uint64_t other = __shfl_xor_sync(kFullWarp, value, static_cast<int>(distance));
        value = other < value ? other : value;
    }
    return value;
}
__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
    for (uint32_t distance = 16; distance > 0; distance /= 2)
        value += __shfl_xor_sync(kFullWarp, value, static_cast<int>(distance));
    return value;
}
__device__ __forceinline__ void atomic_add(uint64_t* address, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

// What the partials of a row say together. Called by a whole block; `scratch` is 32 floats, `best` 32 words of 8 bytes.
struct SampleSummary {
    bool finite;
    uint32_t best_key, best_id;
    float largest, sum;  // of the raw logits
};
__device__ __forceinline__ SampleSummary summarise(const SampleParams& p, uint32_t row, float* scratch, uint64_t* best) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, chunks = p.chunks();
    const SamplePartial* partials = p.partials + static_cast<uint64_t>(row) * chunks;
    float largest = __uint_as_float(0xff800000u), sum = 0.0f;
    // A chunk that is not finite comes before everything.
    uint64_t place = ~uint64_t{0};
    for (uint32_t i = threadIdx.x; i < chunks; i += blockDim.x) {
        largest = Max{}(largest, partials[i].largest);
        const uint64_t here = partials[i].finite == 0 ? 0 : order_place(partials[i].best_key, partials[i].best_id);
        place = here < place ? here : place;
    }
    place = warp_min(place);
    if (lane == 0) best[warp] = place;
    largest = block_reduce(largest, scratch, __uint_as_float(0xff800000u), Max{});
    for (uint32_t i = threadIdx.x; i < chunks; i += blockDim.x)
        sum += partials[i].sum * expf(partials[i].largest - largest);
    sum = block_reduce(sum, scratch, 0.0f, Sum{});
    place = warp_min(lane < warps ? best[lane] : ~uint64_t{0});
    __syncthreads();
    return {place != 0, static_cast<uint32_t>(place >> 32), static_cast<uint32_t>(place), largest, sum};
}

// What the weights of a row are relative to.
__device__ __forceinline__ float largest_score(const SampleParams& p, uint32_t row, const SampleSummary& summary) {
    return p.largest != nullptr ? p.largest[row] : score_of_key(summary.best_key);
}

}  // namespace longhaul

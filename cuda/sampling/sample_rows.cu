// The token of a row: the argmax, or an exact draw without a sort. One block a row.
//
// Candidates are ordered from likely to unlikely, the lower id first among equals. Every rule is a prefix of that order and
// every question is "which is the first candidate at which the running count (or mass) reaches a target": the histogram
// names its bin, and each member of the bin (usually a few dozen) counts those that come before it. A bin of more than
// kList members is narrowed first, eight bits of (score, id) at a time.
#include "sample.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 512;
constexpr uint32_t kDigits = 256;
constexpr uint32_t kList = kThreads;  // one member a thread; each looks at all

struct alignas(16) Member {
    uint64_t place, mass;
};

struct Shared {
    uint64_t* masses;        // [kBins]
    uint32_t* counts;        // [kBins]
    uint64_t* digit_masses;  // [kDigits]
    uint32_t* digit_counts;  // [kDigits]
    Member* list;            // [kList]
    uint32_t* word;          // [4]: a bin, the count before it, the length of the list
    uint64_t* wide;          // [2]: the mass before a bin
    uint64_t* found;         // [2]: id, mass up to and including it
};

struct Row {
    const SampleParams& p;
    SampleWeights weights;
    const SampleCandidate* candidates;
    uint32_t row, candidate_count, candidate_bins;

    // Calls f(score, id) for every member of `bin`, each by some thread.
    template <class F>
    __device__ __forceinline__ void each(uint32_t bin, F f) const {
        const auto check = [&](float score, uint32_t id) {
            if (weights.bin(score) == bin) f(score, id);
        };
        if (bin < candidate_bins && candidate_count <= p.most_candidates) {
            const uint4* pairs = reinterpret_cast<const uint4*>(candidates);
#pragma unroll 2
            for (uint32_t i = threadIdx.x; 2 * i < candidate_count; i += kThreads) {
                const uint4 pair = pairs[i];
                check(__uint_as_float(pair.x), pair.y);
                if (2 * i + 1 < candidate_count) check(__uint_as_float(pair.z), pair.w);
            }
            return;
        }
#pragma unroll 1
        for (uint32_t id = 4 * threadIdx.x; id < p.vocab; id += 4 * kThreads) {
            const float4 v = *reinterpret_cast<const float4*>(p.chunk(row, id / kChunk) + id % kChunk);
            check(v.x, id);
            if (id + 1 < p.vocab) check(v.y, id + 1);
            if (id + 2 < p.vocab) check(v.z, id + 2);
            if (id + 3 < p.vocab) check(v.w, id + 3);
        }
    }
};

// The first bin at which the running count or mass reaches `target`: its index to word[0], what is before it to word[1]
// and wide[0]. `count`/`mass` is what is before bin 0. If nothing reaches it, the last bin that holds anything.
template <uint32_t Bins>
__device__ __forceinline__ void find_bin(const Shared& s, const uint32_t* counts, const uint64_t* masses, bool by_mass,
                                         uint64_t target, uint32_t count, uint64_t mass) {
    constexpr uint32_t per_lane = Bins / 32;
    if (threadIdx.x < 32) {
        const uint32_t lane = threadIdx.x;
        uint32_t lane_count = 0;
        uint64_t lane_mass = 0;
#pragma unroll 8
        for (uint32_t i = 0; i < per_lane; ++i) {
            lane_count += counts[lane * per_lane + i];
            lane_mass += masses[lane * per_lane + i];
        }
        uint32_t count_to = lane_count;
        uint64_t mass_to = lane_mass;
        for (uint32_t distance = 1; distance < 32; distance *= 2) {
            const uint32_t other_count = __shfl_up_sync(kFullWarp, count_to, distance);
            const uint64_t other_mass = __shfl_up_sync(kFullWarp, mass_to, distance);
            if (lane >= distance) {
                count_to += other_count;
                mass_to += other_mass;
            }
        }
        const bool reaches = by_mass ? mass + mass_to >= target : count + count_to >= target;
        const uint32_t reaching = __ballot_sync(kFullWarp, reaches && lane_count != 0);
        const uint32_t filled = __ballot_sync(kFullWarp, lane_count != 0);
        const uint32_t chosen = reaching != 0 ? __ffs(reaching) - 1 : 31 - __clz(filled);
        if (lane == chosen) {
            uint32_t before_count = count + count_to - lane_count, index = 0;
            uint64_t before_mass = mass + mass_to - lane_mass;
#pragma unroll 1
            for (uint32_t i = 0; i < per_lane; ++i) {
                const uint32_t at = lane * per_lane + i;
                if (counts[at] == 0) continue;
                index = at;
                const bool here = by_mass ? before_mass + masses[at] >= target : before_count + counts[at] >= target;
                if (here || count + count_to - before_count == counts[at]) break;
                before_count += counts[at];
                before_mass += masses[at];
            }
            s.word[0] = index;
            s.word[1] = before_count;
            s.wide[0] = before_mass;
        }
    }
    __syncthreads();
}

// The first candidate at which the running count or mass reaches `target` (at least 1): its id and the mass up to and
// including it, in `found`.
__device__ __forceinline__ void search(const Row& row, const Shared& s, bool by_mass, uint64_t target) {
    find_bin<kBins>(s, s.counts, s.masses, by_mass, target, 0, 0);
    const uint32_t bin = s.word[0];
    uint32_t count = s.word[1], members = s.counts[bin], digits = 0;
    uint64_t mass = s.wide[0], prefix = 0;
    __syncthreads();
    const auto is_left = [&](uint64_t place) { return digits == 0 || place >> (64 - 8 * digits) == prefix; };
    while (members > kList) {
        for (uint32_t i = threadIdx.x; i < kDigits; i += kThreads) {
            s.digit_counts[i] = 0;
            s.digit_masses[i] = 0;
        }
        __syncthreads();
        const uint32_t shift = 56 - 8 * digits;
        row.each(bin, [&](float score, uint32_t id) {
            const uint64_t place = order_place(order_key(score), id);
            if (!is_left(place)) return;
            const uint32_t digit = static_cast<uint32_t>(place >> shift) & (kDigits - 1);
            atomicAdd(s.digit_counts + digit, 1u);
            atomic_add(s.digit_masses + digit, row.weights.mass(row.weights.weight(score)));
        });
        __syncthreads();
        find_bin<kDigits>(s, s.digit_counts, s.digit_masses, by_mass, target, count, mass);
        members = s.digit_counts[s.word[0]];
        prefix = prefix << 8 | s.word[0];
        ++digits;
        count = s.word[1];
        mass = s.wide[0];
        __syncthreads();
    }
    if (threadIdx.x == 0) s.word[2] = 0;
    __syncthreads();
    row.each(bin, [&](float score, uint32_t id) {
        const uint64_t place = order_place(order_key(score), id);
        if (is_left(place)) s.list[atomicAdd(s.word + 2, 1u)] = {place, row.weights.mass(row.weights.weight(score))};
    });
    __syncthreads();
    if (threadIdx.x < members) {
        const Member mine = s.list[threadIdx.x];
        uint32_t rank = 0;
#pragma unroll 4
        for (uint32_t i = 0; i < members; ++i) {
            const Member other = s.list[i];
            const bool before = other.place < mine.place;
            rank += before ? 1 : 0;
            mass += before ? other.mass : 0;
        }
        const uint64_t reached_before = by_mass ? mass : count + rank;
        const uint64_t reached = by_mass ? mass + mine.mass : count + rank + 1;
        const bool last = rank + 1 == members;
        if ((reached_before < target && reached >= target) || (last && reached < target)) {
            s.found[0] = mine.place & 0xffffffffu;
            s.found[1] = mass + mine.mass;
        }
    }
    __syncthreads();
}

// The token that the row's parameters draw.
__device__ __forceinline__ uint32_t draw(const Row& row, const SampleRow& parameters, const Shared& s) {
    const SampleHistogram& histogram = row.p.histograms[row.row];
    for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) {
        s.counts[i] = histogram.counts[i];
        s.masses[i] = histogram.masses[i];
    }
    __syncthreads();
    // top-k, top-p, the draw: one search each.
    uint64_t kept = histogram.total;
#pragma unroll 1
    for (uint32_t stage = 0; stage < 3; ++stage) {
        uint64_t target = parameters.top_k;
        if (stage == 0 && (parameters.top_k == 0 || parameters.top_k >= row.p.vocab)) continue;
        if (stage == 1) {
            if (!(parameters.top_p < 1.0f)) continue;
            target = static_cast<uint64_t>(ceil(static_cast<double>(parameters.top_p) * static_cast<double>(kept)));
            if (target == 0) target = 1;
        }
        if (stage == 2) {
            if (parameters.min_p > 0.0f && histogram.above_min_p < kept) kept = histogram.above_min_p;
            target = static_cast<uint64_t>(static_cast<double>(parameters.uniform) * static_cast<double>(kept)) + 1;
            if (target > kept) target = kept;
        }
        search(row, s, stage != 0, target);
        if (stage == 0 || s.found[1] < kept) kept = s.found[1];
    }
    return static_cast<uint32_t>(s.found[0]);
}

__device__ __forceinline__ void sample(const SampleParams& p) {
    PTX_SHARED_ARRAY(uint64_t, masses, kBins);
    PTX_SHARED_ARRAY(uint32_t, counts, kBins);
    PTX_SHARED_ARRAY(uint64_t, digit_masses, kDigits);
    PTX_SHARED_ARRAY(uint32_t, digit_counts, kDigits);
    PTX_SHARED_ARRAY(Member, list, kList);
    PTX_SHARED_ARRAY(uint32_t, word, 4);
    PTX_SHARED_ARRAY(uint64_t, wide, 2);
    PTX_SHARED_ARRAY(uint64_t, found, 2);
    PTX_SHARED_ARRAY(uint64_t, best, 32);
    PTX_SHARED_ARRAY(float, scratch, 32);
    const Shared s{masses, counts, digit_masses, digit_counts, list, word, wide, found};
    const uint32_t index = blockIdx.x;
    const SampleRow parameters = p.rows[index];
    const SampleSummary summary = summarise(p, index, scratch, best);
    const float largest = score_of_key(summary.best_key);
    uint32_t status = kDrawn, id = summary.best_id;
    if (!summary.finite) {
        status = kNotFinite;
    } else if (largest == __uint_as_float(0xff800000u)) {
        status = kNothingAllowed;
    } else if (parameters.temperature > 0.0f) {
        const SampleWeights weights{largest, parameters.temperature};
        const Row row{p,
                      weights,
                      p.candidates + static_cast<uint64_t>(index) * p.most_candidates,
                      index,
                      p.histograms[index].candidates,
                      weights.candidate_bins()};
        id = draw(row, parameters, s);
    }
    if (threadIdx.x != 0) return;
    if (status == kDrawn) {
        const float logit = p.logits[static_cast<uint64_t>(index) * p.stride + id];
        p.results[index] = {id, logit - summary.largest - logf(summary.sum), status, 0};
    } else {
        p.results[index] = {0, 0.0f, status, 0};
    }
}

}  // namespace

LONGHAUL_KERNEL(sample_rows, SampleParams, kThreads, sample)

}  // namespace longhaul

// Draws one token a row: penalties, temperature, top-k, top-p, min-p, one uniform number; exact and without a sort.
//
// Candidates are ordered from likely to unlikely, the lower id first among equals. Every rule is a prefix of that order and
// every question is "which is the first candidate at which the running count (or mass) reaches a target". A histogram over
// the distance to the largest score finds the bin, the bin's candidates (usually a few hundred) are gathered, and eight
// bits at a time of (score, id) find the one. Masses are integers, in units of 2^-40 of the largest weight, so that the
// order of additions does not matter. The reference is crates/cpu/src/sampling.rs; Philox numbers come from the host
// (crates/backend/src/sampling.rs).
#include "../common/kernel.h"
#include "../common/reduce.h"

namespace longhaul {
namespace {

using ptx::uint32_t;
using ptx::uint64_t;

struct SampleRow {
    float temperature;  // 0 = the largest score
    uint32_t top_k;     // 0 = all
    float top_p;
    float min_p;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    float uniform;
    // Words from the start of `rows`.
    uint32_t seen;          // (id, occurrences in the output) pairs
    uint32_t seen_count;
    uint32_t banned;        // ids
    uint32_t banned_count;
};

struct SampleResult {
    uint32_t id;
    float logprob;  // of the id under the raw logits
    uint32_t finite;
    uint32_t reserved;
};

struct SampleParams {
    const float* logits;  // [rows, stride]
    float* scores;        // [rows, stride]: scratch, used by rows with penalties or banned ids
    const SampleRow* rows;
    SampleResult* results;
    uint32_t vocab;
    uint32_t stride;
};

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kBins = 2048;
constexpr uint32_t kDigits = 256;
constexpr uint32_t kList = 1536;
constexpr float kBinsPerUnit = 64.0f;     // of the score: 2048 bins reach 32 below the largest
constexpr double kMassUnit = 1099511627776.0;  // 2^40

// A place in the order: the candidate, and count and mass up to and including it.
struct Found {
    uint32_t key, id, count;
    uint64_t mass;
};

struct Shared {
    uint32_t* counts;        // [kBins]
    uint64_t* masses;        // [kBins]
    uint32_t* digit_counts;  // [kDigits]
    uint64_t* digit_masses;  // [kDigits]
    uint32_t* list;          // [kList] ids
    uint32_t* word;          // [4]: a bin, a count, the length of the list
    uint64_t* wide;          // [1]: a mass
    float* scratch;          // [32]
};

// Ascending where scores descend.
__device__ __forceinline__ uint32_t order_key(float score) {
    const uint32_t bits = __float_as_uint(score);
    return ~((bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u);
}

struct Row {
    const float* scores;
    uint32_t vocab;
    float largest, temperature;

    __device__ __forceinline__ uint32_t bin(float score) const {
        return static_cast<uint32_t>(fminf((largest - score) * kBinsPerUnit, static_cast<float>(kBins - 1)));
    }
    __device__ __forceinline__ float weight(float score) const { return expf((score - largest) / temperature); }
    __device__ __forceinline__ uint64_t mass(float score) const {
        return static_cast<uint64_t>(static_cast<double>(weight(score)) * kMassUnit);
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

// The first candidate at which the running count or mass reaches `target` (at least 1).
__device__ __forceinline__ Found search(const Row& row, const Shared& s, bool by_mass, uint64_t target) {
    find_bin<kBins>(s, s.counts, s.masses, by_mass, target, 0, 0);
    const uint32_t bin = s.word[0];
    uint32_t count = s.word[1];
    uint64_t mass = s.wide[0];
    const bool listed = s.counts[bin] <= kList;
    __syncthreads();
    if (threadIdx.x == 0) s.word[2] = 0;
    __syncthreads();
    if (listed) {
        for (uint32_t i = threadIdx.x; i < row.vocab; i += kThreads)
            if (row.bin(row.scores[i]) == bin) s.list[atomicAdd(s.word + 2, 1u)] = i;
        __syncthreads();
    }
    const uint32_t candidates = listed ? s.word[2] : row.vocab;
    uint64_t prefix = 0;
    for (uint32_t digit = 0; digit < 8; ++digit) {
        const uint32_t shift = 56 - 8 * digit;
        for (uint32_t i = threadIdx.x; i < kDigits; i += kThreads) {
            s.digit_counts[i] = 0;
            s.digit_masses[i] = 0;
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < candidates; i += kThreads) {
            const uint32_t id = listed ? s.list[i] : i;
            const float score = row.scores[id];
            if (!listed && row.bin(score) != bin) continue;
            const uint64_t place = static_cast<uint64_t>(order_key(score)) << 32 | id;
            if (digit != 0 && place >> (shift + 8) != prefix) continue;
            const uint32_t at = static_cast<uint32_t>(place >> shift) & 255u;
            atomicAdd(s.digit_counts + at, 1u);
            atomicAdd(reinterpret_cast<unsigned long long*>(s.digit_masses) + at,
                      static_cast<unsigned long long>(row.mass(score)));
        }
        __syncthreads();
        find_bin<kDigits>(s, s.digit_counts, s.digit_masses, by_mass, target, count, mass);
        prefix = prefix << 8 | s.word[0];
        count = s.word[1];
        mass = s.wide[0];
        __syncthreads();
    }
    const uint32_t id = static_cast<uint32_t>(prefix);
    return {static_cast<uint32_t>(prefix >> 32), id, count + 1, mass + row.mass(row.scores[id])};
}

// The token that the row's parameters draw.
__device__ __forceinline__ uint32_t draw(const Row& row, const SampleRow& parameters, const Shared& s) {
    for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) {
        s.counts[i] = 0;
        s.masses[i] = 0;
    }
    if (threadIdx.x == 0) s.wide[0] = s.wide[1] = 0;
    __syncthreads();
    uint64_t total = 0, likely = 0;
    for (uint32_t i = threadIdx.x; i < row.vocab; i += kThreads) {
        const float score = row.scores[i];
        const uint64_t mass = row.mass(score);
        const uint32_t bin = row.bin(score);
        atomicAdd(s.counts + bin, 1u);
        atomicAdd(reinterpret_cast<unsigned long long*>(s.masses) + bin, static_cast<unsigned long long>(mass));
        total += mass;
        if (row.weight(score) >= parameters.min_p) likely += mass;
    }
    atomicAdd(reinterpret_cast<unsigned long long*>(s.wide), static_cast<unsigned long long>(total));
    atomicAdd(reinterpret_cast<unsigned long long*>(s.wide) + 1, static_cast<unsigned long long>(likely));
    __syncthreads();
    uint64_t kept = s.wide[0];
    const uint64_t above_min_p = s.wide[1];
    __syncthreads();
    if (parameters.top_k != 0 && parameters.top_k < row.vocab) kept = search(row, s, false, parameters.top_k).mass;
    if (parameters.top_p < 1.0f) {
        const uint64_t wanted =
            static_cast<uint64_t>(ceil(static_cast<double>(parameters.top_p) * static_cast<double>(kept)));
        const uint64_t reached = search(row, s, true, wanted == 0 ? 1 : wanted).mass;
        kept = reached < kept ? reached : kept;
    }
    if (parameters.min_p > 0.0f && above_min_p < kept) kept = above_min_p;
    const uint64_t left =
        static_cast<uint64_t>(static_cast<double>(parameters.uniform) * static_cast<double>(kept)) + 1;
    return search(row, s, true, left < kept ? left : kept).id;
}

// Largest value and its lowest index over the block.
__device__ __forceinline__ void block_argmax(float& value, uint32_t& index, const Shared& s) {
    const float largest = block_reduce(value, s.scratch, __uint_as_float(0xff800000u), Max{});
    if (threadIdx.x == 0) s.word[3] = 0xffffffffu;
    __syncthreads();
    if (value == largest) atomicMin(s.word + 3, index);
    __syncthreads();
    value = largest;
    index = s.word[3];
    __syncthreads();
}

__device__ __forceinline__ void sample(const SampleParams& p) {
    PTX_SHARED_ARRAY(uint32_t, counts, kBins);
    PTX_SHARED_ARRAY(uint64_t, masses, kBins);
    PTX_SHARED_ARRAY(uint32_t, digit_counts, kDigits);
    PTX_SHARED_ARRAY(uint64_t, digit_masses, kDigits);
    PTX_SHARED_ARRAY(uint32_t, list, kList);
    PTX_SHARED_ARRAY(uint32_t, word, 4);
    PTX_SHARED_ARRAY(uint64_t, wide, 2);
    PTX_SHARED_ARRAY(float, scratch, 32);
    const Shared s{counts, masses, digit_counts, digit_masses, list, word, wide, scratch};
    const SampleRow parameters = p.rows[blockIdx.x];
    const uint32_t* words = reinterpret_cast<const uint32_t*>(p.rows);
    const float* logits = p.logits + static_cast<uint64_t>(blockIdx.x) * p.stride;
    float* changed = p.scores + static_cast<uint64_t>(blockIdx.x) * p.stride;
    const bool changes = parameters.seen_count != 0 || parameters.banned_count != 0;
    const float minus_infinity = __uint_as_float(0xff800000u);

    // Raw logits: are all finite, and how large is the largest?
    float raw_largest = minus_infinity, infinite = 0.0f;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += kThreads) {
        const float value = logits[i];
        if (changes) changed[i] = value;
        raw_largest = Max{}(raw_largest, value);
        if (!(fabsf(value) <= 3.402823466e38f)) infinite = 1.0f;
    }
    raw_largest = block_reduce(raw_largest, s.scratch, minus_infinity, Max{});
    infinite = block_reduce(infinite, s.scratch, 0.0f, Max{});
    if (infinite != 0.0f) {
        if (threadIdx.x == 0) p.results[blockIdx.x] = {0, 0.0f, 0, 0};
        return;
    }
    float raw_sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += kThreads) raw_sum += expf(logits[i] - raw_largest);
    raw_sum = block_reduce(raw_sum, s.scratch, 0.0f, Sum{});

    if (changes) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < parameters.seen_count; i += kThreads) {
            const uint32_t id = words[parameters.seen + 2 * i], generated = words[parameters.seen + 2 * i + 1];
            if (id >= p.vocab) continue;
            float score = changed[id];
            score = score > 0.0f ? score / parameters.repetition_penalty : score * parameters.repetition_penalty;
            if (generated > 0)
                score -= parameters.presence_penalty + parameters.frequency_penalty * static_cast<float>(generated);
            changed[id] = score;
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < parameters.banned_count; i += kThreads) {
            const uint32_t id = words[parameters.banned + i];
            if (id < p.vocab) changed[id] = minus_infinity;
        }
        __syncthreads();
    }
    const float* scores = changes ? changed : logits;
    float largest = minus_infinity;
    uint32_t id = 0xffffffffu;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += kThreads)
        if (scores[i] > largest || id == 0xffffffffu) {
            largest = scores[i];
            id = i;
        }
    block_argmax(largest, id, s);
    if (parameters.temperature > 0.0f && largest > minus_infinity)
        id = draw(Row{scores, p.vocab, largest, parameters.temperature}, parameters, s);
    if (threadIdx.x == 0) p.results[blockIdx.x] = {id, logits[id] - raw_largest - logf(raw_sum), 1, 0};
}

}  // namespace

LONGHAUL_KERNEL(sample_rows, SampleParams, kThreads, sample)

}  // namespace longhaul

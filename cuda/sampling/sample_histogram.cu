// One chunk of a row that draws: counts and masses by distance to the largest score, and the list of likely candidates.
// One block a (chunk, row). Masses are integers and the list is a set, so the order in which blocks come does not matter.
#include "sample.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 256;

__device__ __forceinline__ void histogram(const SampleParams& p) {
    PTX_SHARED_ARRAY(uint64_t, masses, kBins);
    PTX_SHARED_ARRAY(uint32_t, counts, kBins);
    PTX_SHARED_ARRAY(uint64_t, best, 32);
    PTX_SHARED_ARRAY(float, scratch, 32);
    PTX_SHARED_ARRAY(uint32_t, candidates, 2);  // of this chunk, and where they go
    const uint32_t chunk = blockIdx.x, row = blockIdx.y, lane = threadIdx.x % 32;
    const SampleRow parameters = p.rows[row];
    if (!(parameters.temperature > 0.0f)) return;
    for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) {
        masses[i] = 0;
        counts[i] = 0;
    }
    if (threadIdx.x == 0) candidates[0] = 0;
    const SampleSummary summary = summarise(p, row, scratch, best);
    const SampleWeights weights{largest_score(p, row, summary), parameters.temperature};
    if (!summary.finite || weights.largest == __uint_as_float(0xff800000u)) return;

    const float* scores = p.chunk(row, chunk);
    const uint32_t first = chunk * kChunk, count = p.vocab - first < kChunk ? p.vocab - first : kChunk;
    const uint32_t candidate_bins = weights.candidate_bins();
    uint64_t total = 0, above_min_p = 0;
    uint32_t mine = 0;
    for (uint32_t at = 4 * threadIdx.x; at < count; at += 4 * kThreads) {
        const float4 loaded = *reinterpret_cast<const float4*>(scores + at);
        const float value[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            if (at + i >= count) continue;
            const float weight = weights.weight(value[i]);
            const uint64_t mass = weights.mass(weight);
            const uint32_t bin = weights.bin(value[i]);
            atomicAdd(counts + bin, 1u);
            if (mass != 0) atomic_add(masses + bin, mass);
            total += mass;
            if (weight >= parameters.min_p) above_min_p += mass;
            if (bin < candidate_bins) ++mine;
        }
    }
    // Places of this thread's candidates among the chunk's.
    uint32_t place = mine == 0 ? 0 : atomicAdd(candidates, mine);
    total = warp_sum(total);
    above_min_p = warp_sum(above_min_p);
    SampleHistogram& out = p.histograms[row];
    if (lane == 0) {
        atomic_add(&out.total, total);
        atomic_add(&out.above_min_p, above_min_p);
    }
    __syncthreads();
    if (threadIdx.x == 0) candidates[1] = candidates[0] == 0 ? 0 : atomicAdd(&out.candidates, candidates[0]);
    for (uint32_t i = threadIdx.x; i < kBins; i += kThreads)
        if (counts[i] != 0) {
            atomicAdd(out.counts + i, counts[i]);
            if (masses[i] != 0) atomic_add(out.masses + i, masses[i]);
        }
    __syncthreads();
    place += candidates[1];
    if (mine == 0) return;
    SampleCandidate* list = p.candidates + static_cast<uint64_t>(row) * p.most_candidates;
    for (uint32_t at = 4 * threadIdx.x; at < count; at += 4 * kThreads)
        for (uint32_t i = at; i < at + 4 && i < count; ++i)
            if (weights.bin(scores[i]) < candidate_bins) {
                if (place < p.most_candidates) list[place] = {scores[i], first + i};
                ++place;
            }
}

}  // namespace

LONGHAUL_KERNEL(sample_histogram, SampleParams, kThreads, histogram)

}  // namespace longhaul

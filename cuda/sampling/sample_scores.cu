// One chunk of a row of logits: is all of it finite, its share of the log-sum-exp, its scores after the rules of the row,
// and their largest. One block a (chunk, row); the one pass over the logits that greedy rows need.
#include "sample.h"

namespace longhaul {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kVectors = kChunk / (4 * kThreads);  // 16-byte vectors of a thread

// Applies the row's lists and mask to the chunk's scores in shared memory. The CPU's order of steps, each rounded alone: the
// barriers between a product and a sum also keep them from being fused.
__device__ __forceinline__ void apply_rules(const SampleParams& p, const SampleRow& row, uint32_t chunk, uint32_t count,
                                            float* scores) {
    const uint32_t* words = p.words();
    const float limit = 3.402823466e38f, minus_infinity = __uint_as_float(0xff800000u);
    const uint32_t first = chunk * kChunk, starts = p.chunks() + 1;
    if (row.lists != 0) {
        const uint32_t* seen = words + row.lists + kSeen * starts + chunk;
        const uint32_t* bias = words + row.lists + kBias * starts + chunk;
        const uint32_t* banned = words + row.lists + kBanned * starts + chunk;
        const uint32_t seen_count = (seen[1] - seen[0]) / 2, bias_count = (bias[1] - bias[0]) / 2;
        for (uint32_t i = threadIdx.x; i < seen_count; i += kThreads) {
            float& score = scores[words[seen[0] + 2 * i] - first];
            score = score > 0.0f ? score / row.repetition_penalty : score * row.repetition_penalty;
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < seen_count; i += kThreads)
            scores[words[seen[0] + 2 * i] - first] -= __uint_as_float(words[seen[0] + 2 * i + 1]);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < bias_count; i += kThreads)
            scores[words[bias[0] + 2 * i] - first] += __uint_as_float(words[bias[0] + 2 * i + 1]);
        __syncthreads();
        // A score is never infinite unless its id may not be drawn.
        for (uint32_t i = threadIdx.x; i < count; i += kThreads) scores[i] = fminf(fmaxf(scores[i], -limit), limit);
        __syncthreads();
        for (uint32_t i = banned[0] + threadIdx.x; i < banned[1]; i += kThreads) scores[words[i] - first] = minus_infinity;
        __syncthreads();
    }
    if (row.mask != 0) {
        const uint32_t* mask = words + row.mask + first / 32;
        for (uint32_t i = threadIdx.x; i < count; i += kThreads)
            if ((mask[i / 32] >> (i % 32) & 1u) == 0) scores[i] = minus_infinity;
        __syncthreads();
    }
}

__device__ __forceinline__ void scores(const SampleParams& p) {
    PTX_SHARED_ARRAY(float, shared, kChunk);
    PTX_SHARED_ARRAY(float, scratch, 32);
    PTX_SHARED_ARRAY(uint64_t, warp_best, kThreads / 32);
    PTX_SHARED_ARRAY(uint32_t, warp_infinite, kThreads / 32);
    const uint32_t chunk = blockIdx.x, row = blockIdx.y, chunks = p.chunks();
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t first = chunk * kChunk, count = p.vocab - first < kChunk ? p.vocab - first : kChunk;
    const SampleRow parameters = p.rows[row];
    const uint64_t start = static_cast<uint64_t>(row) * p.stride + first;
    const float minus_infinity = __uint_as_float(0xff800000u);

    if (parameters.temperature > 0.0f) {
        SampleHistogram& histogram = p.histograms[row];
        for (uint32_t i = chunk * kThreads + threadIdx.x; i < kBins; i += chunks * kThreads) {
            histogram.masses[i] = 0;
            histogram.counts[i] = 0;
        }
        if (chunk == 0 && threadIdx.x == 0) {
            histogram.total = histogram.above_min_p = 0;
            histogram.candidates = 0;
        }
    }

    // Rows are padded to whole vectors; what lies beyond the vocabulary is undefined.
    float value[kVectors][4];
    float largest = minus_infinity;
    bool finite = true;
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
        const uint32_t at = 4 * (v * kThreads + threadIdx.x);
        float4 loaded = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (at < count) loaded = *reinterpret_cast<const float4*>(p.logits + start + at);
        value[v][0] = loaded.x, value[v][1] = loaded.y, value[v][2] = loaded.z, value[v][3] = loaded.w;
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            if (at + i >= count) value[v][i] = minus_infinity;
            else if (!(fabsf(value[v][i]) <= 3.402823466e38f)) finite = false;
            largest = Max{}(largest, value[v][i]);
        }
    }
    const bool all_finite = __any_sync(kFullWarp, !finite) == 0;
    if (lane == 0) warp_infinite[warp] = all_finite ? 0 : 1;
    largest = block_reduce(largest, scratch, minus_infinity, Max{});
    float sum = 0.0f;
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v)
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) sum += expf(value[v][i] - largest);
    sum = block_reduce(sum, scratch, 0.0f, Sum{});

    bool changed = parameters.mask != 0;
    if (parameters.lists != 0)
        for (uint32_t list = 0; list < 3; ++list) {
            const uint32_t* starts = p.words() + parameters.lists + list * (chunks + 1) + chunk;
            changed |= starts[0] != starts[1];
        }
    if (changed) {
#pragma unroll
        for (uint32_t v = 0; v < kVectors; ++v)
            *reinterpret_cast<float4*>(shared + 4 * (v * kThreads + threadIdx.x)) =
                make_float4(value[v][0], value[v][1], value[v][2], value[v][3]);
        __syncthreads();
        apply_rules(p, parameters, chunk, count, shared);
    }
    uint64_t best = ~uint64_t{0};
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
        const uint32_t at = 4 * (v * kThreads + threadIdx.x);
        if (changed) {
            const float4 loaded = *reinterpret_cast<const float4*>(shared + at);
            if (at < count) *reinterpret_cast<float4*>(p.scores + start + at) = loaded;
            value[v][0] = loaded.x, value[v][1] = loaded.y, value[v][2] = loaded.z, value[v][3] = loaded.w;
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            // + 0: zeros of both signs are equal for the argmax.
            const uint64_t place = order_place(order_key(value[v][i] + 0.0f), first + at + i);
            if (at + i < count && place < best) best = place;
        }
    }
    best = warp_min(best);
    if (lane == 0) warp_best[warp] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t infinite = 0;
        for (uint32_t i = 0; i < kThreads / 32; ++i) {
            infinite |= warp_infinite[i];
            best = warp_best[i] < best ? warp_best[i] : best;
        }
        p.partials[static_cast<uint64_t>(row) * chunks + chunk] = {largest,
                                                                   sum,
                                                                   static_cast<uint32_t>(best >> 32),
                                                                   static_cast<uint32_t>(best),
                                                                   infinite == 0 ? 1u : 0u,
                                                                   changed ? 1u : 0u,
                                                                   p.logits[start - first + static_cast<uint32_t>(best)]};
    }
}

}  // namespace

LONGHAUL_KERNEL(sample_scores, SampleParams, kThreads, scores)

}  // namespace longhaul

// One warpgroup: D[64, N] = A[64, K] * B[N, K]ᵀ with rows of 128 bytes (K = 64 of 16 bits, 128 of 8), for every layout of
// the operands in shared memory.
#pragma once

#include "../ptx/proxy_fence.h"
#include "../ptx/wgmma.h"
#include "conformance.h"

namespace conformance {

// Bits 0-1 of the mode are the descriptor's swizzle; then A row-major, B row-major, A from registers.
inline constexpr uint32_t kAMnMajor = 4, kBMnMajor = 8, kARegisters = 16;
inline constexpr uint32_t kRowBytes = 128, kDepth16 = 64;  // depth in 16-bit units

// Where an operand of `rows` rows lies: offsets of its 16-bit units, and its descriptors.
struct Operand {
    uint32_t base, rows, span;  // span of the swizzle in bytes, 16 without
    ptx::Swizzle swizzle;
    bool mn_major;

    __device__ uint32_t offset(uint32_t row, uint32_t k) const {
        uint32_t at;
        if (mn_major) {
            const uint32_t per_line = span / 2;
            at = row / per_line * (kDepth16 * span) + k * span + row % per_line * 2;
        } else {
            const uint32_t per_line = span / 2;
            at = k / per_line * (rows * span) + row * span + k % per_line * 2;
        }
        // 16-byte chunks trade places by the number of the 128-byte line.
        return at ^ ((at / 128 * 16) & (span - 16));
    }
    // Of step `j` of 32 bytes of depth.
    __device__ uint64_t descriptor(uint32_t j) const {
        const bool plain = swizzle == ptx::Swizzle::None;
        if (mn_major)
            return plain ? ptx::wgmma_descriptor(base + j * 16 * span, 8 * span, kDepth16 * span, swizzle)
                         : ptx::wgmma_descriptor(base + j * 16 * span, kDepth16 * span, 8 * span, swizzle);
        const uint32_t start = base + j * 32 / span * (rows * span) + j * 32 % span;
        return ptx::wgmma_descriptor(start, plain ? rows * span : 16, 8 * span, swizzle);
    }
};

#if CONFORMANCE_SM_90

struct Bf16 {
    template <int N, ptx::Major A, ptx::Major B>
    __device__ static void run(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) { ptx::wgmma_bf16<N, A, B>(d, a, b, add); }
    template <int N, ptx::Major B>
    __device__ static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) { ptx::wgmma_bf16<N, B>(d, a, b, add); }
};
struct F16 {
    template <int N, ptx::Major A, ptx::Major B>
    __device__ static void run(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) { ptx::wgmma_f16<N, A, B>(d, a, b, add); }
    template <int N, ptx::Major B>
    __device__ static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) { ptx::wgmma_f16<N, B>(d, a, b, add); }
};
// Depth-major only.
struct E4m3 {
    template <int N, ptx::Major A, ptx::Major B>
    __device__ static void run(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) { ptx::wgmma_e4m3<N>(d, a, b, add); }
    template <int N, ptx::Major B>
    __device__ static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) { ptx::wgmma_e4m3<N>(d, a, b, add); }
};

template <class Element, int N, ptx::Major A, ptx::Major B>
__device__ inline void wgmma_shared(const Operand& a, const Operand& b, float (&d)[N / 2]) {
    ptx::wgmma_hold(d);
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) Element::template run<N, A, B>(d, a.descriptor(j), b.descriptor(j), j > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_hold(d);
}

template <class Element, int N, ptx::Major B>
__device__ inline void wgmma_registers(const uint32_t* rows, const Operand& b, float (&d)[N / 2]) {
    const uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    uint32_t a[4][4];
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j)
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) a[j][i] = rows[(row + i % 2 * 8) * (kRowBytes / 4) + j * 8 + i / 2 * 4 + lane % 4];
    ptx::wgmma_hold(d);
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) Element::template run<N, B>(d, a[j], b.descriptor(j), j > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_hold(d);
}

#endif

// a: 64 rows, b: N rows; out: f32 [64, N].
template <class Element, int N>
__device__ inline void wgmma(const Params& p) {
#if CONFORMANCE_SM_90
    auto* shared = ptx::dynamic_shared<unsigned char>();
    const uint32_t spans[4] = {16, 128, 64, 32};
    const auto swizzle = static_cast<ptx::Swizzle>(p.mode & 3);
    const uint32_t base = ptx::shared_address(shared), span = spans[p.mode & 3];
    const Operand a{base, 64, span, swizzle, (p.mode & kAMnMajor) != 0};
    const Operand b{base + 64 * kRowBytes, N, span, swizzle, (p.mode & kBMnMajor) != 0};
    const auto place = [&](const void* from, const Operand& operand) {
        for (uint32_t i = threadIdx.x; i < operand.rows * kDepth16; i += 128)
            *reinterpret_cast<uint16_t*>(shared + (operand.base - base) + operand.offset(i / kDepth16, i % kDepth16)) =
                static_cast<const uint16_t*>(from)[i];
    };
    place(p.a, a);
    place(p.b, b);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    constexpr auto K = ptx::Major::K, MN = ptx::Major::MN;
    float d[N / 2];
#pragma unroll
    for (uint32_t i = 0; i < N / 2; ++i) d[i] = 0.0f;
    if (p.mode & kARegisters) {
        if (b.mn_major) wgmma_registers<Element, N, MN>(static_cast<const uint32_t*>(p.a), b, d);
        else wgmma_registers<Element, N, K>(static_cast<const uint32_t*>(p.a), b, d);
    } else if (a.mn_major) {
        if (b.mn_major) wgmma_shared<Element, N, MN, MN>(a, b, d);
        else wgmma_shared<Element, N, MN, K>(a, b, d);
    } else {
        if (b.mn_major) wgmma_shared<Element, N, K, MN>(a, b, d);
        else wgmma_shared<Element, N, K, K>(a, b, d);
    }
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t i = 0; i < N / 2; ++i) {
        const uint32_t row = threadIdx.x / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        static_cast<float*>(p.out)[row * N + column] = d[i];
    }
#endif
}

}  // namespace conformance

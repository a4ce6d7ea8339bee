// mma.sync: D = A B + D on the tensor cores, A row-major (16 x K), B column-major (K x 8), D in f32.
//
// With g = lane / 4 and t = lane % 4, and E elements in a 32-bit register (2 of 16 bits, 4 of 8 bits):
//   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8, columns E t + e, + K / 2 for a[2] and a[3]
//   b[0], b[1]:             column g, rows E t + e, + K / 2 for b[1]
//   d[0], d[1], d[2], d[3]: rows g, g, g + 8, g + 8, columns 2 t, 2 t + 1, 2 t, 2 t + 1
// PTX ISA, "Matrix Fragments for mma.m16n8k16 / mma.m16n8k32" (sm_80; e4m3: sm_89).
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
__device__ __forceinline__ void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#else

namespace twin {

struct MmaOperands {
    const uint32_t *a, *b;
};

struct Bf16 {
    static constexpr int kPerRegister = 2;
    static float decode(uint32_t bits) { return ::emulator::bf16_to_float(static_cast<uint16_t>(bits)); }
};
struct F16 {
    static constexpr int kPerRegister = 2;
    static float decode(uint32_t bits) { return ::emulator::half_to_float(static_cast<uint16_t>(bits)); }
};
struct E4m3 {
    static constexpr int kPerRegister = 4;
    static float decode(uint32_t bits) { return ::emulator::e4m3_to_float(static_cast<uint8_t>(bits)); }
};

// Products are exact; the sum is formed in f64 and rounded once. The order and the rounding of the hardware's sum are
// not documented, so results agree with it to a few units in the last place of the largest term only.
template <class Element>
void compute_mma(const ::emulator::WarpExchange& exchange) {
    constexpr int per_register = Element::kPerRegister;
    constexpr int depth = 8 * per_register;
    float a[16][depth], b[8][depth];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operands = *static_cast<const MmaOperands*>(exchange.in[lane]);
        const int group = lane / 4, member = lane % 4;
        for (int e = 0; e < per_register; ++e) {
            const int shift = e * (32 / per_register), column = member * per_register + e;
            for (int i = 0; i < 4; ++i)
                a[group + (i & 1) * 8][column + (i >> 1) * (depth / 2)] = Element::decode(operands.a[i] >> shift);
            for (int i = 0; i < 2; ++i) b[group][column + i * (depth / 2)] = Element::decode(operands.b[i] >> shift);
        }
    }
    double sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* d = static_cast<const float*>(exchange.out[lane]);
        for (int i = 0; i < 4; ++i) sum[lane / 4 + (i >> 1) * 8][(lane % 4) * 2 + (i & 1)] = d[i];
    }
    ::emulator::multiply_add_16x8(&a[0][0], &b[0][0], depth, sum);
    for (int lane = 0; lane < 32; ++lane) {
        auto* d = static_cast<float*>(exchange.out[lane]);
        for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(sum[lane / 4 + (i >> 1) * 8][(lane % 4) * 2 + (i & 1)]);
    }
}

template <class Element>
void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const MmaOperands operands{a, b};
    ::emulator::full_warp_collective(name, &operands, d, compute_mma<Element>);
}

}  // namespace twin

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    twin::mma<twin::Bf16>("mma.m16n8k16.bf16", d, a, b);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    twin::mma<twin::F16>("mma.m16n8k16.f16", d, a, b);
}
inline void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    twin::mma<twin::E4m3>("mma.m16n8k32.e4m3", d, a, b);
}

#endif

}  // namespace ptx

// wgmma.mma_async: asynchronous products of a warpgroup, m64nNk16 (bf16, f16) and m64nNk32 (e4m3) with f32 accumulators.
//
// The 128 threads of four consecutive warps, the first a multiple of 4, compute D[64, N] (+)= A[64, K] * B[K, N]. Thread
// t holds of D in register i row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (t % 4) + i % 2. A
// from registers lies in each warp as in mma.sync. Operands in shared memory are named by descriptors; writes to them by
// ordinary stores need fence_proxy_async (proxy_fence.h), a barrier, and only then the product.
// Order: wgmma_fence before the first product and after touching accumulators or A's registers; products;
// wgmma_commit_group; wgmma_wait_group; only then the accumulators may be touched and the operands overwritten.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" (sm_90a).
#pragma once

#include "target.h"
#if !defined(__CUDACC__)
#include "../emulator/wgmma.h"
#endif

namespace ptx {

// How an operand lies in shared memory: bits 62-63 of the descriptor.
enum class Swizzle : uint32_t { None = 0, B128 = 1, B64 = 2, B32 = 3 };
// Which index of an operand is contiguous: the depth, or the row of A (column of B). e4m3 must be depth-major.
enum class Major : uint32_t { K = 0, MN = 1 };

// Descriptor of a matrix at a shared address, with its leading and stride byte offsets (multiples of 16).
//
// Depth-major, swizzle of S bytes: a row is S bytes long, 8 rows are one pattern, `stride` leads to the next 8 rows,
// `leading` is ignored; a step of 32 bytes in the address is a step of one instruction along the depth. Depth-major
// without swizzle: 8 rows of 16 bytes are one core matrix, `leading` leads to the next 16 bytes of depth, `stride` to the
// next 8 rows. Row-major, swizzle: a line of S bytes of rows, 8 lines (of depth) are one pattern, `leading` leads to the
// next S bytes of rows, `stride` to the next 8 of depth; without swizzle `stride` leads to the next 16 bytes of rows,
// `leading` to the next 8 of depth. Patterns start at multiples of 8 S bytes.
__host__ __device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                                              Swizzle swizzle) {
    return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | static_cast<uint64_t>((leading & 0x3ffffu) >> 4) << 16 |
           static_cast<uint64_t>((stride & 0x3ffffu) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the `Pending` newest groups are unfinished.
template <int Pending>
__device__ __forceinline__ void wgmma_wait_group() {
    static_assert(Pending >= 0 && Pending <= 7);
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// No instruction: keeps the compiler from moving accesses to these registers across this point.
template <int Count>
__device__ __forceinline__ void wgmma_hold(float (&registers)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

namespace detail {

#define PTX_WGMMA_REGISTERS_4 "%0, %1, %2, %3"
#define PTX_WGMMA_REGISTERS_8 PTX_WGMMA_REGISTERS_4  \
    ", %4, %5, %6, %7"
#define PTX_WGMMA_REGISTERS_16 PTX_WGMMA_REGISTERS_8  \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PTX_WGMMA_REGISTERS_32 PTX_WGMMA_REGISTERS_16  \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_WGMMA_REGISTERS_48 PTX_WGMMA_REGISTERS_32  \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PTX_WGMMA_REGISTERS_64 PTX_WGMMA_REGISTERS_48  \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_WGMMA_REGISTERS_96 PTX_WGMMA_REGISTERS_64  \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PTX_WGMMA_REGISTERS_128 PTX_WGMMA_REGISTERS_96  \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PTX_WGMMA_IN_OUT_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PTX_WGMMA_IN_OUT_8(d, i) PTX_WGMMA_IN_OUT_4(d, i), PTX_WGMMA_IN_OUT_4(d, i + 4)
#define PTX_WGMMA_IN_OUT_16(d, i) PTX_WGMMA_IN_OUT_8(d, i), PTX_WGMMA_IN_OUT_8(d, i + 8)
#define PTX_WGMMA_IN_OUT_32(d, i) PTX_WGMMA_IN_OUT_16(d, i), PTX_WGMMA_IN_OUT_16(d, i + 16)
#define PTX_WGMMA_IN_OUT_48(d, i) PTX_WGMMA_IN_OUT_32(d, i), PTX_WGMMA_IN_OUT_16(d, i + 32)
#define PTX_WGMMA_IN_OUT_64(d, i) PTX_WGMMA_IN_OUT_32(d, i), PTX_WGMMA_IN_OUT_32(d, i + 32)
#define PTX_WGMMA_IN_OUT_96(d, i) PTX_WGMMA_IN_OUT_64(d, i), PTX_WGMMA_IN_OUT_32(d, i + 64)
#define PTX_WGMMA_IN_OUT_128(d, i) PTX_WGMMA_IN_OUT_64(d, i), PTX_WGMMA_IN_OUT_64(d, i + 64)

template <int N>
struct Wgmma {
    static_assert(N < 0, "N is 8, 16, 32, 64, 96, 128, 192 or 256");
};

// o0 to o6 are the numbers of the operands behind the accumulators.
#define PTX_WGMMA_16_BIT(type, n, count, o0, o1, o2, o3, o4, o5, o6)                                                \
    template <int MajorA, int MajorB>                                                                              \
    static __device__ __forceinline__ void type(float (&d)[count], uint64_t a, uint64_t b, uint32_t accumulate) {  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type                             \
                     " {" PTX_WGMMA_REGISTERS_##count "}, %" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 ";\n}"   \
                     : PTX_WGMMA_IN_OUT_##count(d, 0)                                                              \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(MajorA), "n"(MajorB));                                 \
    }                                                                                                              \
    template <int MajorB>                                                                                          \
    static __device__ __forceinline__ void type(float (&d)[count], const uint32_t (&a)[4], uint64_t b,             \
                                                uint32_t accumulate) {                                             \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type                             \
                     " {" PTX_WGMMA_REGISTERS_##count "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4        \
                     ", p, 1, 1, %" #o6 ";\n}"                                                                    \
                     : PTX_WGMMA_IN_OUT_##count(d, 0)                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(MajorB));          \
    }
#define PTX_WGMMA_8_BIT(n, count, o0, o1, o2, o3, o4, o5, o6)                                                       \
    static __device__ __forceinline__ void e4m3(float (&d)[count], uint64_t a, uint64_t b, uint32_t accumulate) {  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" PTX_WGMMA_REGISTERS_##count      \
                     "}, %" #o0 ", %" #o1 ", p, 1, 1;\n}"                                                         \
                     : PTX_WGMMA_IN_OUT_##count(d, 0)                                                              \
                     : "l"(a), "l"(b), "r"(accumulate));                                                           \
    }                                                                                                              \
    static __device__ __forceinline__ void e4m3(float (&d)[count], const uint32_t (&a)[4], uint64_t b,             \
                                                uint32_t accumulate) {                                             \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" PTX_WGMMA_REGISTERS_##count      \
                     "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1;\n}"                         \
                     : PTX_WGMMA_IN_OUT_##count(d, 0)                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                       \
    }
#define PTX_WGMMA_SHAPE(n, count, ...)                       \
    template <>                                              \
    struct Wgmma<n> {                                        \
        PTX_WGMMA_16_BIT(bf16, n, count, __VA_ARGS__)        \
        PTX_WGMMA_16_BIT(f16, n, count, __VA_ARGS__)         \
        PTX_WGMMA_8_BIT(n, count, __VA_ARGS__)               \
    };

PTX_WGMMA_SHAPE(8, 4, 4, 5, 6, 7, 8, 9, 10)
PTX_WGMMA_SHAPE(16, 8, 8, 9, 10, 11, 12, 13, 14)
PTX_WGMMA_SHAPE(32, 16, 16, 17, 18, 19, 20, 21, 22)
PTX_WGMMA_SHAPE(64, 32, 32, 33, 34, 35, 36, 37, 38)
PTX_WGMMA_SHAPE(96, 48, 48, 49, 50, 51, 52, 53, 54)
PTX_WGMMA_SHAPE(128, 64, 64, 65, 66, 67, 68, 69, 70)
PTX_WGMMA_SHAPE(192, 96, 96, 97, 98, 99, 100, 101, 102)
PTX_WGMMA_SHAPE(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef PTX_WGMMA_SHAPE
#undef PTX_WGMMA_8_BIT
#undef PTX_WGMMA_16_BIT

}  // namespace detail

// D = A * B, plus D if `accumulate`; A and B by descriptor.
template <int N, Major A = Major::K, Major B = Major::K>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    detail::Wgmma<N>::template bf16<static_cast<int>(A), static_cast<int>(B)>(d, a, b, accumulate);
}
// The same with A from registers.
template <int N, Major B = Major::K>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    detail::Wgmma<N>::template bf16<static_cast<int>(B)>(d, a, b, accumulate);
}
template <int N, Major A = Major::K, Major B = Major::K>
__device__ __forceinline__ void wgmma_f16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    detail::Wgmma<N>::template f16<static_cast<int>(A), static_cast<int>(B)>(d, a, b, accumulate);
}
template <int N, Major B = Major::K>
__device__ __forceinline__ void wgmma_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    detail::Wgmma<N>::template f16<static_cast<int>(B)>(d, a, b, accumulate);
}
template <int N>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    detail::Wgmma<N>::e4m3(d, a, b, accumulate);
}
template <int N>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    detail::Wgmma<N>::e4m3(d, a, b, accumulate);
}

#endif

#else

inline void wgmma_fence() { ::emulator::wgmma_fence_registers(); }
inline void wgmma_commit_group() { ::emulator::wgmma_commit(); }
template <int Pending>
void wgmma_wait_group() {
    static_assert(Pending >= 0 && Pending <= 7);
    ::emulator::wgmma_wait(Pending);
}
template <int Count>
void wgmma_hold(float (&)[Count]) {}

namespace twin {

template <int N>
void wgmma(::emulator::WgmmaElement element, bool a_mn_major, bool b_mn_major, const uint32_t* fragment, uint64_t a, uint64_t b,
           bool accumulate, float (&d)[N / 2]) {
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256);
    ::emulator::wgmma_issue({element, N, a_mn_major, b_mn_major, fragment, a, b, accumulate, d});
}

}  // namespace twin

template <int N, Major A = Major::K, Major B = Major::K>
void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    twin::wgmma<N>(::emulator::WgmmaElement::Bf16, A == Major::MN, B == Major::MN, nullptr, a, b, accumulate, d);
}
template <int N, Major B = Major::K>
void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    twin::wgmma<N>(::emulator::WgmmaElement::Bf16, false, B == Major::MN, a, 0, b, accumulate, d);
}
template <int N, Major A = Major::K, Major B = Major::K>
void wgmma_f16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    twin::wgmma<N>(::emulator::WgmmaElement::F16, A == Major::MN, B == Major::MN, nullptr, a, b, accumulate, d);
}
template <int N, Major B = Major::K>
void wgmma_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    twin::wgmma<N>(::emulator::WgmmaElement::F16, false, B == Major::MN, a, 0, b, accumulate, d);
}
template <int N>
void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    twin::wgmma<N>(::emulator::WgmmaElement::E4m3, false, false, nullptr, a, b, accumulate, d);
}
template <int N>
void wgmma_e4m3(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    twin::wgmma<N>(::emulator::WgmmaElement::E4m3, false, false, a, 0, b, accumulate, d);
}

#endif

}  // namespace ptx

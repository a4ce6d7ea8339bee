// The CUDA C++ language as kernels see it when g++ compiles them: qualifiers, built-in variables and vector types,
// block barriers, warp intrinsics and atomics.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "numeric.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::emulator::this_thread().position)
#define blockIdx (::emulator::this_thread().block->position)
#define blockDim (::emulator::launch_config().block)
#define gridDim (::emulator::launch_config().grid)

struct alignas(8) uint2 {
    std::uint32_t x, y;
};
struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) { return {x, y}; }
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t __float_as_uint(float value) { return std::bit_cast<std::uint32_t>(value); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
template <class T>
T __ldg(const T* address) {
    return *address;
}
inline int __popc(std::uint32_t bits) { return std::popcount(bits); }
inline int __ffs(std::uint32_t bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }
inline int __clz(std::uint32_t bits) { return std::countl_zero(bits); }

inline void __syncthreads(const std::source_location where = std::source_location::current()) {
    const auto threads = static_cast<unsigned>(::emulator::this_thread().block->threads.size());
    ::emulator::block_barrier(0, threads, true, "__syncthreads", where);
}

inline void __syncwarp(std::uint32_t mask = ::emulator::kFullMask) {
    ::emulator::warp_collective(mask, "__syncwarp", nullptr, nullptr, [](const ::emulator::WarpExchange&) {});
}

// Memory is sequentially consistent here, so a fence only gives others a chance to run.
inline void __threadfence() { ::emulator::preemption_point(); }
inline void __threadfence_block() { ::emulator::preemption_point(); }
inline void __threadfence_system() { ::emulator::preemption_point(); }

namespace emulator {

enum class ShuffleKind { Index, Up, Down, Xor };

// Result of a shuffle from a lane outside the mask: undefined on hardware, all ones (NaN, poison) here.
inline constexpr std::uint64_t kUndefinedLane = ~std::uint64_t{0};

std::uint64_t shuffle(ShuffleKind kind, std::uint32_t mask, std::uint64_t value, int operand, int width);
std::uint32_t ballot(std::uint32_t mask, bool predicate, const char* operation);

template <class T>
T shuffle_value(ShuffleKind kind, std::uint32_t mask, T value, int operand, int width) {
    static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "shuffles move 4-byte and 8-byte values");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = shuffle(kind, mask, bits, operand, width);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// sum[16][8] += a[16][depth] * b[8][depth]ᵀ, each sum in the order of k.
void multiply_add_16x8(const float* a, const float* b, int depth, double (&sum)[16][8]);

// A read-modify-write in one step; other threads may run before and after it.
template <class T, class Update>
T atomic_update(T* address, Update update) {
    preemption_point();
    const T old = *address;
    *address = update(old);
    note_progress();
    preemption_point();
    return old;
}

}  // namespace emulator

template <class T>
T __shfl_sync(std::uint32_t mask, T value, int lane, int width = 32) {
    return ::emulator::shuffle_value(::emulator::ShuffleKind::Index, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(std::uint32_t mask, T value, unsigned delta, int width = 32) {
    return ::emulator::shuffle_value(::emulator::ShuffleKind::Up, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(std::uint32_t mask, T value, unsigned delta, int width = 32) {
    return ::emulator::shuffle_value(::emulator::ShuffleKind::Down, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, int lane_mask, int width = 32) {
    return ::emulator::shuffle_value(::emulator::ShuffleKind::Xor, mask, value, lane_mask, width);
}

inline std::uint32_t __ballot_sync(std::uint32_t mask, int predicate) {
    return ::emulator::ballot(mask, predicate != 0, "__ballot_sync");
}
inline int __any_sync(std::uint32_t mask, int predicate) {
    return ::emulator::ballot(mask, predicate != 0, "__any_sync") != 0;
}
inline int __all_sync(std::uint32_t mask, int predicate) {
    return ::emulator::ballot(mask, predicate != 0, "__all_sync") == mask;
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    return ::emulator::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    return ::emulator::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    return ::emulator::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return ::emulator::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return ::emulator::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

// The two targets of a kernel source: nvcc (the wrappers are inline PTX) and g++ (the wrappers are the emulator's
// twins). Also what differs between them in the language: shared memory declarations and shared addresses.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cuda/std/cstdint>
#include <cuda/std/type_traits>

// A static shared array `name` of `count` elements, aligned to 16 bytes.
#define PTX_SHARED_ARRAY(type, name, count) __shared__ alignas(16) type name[count]

namespace ptx {

using namespace cuda::std;

// Start of the dynamic shared memory, aligned to 1024 bytes (the 128-byte swizzle's atom).
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char ptx_dynamic_shared[];
    return reinterpret_cast<T*>(ptx_dynamic_shared);
}

// The 32-bit address of a shared object, as PTX instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace ptx

#else

#include "../emulator/cuda_language.h"

// The address of the local static identifies the declaration, separately for each template instance.
#define PTX_SHARED_ARRAY(type, name, count)                                                                   \
    static const char name##_key = 0;                                                                         \
    auto& name = *reinterpret_cast<type(*)[count]>(::emulator::static_shared_memory(                          \
        &name##_key, sizeof(type) * (count), alignof(type) < 16 ? 16 : alignof(type)))

namespace ptx {

using std::int32_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

template <class T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(::emulator::dynamic_shared_memory());
}

inline uint32_t shared_address(const void* pointer) { return ::emulator::shared_address_of(pointer); }

}  // namespace ptx

#endif

// ld.global and st.global with cache hints.
//
// Data read once (weights, KV blocks) should not displace data that is read again. `nc` loads go through the
// read-only path: nobody may write those bytes during the kernel. PTX ISA, "Data Movement: ld, ld.global.nc, st".
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

// 16 bytes through the read-only path, not kept in L1, fetched into L2 by 128-byte lines.
__device__ __forceinline__ uint4 ld_global_nc_v4(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

__device__ __forceinline__ uint32_t ld_global_nc_u32(const void* address) {
    uint32_t v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
}

// An L2 policy for the loads below that marks lines to be evicted first.
__device__ __forceinline__ uint64_t createpolicy_evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t createpolicy_evict_last() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint4 ld_global_nc_v4(const void* address, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address), "l"(policy));
    return v;
}

// Cached in L2 only.
__device__ __forceinline__ uint4 ld_global_cg_v4(const void* address) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

// Streaming: likely accessed once.
__device__ __forceinline__ uint4 ld_global_cs_v4(const void* address) {
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void st_global_cg_v4(void* address, uint4 v) {
    asm volatile("st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void st_global_cs_v4(void* address, uint4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void st_global_cs_u32(void* address, uint32_t v) {
    asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

#else

namespace twin {

template <class T>
T load(const void* address, bool read_only, const char* instruction) {
    ::emulator::check_global(address, sizeof(T), sizeof(T), ::emulator::Access::Read, instruction);
    if (read_only) ::emulator::note_read_only(address, sizeof(T));
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
}

template <class T>
void store(void* address, T value, const char* instruction) {
    ::emulator::check_global(address, sizeof(T), sizeof(T), ::emulator::Access::Write, instruction);
    std::memcpy(address, &value, sizeof(T));
}

// Policies are opaque; these values only tell a policy from an arbitrary number.
inline constexpr uint64_t kEvictFirst = 0x12f0000000000000u;
inline constexpr uint64_t kEvictLast = 0x14f0000000000000u;

inline void check_policy(uint64_t policy, const char* instruction) {
    if (policy != kEvictFirst && policy != kEvictLast)
        ::emulator::raise(::emulator::FaultKind::InvalidArgument,
                          std::string(instruction) + ": the cache policy is not one of createpolicy");
}

}  // namespace twin

inline uint4 ld_global_nc_v4(const void* address) { return twin::load<uint4>(address, true, "ld.global.nc.v4"); }
inline uint32_t ld_global_nc_u32(const void* address) { return twin::load<uint32_t>(address, true, "ld.global.nc"); }
inline uint64_t createpolicy_evict_first() { return twin::kEvictFirst; }
inline uint64_t createpolicy_evict_last() { return twin::kEvictLast; }
inline uint4 ld_global_nc_v4(const void* address, uint64_t policy) {
    twin::check_policy(policy, "ld.global.nc");
    return twin::load<uint4>(address, true, "ld.global.nc.L2::cache_hint.v4");
}
inline uint4 ld_global_cg_v4(const void* address) { return twin::load<uint4>(address, false, "ld.global.cg.v4"); }
inline uint4 ld_global_cs_v4(const void* address) { return twin::load<uint4>(address, false, "ld.global.cs.v4"); }
inline void st_global_cg_v4(void* address, uint4 v) { twin::store(address, v, "st.global.cg.v4"); }
inline void st_global_cs_v4(void* address, uint4 v) { twin::store(address, v, "st.global.cs.v4"); }
inline void st_global_cs_u32(void* address, uint32_t v) { twin::store(address, v, "st.global.cs"); }

#endif

}  // namespace ptx

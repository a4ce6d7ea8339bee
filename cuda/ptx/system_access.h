// Relaxed loads and stores of system scope, and exchanges: what GPUs and the host say to each other through flags and
// through memory that others write meanwhile. Ordered loads and stores are in synchronising_access.h.
// PTX ISA, "Memory Consistency Model", ld.relaxed, st.relaxed, atom.
#pragma once

#include "synchronising_access.h"

namespace ptx {

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t ld_relaxed_sys(const uint32_t* address) {
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ void st_relaxed_sys(uint32_t* address, uint32_t v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
// Four words, each of them whole.
__device__ __forceinline__ uint4 ld_relaxed_sys_v4(const void* address) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ void st_relaxed_sys_v4(void* address, uint4 v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}
// Both return the value before.
__device__ __forceinline__ uint32_t atom_exch_acq_rel_sys(uint32_t* address, uint32_t v) {
    uint32_t old;
    asm volatile("atom.acq_rel.sys.global.exch.b32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(v) : "memory");
    return old;
}
__device__ __forceinline__ uint32_t atom_cas_acq_rel_gpu(uint32_t* address, uint32_t expected, uint32_t v) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(old)
                 : "l"(address), "r"(expected), "r"(v)
                 : "memory");
    return old;
}

#else

inline uint32_t ld_relaxed_sys(const uint32_t* address) { return twin::synchronising_load(address, "ld.relaxed.sys"); }
inline void st_relaxed_sys(uint32_t* address, uint32_t v) { twin::synchronising_store(address, v, "st.relaxed.sys"); }
inline uint4 ld_relaxed_sys_v4(const void* address) {
    const char* name = "ld.relaxed.sys.v4";
    ::emulator::check_global(address, 16, 16, ::emulator::Access::Read, name);
    const auto* words = static_cast<const uint32_t*>(address);
    // As in synchronising_load, reading the same again is spinning.
    auto& thread = ::emulator::this_thread();
    const auto digest = [&] { return (words[0] * 31u + words[1]) * 31u + words[2] * 7u + words[3]; };
    if (thread.polled_address == address && thread.polled_value == digest())
        ::emulator::poll({::emulator::Wait::Kind::Polling, 0, 0, name, {}});
    thread.polled_address = address;
    thread.polled_value = digest();
    // Others may write between the words.
    uint4 v;
    v.x = words[0];
    ::emulator::preemption_point();
    v.y = words[1];
    v.z = words[2];
    v.w = words[3];
    return v;
}
inline void st_relaxed_sys_v4(void* address, uint4 v) {
    ::emulator::check_global(address, 16, 16, ::emulator::Access::Write, "st.relaxed.sys.v4");
    auto* words = static_cast<uint32_t*>(address);
    words[0] = v.x;
    words[1] = v.y;
    ::emulator::preemption_point();
    words[2] = v.z;
    words[3] = v.w;
    ::emulator::note_progress();
}
inline uint32_t atom_exch_acq_rel_sys(uint32_t* address, uint32_t v) {
    ::emulator::check_global(address, 4, 4, ::emulator::Access::Write, "atom.acq_rel.sys.exch");
    return ::emulator::atomic_update(address, [v](uint32_t) { return v; });
}
inline uint32_t atom_cas_acq_rel_gpu(uint32_t* address, uint32_t expected, uint32_t v) {
    ::emulator::check_global(address, 4, 4, ::emulator::Access::Write, "atom.acq_rel.gpu.cas");
    return ::emulator::atomic_update(address, [=](uint32_t old) { return old == expected ? v : old; });
}

#endif

}  // namespace ptx

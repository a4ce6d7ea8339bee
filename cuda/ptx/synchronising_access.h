// Loads, stores and atomics with memory order and scope: gpu (blocks of one grid) and sys (other GPUs, the host).
// PTX ISA, "Memory Consistency Model", ld.acquire, st.release, atom, red, fence.
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t ld_acquire_gpu(const uint32_t* address) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint32_t ld_acquire_sys(const uint32_t* address) {
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint32_t ld_relaxed_gpu(const uint32_t* address) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}
__device__ __forceinline__ void st_release_gpu(uint32_t* address, uint32_t v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void st_release_sys(uint32_t* address, uint32_t v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void st_relaxed_gpu(uint32_t* address, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
// Returns the value before the addition.
__device__ __forceinline__ uint32_t atom_add_acq_rel_gpu(uint32_t* address, uint32_t v) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(v) : "memory");
    return old;
}
__device__ __forceinline__ void red_add_release_gpu(uint32_t* address, uint32_t v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void red_add_release_sys(uint32_t* address, uint32_t v) {
    asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

#else

namespace twin {

// A thread that reads the same value from the same place again is spinning; it then yields until others have run.
inline uint32_t synchronising_load(const uint32_t* address, const char* instruction) {
    ::emulator::check_global(address, 4, 4, ::emulator::Access::Read, instruction);
    auto& thread = ::emulator::this_thread();
    ::emulator::preemption_point();
    if (thread.polled_address == address && thread.polled_value == ::emulator::load_word(address))
        ::emulator::poll({::emulator::Wait::Kind::Polling, 0, 0, instruction, {}});
    const uint32_t value = ::emulator::load_word(address);
    thread.polled_address = address;
    thread.polled_value = value;
    return value;
}

inline void synchronising_store(uint32_t* address, uint32_t v, const char* instruction) {
    ::emulator::check_global(address, 4, 4, ::emulator::Access::Write, instruction);
    ::emulator::preemption_point();
    ::emulator::store_word(address, v);
    ::emulator::note_progress();
    ::emulator::preemption_point();
}

inline uint32_t atomic_add(uint32_t* address, uint32_t v, const char* instruction) {
    ::emulator::check_global(address, 4, 4, ::emulator::Access::Write, instruction);
    return ::emulator::atomic_update(address, [v](uint32_t old) { return old + v; });
}

}  // namespace twin

inline uint32_t ld_acquire_gpu(const uint32_t* address) { return twin::synchronising_load(address, "ld.acquire.gpu"); }
inline uint32_t ld_acquire_sys(const uint32_t* address) { return twin::synchronising_load(address, "ld.acquire.sys"); }
inline uint32_t ld_relaxed_gpu(const uint32_t* address) { return twin::synchronising_load(address, "ld.relaxed.gpu"); }
inline void st_release_gpu(uint32_t* address, uint32_t v) { twin::synchronising_store(address, v, "st.release.gpu"); }
inline void st_release_sys(uint32_t* address, uint32_t v) { twin::synchronising_store(address, v, "st.release.sys"); }
inline void st_relaxed_gpu(uint32_t* address, uint32_t v) { twin::synchronising_store(address, v, "st.relaxed.gpu"); }
inline uint32_t atom_add_acq_rel_gpu(uint32_t* address, uint32_t v) {
    return twin::atomic_add(address, v, "atom.acq_rel.gpu.add");
}
inline void red_add_release_gpu(uint32_t* address, uint32_t v) { twin::atomic_add(address, v, "red.release.gpu.add"); }
inline void red_add_release_sys(uint32_t* address, uint32_t v) { twin::atomic_add(address, v, "red.release.sys.add"); }
inline void fence_acq_rel_gpu() { ::emulator::preemption_point(); }
inline void fence_acq_rel_sys() { ::emulator::preemption_point(); }

#endif

}  // namespace ptx

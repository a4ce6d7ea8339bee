// cp.async: asynchronous copies of 4, 8 or 16 bytes from global to shared memory, completed in groups per thread.
//
// A wait makes the thread's own copies visible to itself; other threads see them after a barrier that follows the
// wait. Destination addresses are shared addresses, aligned to the copy size, as the source is.
// PTX ISA, "Data Movement: cp.async" (sm_80).
#pragma once

#include "load_store.h"
#include "target.h"
#if !defined(__CUDACC__)
#include "../emulator/async_copy.h"
#endif

namespace ptx {

#if defined(__CUDACC__)

// 16 bytes, bypassing L1.
__device__ __forceinline__ void cp_async_cg_16(uint32_t destination, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

// 16 bytes of which the first `source_bytes` are read and the rest is zero.
__device__ __forceinline__ void cp_async_cg_16_zfill(uint32_t destination, const void* source, uint32_t source_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
                 : "memory");
}

// As above, under an L2 policy of createpolicy and fetched into L2 by 128-byte lines.
__device__ __forceinline__ void cp_async_cg_16_zfill(uint32_t destination, const void* source, uint32_t source_bytes,
                                                     uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(destination),
                 "l"(source), "r"(source_bytes), "l"(policy)
                 : "memory");
}

// 4, 8 or 16 bytes through L1.
template <int Bytes>
__device__ __forceinline__ void cp_async_ca(uint32_t destination, const void* source) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(destination), "l"(source), "n"(Bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `Pending` newest groups are unfinished.
template <int Pending>
__device__ __forceinline__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Waits for every copy of this thread, committed or not.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#else

inline void cp_async_cg_16(uint32_t destination, const void* source) {
    ::emulator::issue_async_copy(destination, source, 16, 16, "cp.async.cg");
}
inline void cp_async_cg_16_zfill(uint32_t destination, const void* source, uint32_t source_bytes) {
    ::emulator::issue_async_copy(destination, source, 16, source_bytes, "cp.async.cg");
}
inline void cp_async_cg_16_zfill(uint32_t destination, const void* source, uint32_t source_bytes, uint64_t policy) {
    twin::check_policy(policy, "cp.async.cg");
    ::emulator::issue_async_copy(destination, source, 16, source_bytes, "cp.async.cg.L2::cache_hint");
}
template <int Bytes>
void cp_async_ca(uint32_t destination, const void* source) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
    ::emulator::issue_async_copy(destination, source, Bytes, Bytes, "cp.async.ca");
}
inline void cp_async_commit_group() { ::emulator::commit_async_copies(); }
template <int Pending>
void cp_async_wait_group() {
    static_assert(Pending >= 0);
    ::emulator::wait_async_copies(Pending);
}
inline void cp_async_wait_all() { ::emulator::wait_all_async_copies(); }

#endif

}  // namespace ptx

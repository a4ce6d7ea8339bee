// A bound on waiting in a loop: with LONGHAUL_BOUNDED_SPINS a wait of more than two seconds ends the kernel with a trap, so
// that a deadlock is an error of the launch. Otherwise, and with the emulator (which finds deadlocks itself), nothing.
// PTX ISA, "Special Registers: %globaltimer" (nanoseconds), "trap".
#pragma once

#include "target.h"

namespace ptx {

// Made before the loop; `failed` is called after each attempt that failed. A wait that succeeds at once costs nothing.
class SpinBound {
#if defined(__CUDACC__) && defined(LONGHAUL_BOUNDED_SPINS)
  public:
    __device__ __forceinline__ void failed() {
        uint64_t now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (start_ == 0) start_ = now;
        if (now - start_ > 2'000'000'000) asm volatile("trap;");
    }

  private:
    uint64_t start_ = 0;
#elif defined(__CUDACC__)
  public:
    __device__ __forceinline__ void failed() {}
#else
  public:
    void failed() {}
#endif
};

}  // namespace ptx

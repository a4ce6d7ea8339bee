// Execution contexts: the stack switch under every emulated CUDA thread.
//
// On x86-64 the switch is a few instructions of assembly that save the callee-saved integer registers; the floating
// point control words are left alone, as no kernel changes them. Elsewhere, or with EMULATOR_UCONTEXT defined,
// POSIX ucontext does the same work (each switch then costs a system call for the signal mask).
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT
#endif

#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

using FiberEntry = void (*)(void* argument);

class ExecutionContext {
public:
    // Makes the first transfer to this context call entry(argument) on the given stack. `entry` must not return.
    void prepare(void* stack_low, std::size_t stack_bytes, FiberEntry entry, void* argument);

    // Suspends `from` (the running context) and resumes `to`; returns when something transfers back to `from`.
    static void transfer(ExecutionContext& from, ExecutionContext& to);

private:
#ifdef EMULATOR_UCONTEXT
    ucontext_t context_{};
#else
    void* stack_pointer_ = nullptr;
#endif
};

// Equal stacks in one mapping, each with an inaccessible page below it, so that an overflow faults.
class StackPool {
public:
    StackPool(std::size_t count, std::size_t stack_bytes);
    ~StackPool();
    StackPool(const StackPool&) = delete;
    StackPool& operator=(const StackPool&) = delete;

    void* stack(std::size_t index) const;
    std::size_t stack_bytes() const { return stack_bytes_; }
    std::size_t count() const { return count_; }
    bool contains(const void* address) const;
    // Whether `address` lies in a guard page.
    bool overflowed(const void* address) const;

private:
    char* base_ = nullptr;
    std::size_t count_, stack_bytes_, pitch_;
};

}  // namespace emulator

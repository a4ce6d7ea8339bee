// Context switch and stacks; see fiber.h.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace emulator {

namespace {
constexpr std::size_t kPage = 4096;
}

#ifdef EMULATOR_UCONTEXT

namespace {
// makecontext passes ints only, so entry and argument travel as four halves.
void trampoline(unsigned entry_high, unsigned entry_low, unsigned argument_high, unsigned argument_low) {
    auto join = [](unsigned high, unsigned low) {
        return static_cast<std::uintptr_t>((static_cast<std::uint64_t>(high) << 32) | low);
    };
    reinterpret_cast<FiberEntry>(join(entry_high, entry_low))(
        reinterpret_cast<void*>(join(argument_high, argument_low)));
}
}  // namespace

void ExecutionContext::prepare(void* stack_low, std::size_t stack_bytes, FiberEntry entry, void* argument) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_low;
    context_.uc_stack.ss_size = stack_bytes;
    context_.uc_link = nullptr;
    const auto e = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(entry));
    const auto a = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(argument));
    makecontext(&context_, reinterpret_cast<void (*)()>(trampoline), 4, static_cast<unsigned>(e >> 32),
                static_cast<unsigned>(e), static_cast<unsigned>(a >> 32), static_cast<unsigned>(a));
}

void ExecutionContext::transfer(ExecutionContext& from, ExecutionContext& to) {
    swapcontext(&from.context_, &to.context_);
}

#else

extern "C" void emulator_switch_stack(void** save, void* load);
extern "C" void emulator_fiber_start();
// emulator_switch_stack(rdi = where to save the stack pointer, rsi = stack pointer to load).
// emulator_fiber_start is the return address of a fresh fiber: r12 holds the entry, r13 its argument.
asm(R"(
.text
.p2align 4
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch_stack, .-emulator_switch_stack
.p2align 4
.globl emulator_fiber_start
.type emulator_fiber_start, @function
emulator_fiber_start:
    movq %r13, %rdi
    callq *%r12
    ud2
.size emulator_fiber_start, .-emulator_fiber_start
)");

void ExecutionContext::prepare(void* stack_low, std::size_t stack_bytes, FiberEntry entry, void* argument) {
    auto top = reinterpret_cast<std::uintptr_t>(stack_low) + stack_bytes;
    top &= ~static_cast<std::uintptr_t>(15);  // the ABI wants 16-byte alignment at the call in the start routine
    auto* slot = reinterpret_cast<void**>(top);
    *--slot = reinterpret_cast<void*>(&emulator_fiber_start);
    *--slot = nullptr;                         // rbp
    *--slot = nullptr;                         // rbx
    *--slot = reinterpret_cast<void*>(entry);  // r12
    *--slot = argument;                        // r13
    *--slot = nullptr;                         // r14
    *--slot = nullptr;                         // r15
    stack_pointer_ = slot;
}

void ExecutionContext::transfer(ExecutionContext& from, ExecutionContext& to) {
    emulator_switch_stack(&from.stack_pointer_, to.stack_pointer_);
}

#endif

StackPool::StackPool(std::size_t count, std::size_t stack_bytes)
    : count_(count), stack_bytes_(stack_bytes), pitch_(stack_bytes + kPage) {
    void* map = mmap(nullptr, count_ * pitch_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(map);
    for (std::size_t i = 0; i < count_; ++i) {
        if (mprotect(base_ + i * pitch_, kPage, PROT_NONE) != 0) {
            munmap(base_, count_ * pitch_);
            throw std::bad_alloc();
        }
    }
}

StackPool::~StackPool() { munmap(base_, count_ * pitch_); }

void* StackPool::stack(std::size_t index) const { return base_ + index * pitch_ + kPage; }

bool StackPool::contains(const void* address) const {
    const auto* p = static_cast<const char*>(address);
    return p >= base_ && p < base_ + count_ * pitch_;
}

bool StackPool::overflowed(const void* address) const {
    return contains(address) && static_cast<std::size_t>(static_cast<const char*>(address) - base_) % pitch_ < kPage;
}

}  // namespace emulator

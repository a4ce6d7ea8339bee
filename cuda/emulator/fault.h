// Faults: what the emulator reports when a kernel breaks a rule of the programming model.
#pragma once

#include <stdexcept>
#include <string>

namespace emulator {

enum class FaultKind {
    Deadlock,           // no thread can make progress
    DivergentBarrier,   // threads of a block meet at different __syncthreads, or disagree about a named barrier
    WarpMismatch,       // lanes of a warp disagree about a collective or its mask
    OutOfBounds,        // access outside an allocation, or a damaged red zone
    Misaligned,         // address not aligned as the instruction requires
    UninitialisedRead,  // load of poison from floating-point memory nobody has written
    UnwrittenOutput,    // an output element still holds poison after the launch
    ReadOnlyViolated,   // memory read through the non-coherent path changed during the kernel
    InvalidBarrier,     // mbarrier used before initialisation, over-arrived, or out of range
    InvalidArgument,    // launch or instruction operand outside its legal range
    KernelException,    // the kernel body threw
    WarpgroupMismatch,  // warps of a warpgroup disagree about an instruction, or registers in flight were touched
    ExitedBlock,        // access to the shared memory of a block of the cluster that has exited
};

const char* name_of(FaultKind kind);

// Thrown by `launch` (never through a kernel's own frames) and by host-side checks.
class Fault : public std::runtime_error {
public:
    Fault(FaultKind kind, const std::string& message)
        : std::runtime_error(std::string(name_of(kind)) + ": " + message), kind_(kind) {}
    FaultKind kind() const { return kind_; }

private:
    FaultKind kind_;
};

}  // namespace emulator

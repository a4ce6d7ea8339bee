// Names of fault kinds; see fault.h.
#include "fault.h"

namespace emulator {

const char* name_of(FaultKind kind) {
    switch (kind) {
        case FaultKind::Deadlock: return "deadlock";
        case FaultKind::DivergentBarrier: return "divergent barrier";
        case FaultKind::WarpMismatch: return "warp mismatch";
        case FaultKind::OutOfBounds: return "out of bounds";
        case FaultKind::Misaligned: return "misaligned";
        case FaultKind::UninitialisedRead: return "uninitialised read";
        case FaultKind::UnwrittenOutput: return "unwritten output";
        case FaultKind::ReadOnlyViolated: return "read-only violated";
        case FaultKind::InvalidBarrier: return "invalid barrier";
        case FaultKind::InvalidArgument: return "invalid argument";
        case FaultKind::KernelException: return "kernel exception";
        case FaultKind::WarpgroupMismatch: return "warpgroup mismatch";
        case FaultKind::ExitedBlock: return "exited block";
    }
    return "fault";
}

}  // namespace emulator

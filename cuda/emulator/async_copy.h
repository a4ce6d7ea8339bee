// cp.async on the emulator: per-thread groups of small copies from global to shared memory.
//
// Eager completion copies at issue. Lazy completion poisons the destination at issue (its contents are undefined
// until the wait) and copies when a wait demands the group; source and destination are touched only then.
#pragma once

#include <cstdint>

namespace emulator {

void issue_async_copy(std::uint32_t destination, const void* source, std::uint32_t bytes, std::uint32_t read,
                      const char* instruction);
void commit_async_copies();
// Completes all but the newest `pending` committed groups.
void wait_async_copies(std::uint32_t pending);
// Completes everything, committed or not (cp.async.wait_all).
void wait_all_async_copies();

}  // namespace emulator

// Bulk stores (cp.async.bulk from shared to global memory): groups per thread.
//
// Eager completion reads and writes at issue. Lazy completion reads the source when a wait demands it, and writes the
// destination when a wait for whole groups does, or else some time before the block ends.
#pragma once

#include <cstdint>

namespace emulator {

struct BulkStore;
struct Thread;

void issue_bulk_store(BulkStore store);
void commit_bulk_stores();
// Until at most the `pending` newest groups are unfinished; with `read_only`, have not read their sources.
void wait_bulk_stores(std::uint32_t pending, bool read_only);
// A thread ends: its sources must have been read, as shared memory goes with the block.
void finish_bulk_stores(Thread& thread);

}  // namespace emulator

// cp.async groups; see async_copy.h.
#include "async_copy.h"

#include <cstring>

#include "runtime.h"

namespace emulator {

void AsyncCopy::apply() const {
    std::memcpy(destination, source, read);
    std::memset(destination + read, 0, bytes - read);
}

void issue_async_copy(std::uint32_t destination, const void* source, std::uint32_t bytes, std::uint32_t read,
                      const char* instruction) {
    if (read > bytes)
        raise(FaultKind::InvalidArgument, std::string(instruction) + ": source size " + std::to_string(read) +
                                              " exceeds the copy size " + std::to_string(bytes));
    unsigned char* to = shared_pointer(destination, bytes, bytes, instruction);
    // With source size 0 nothing is read, and the pointer may be anything.
    if (read != 0) check_global(source, read, bytes, Access::Read, instruction);
    const AsyncCopy copy{to, static_cast<const unsigned char*>(source), bytes, read};
    if (launch_config().completion == Completion::Eager) {
        copy.apply();
    } else {
        std::memset(to, kPoisonByte, bytes);
        this_thread().open_copies.push_back(copy);
    }
    preemption_point();
}

void commit_async_copies() {
    Thread& thread = this_thread();
    thread.committed_copies.push_back(std::move(thread.open_copies));
    thread.open_copies.clear();
}

void wait_async_copies(std::uint32_t pending) {
    auto& groups = this_thread().committed_copies;
    while (groups.size() > pending) {
        for (const auto& copy : groups.front()) copy.apply();
        groups.pop_front();
    }
}

void wait_all_async_copies() {
    commit_async_copies();
    wait_async_copies(0);
}

}  // namespace emulator

// Groups of bulk stores; see bulk_store.h.
#include "bulk_store.h"

#include "runtime.h"

namespace emulator {

namespace {

void read(BulkStore& store) {
    if (!store.was_read) store.data = store.read();
    store.was_read = true;
}

}  // namespace

void issue_bulk_store(BulkStore store) {
    if (launch_config().completion == Completion::Eager) {
        read(store);
        store.write(store.data);
        store.write = [](const std::vector<unsigned char>&) {};
        store.was_read = false;  // waiting for it is still the thread's duty
        store.read = [] { return std::vector<unsigned char>{}; };
    }
    this_thread().open_stores.push_back(std::move(store));
    preemption_point();
}

void commit_bulk_stores() {
    Thread& thread = this_thread();
    thread.committed_stores.push_back(std::move(thread.open_stores));
    thread.open_stores.clear();
}

void wait_bulk_stores(std::uint32_t pending, bool read_only) {
    auto& groups = this_thread().committed_stores;
    if (read_only) {
        for (std::size_t i = 0; i + pending < groups.size(); ++i)
            for (auto& store : groups[i]) read(store);
        return;
    }
    while (groups.size() > pending) {
        for (auto& store : groups.front()) {
            read(store);
            store.write(store.data);
        }
        groups.pop_front();
    }
}

void finish_bulk_stores(Thread& thread) {
    const auto unread = [](const std::vector<BulkStore>& stores) {
        for (const auto& store : stores)
            if (!store.was_read) return true;
        return false;
    };
    bool pending = unread(thread.open_stores);
    for (const auto& group : thread.committed_stores) pending |= unread(group);
    if (pending)
        raise(FaultKind::InvalidArgument,
              describe_thread(thread) + " exits while its bulk stores still read shared memory; wait for the group's reads first");
    for (auto& group : thread.committed_stores)
        for (auto& store : group)
            thread.block->deferred.push_back([store = std::move(store)] { store.write(store.data); });
    thread.committed_stores.clear();
}

}  // namespace emulator

// The emulator's inside: threads, warps, blocks, and the operations from which device functions are built.
//
// Threads are fibers on one operating-system thread and are never preempted: a thread runs until it waits, polls or
// offers a preemption point. Everything here is therefore free of data races by construction, while the order in
// which threads run is the adversary (see launch.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <unordered_map>
#include <vector>

#include "fault.h"
#include "fiber.h"
#include "launch.h"
#include "memory.h"
#include "shared_memory.h"

namespace emulator {

inline constexpr unsigned kWarpSize = 32;
inline constexpr std::uint32_t kFullMask = 0xffffffffu;
inline constexpr unsigned kNamedBarriers = 16;

struct Block;
struct Warp;
struct WgmmaQueue;  // wgmma.cpp

// What a blocked thread waits for; only used to report deadlocks.
struct Wait {
    enum class Kind {
        None, BlockBarrier, WarpCollective, MemoryBarrier, Polling, ClusterBarrier, Warpgroup,
    } kind = Kind::None;
    std::uint64_t id = 0;         // barrier number, warp mask, shared address of an mbarrier, or number of a warpgroup
    std::uint32_t parity = 0;     // phase parity awaited (mbarrier)
    const char* operation = "";   // instruction
    std::source_location where{};
};

enum class ThreadState : std::uint8_t { Ready, Waiting, Polling, Exited };

// One cp.async: `read` bytes come from `source`, the rest of `bytes` is zero-filled.
struct AsyncCopy {
    unsigned char* destination;
    const unsigned char* source;
    std::uint32_t bytes, read;
    void apply() const;
};

// One bulk store from shared to global memory. Reading the source and writing the destination are two steps.
struct BulkStore {
    std::function<std::vector<unsigned char>()> read;
    std::function<void(const std::vector<unsigned char>&)> write;
    std::vector<unsigned char> data;
    bool was_read = false;
};

struct Thread {
    ExecutionContext context;
    Block* block = nullptr;
    Warp* warp = nullptr;
    unsigned index = 0;  // linear index in the block
    uint3 position;
    ThreadState state = ThreadState::Ready;
    Wait wait;
    std::vector<AsyncCopy> open_copies;                   // issued, not committed
    std::deque<std::vector<AsyncCopy>> committed_copies;  // groups, oldest first
    std::vector<BulkStore> open_stores;                   // as above, for bulk stores
    std::deque<std::vector<BulkStore>> committed_stores;
    bool at_cluster_barrier = false;                      // arrived at barrier.cluster and has not waited yet
    bool cluster_phase_done = false;                      // and all others have arrived too
    const void* polled_address = nullptr;                 // last synchronising load, to recognise spinning
    std::uint64_t polled_value = 0;
    unsigned lane() const { return index % kWarpSize; }
};

// A collective in which the lanes of `mask` take part; the last to arrive computes for all.
struct WarpExchange {
    std::uint32_t mask = 0;
    std::uint32_t arrived = 0;
    const char* operation = nullptr;
    const void* in[kWarpSize] = {};
    void* out[kWarpSize] = {};
};

struct Warp {
    Block* block = nullptr;
    unsigned first_thread = 0;
    std::uint32_t present = 0;  // lanes that exist (the last warp of a block may be partial)
    std::uint32_t ready = 0;    // lanes that can run
    std::uint32_t polling = 0;  // lanes that spin on memory
    std::uint64_t priority = 0;
    std::vector<WarpExchange> exchanges;  // collectives some lanes of which have arrived
    std::shared_ptr<WgmmaQueue> wgmma;    // of warps that use it
};

// What the four warps of a warpgroup must execute alike (wgmma, setmaxnreg), in order.
struct Warpgroup {
    std::deque<std::string> log;     // from instruction `first` on, until all warps have executed it
    std::uint64_t first = 0;
    std::uint64_t issued[4] = {};    // instructions executed by each warp
    unsigned registers = 0;          // of a thread, as the last setmaxnreg demanded; 0 before
    std::vector<Thread*> waiting;    // for other warps, or for registers
};

struct BlockBarrier {
    unsigned expected = 0, arrived = 0;
    std::source_location where{};
    std::vector<Thread*> waiting;
};

struct Cluster {
    std::vector<Block*> blocks;  // by rank; blocks stay until all have exited
    unsigned running = 0;        // blocks that have not exited
    unsigned live = 0;           // threads that have not exited
    unsigned arrived = 0;        // live threads at barrier.cluster
    std::vector<Thread*> waiting;
};

struct Block {
    std::size_t slot = 0;  // which resident slot (stacks, shared memory) it occupies
    uint3 position;
    Cluster* cluster = nullptr;
    unsigned rank = 0;  // in the cluster
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;  // complete ones
    unsigned live = 0;
    BlockBarrier barriers[kNamedBarriers];
    std::unordered_map<std::uint32_t, std::vector<Thread*>> mbarrier_waiters;  // by shared address
    std::vector<std::function<void()>> deferred;                               // asynchronous effects not yet applied
    SharedMemory* shared = nullptr;
    bool launched_dependents = false, waited_for_grids = false;  // griddepcontrol
};

// The running thread. Only inside a kernel.
Thread& this_thread();
const LaunchConfig& launch_config();
bool in_kernel();

// Ends the launch with a fault (in a kernel), or throws it (on the host).
[[noreturn]] void raise(FaultKind kind, const std::string& message);
// "thread (x,y,z) of block (x,y,z)"
std::string describe_thread(const Thread& thread);

// Suspends the running thread until `wake`.
void wait_for(const Wait& wait);
void wake(Thread& thread);
// Suspends a thread that found a memory location not yet as it wants; it runs again to look once more.
void poll(const Wait& wait);
// A point at which the scheduler may, depending on the seed, run others first. Also marks visible progress.
void preemption_point();
void note_progress();
// Queues an asynchronous effect: applied at once (Eager), or when no thread can run without it (Lazy).
void start_async(std::function<void()> effect);

// Meets the other lanes of `mask`; the last arriver calls compute(exchange), then all continue.
void warp_collective(std::uint32_t mask, const char* operation, const void* in, void* out,
                     void (*compute)(const WarpExchange&));
// As warp_collective with all 32 lanes, for instructions that need a full, converged warp.
void full_warp_collective(const char* operation, const void* in, void* out, void (*compute)(const WarpExchange&));

// Barrier `id` of the block with `count` threads. `sync` waits; otherwise the thread only arrives.
void block_barrier(unsigned id, unsigned count, bool sync, const char* operation, const std::source_location& where);

// Counts that the running thread's warp, all of whose lanes are here, executes a warpgroup instruction; `signature` tells
// instructions apart. Returns its number. The four warps must execute the same ones in the same order.
std::uint64_t warpgroup_issue(const char* operation, const std::string& signature);
// Suspends the running thread until all four warps have executed instruction `number`.
void warpgroup_await(std::uint64_t number, const char* operation);
Warpgroup& this_warpgroup(const char* operation);
// Whether an address lies on a fiber's stack: a local variable of a thread.
bool is_local(const void* address);

// Remembers bytes read through the non-coherent path, to verify at the end that nobody changed them.
void note_read_only(const void* address, std::size_t bytes);

}  // namespace emulator

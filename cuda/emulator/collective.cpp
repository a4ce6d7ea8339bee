// Meeting points: warp collectives and block barriers.
#include <algorithm>
#include <bit>
#include <cstring>

#include "runtime.h"

namespace emulator {

namespace {

std::string hexadecimal(std::uint32_t mask) {
    static const char digits[] = "0123456789abcdef";
    std::string out = "0x";
    for (int shift = 28; shift >= 0; shift -= 4) out += digits[mask >> shift & 15];
    return out;
}

}  // namespace

void warp_collective(std::uint32_t mask, const char* operation, const void* in, void* out,
                     void (*compute)(const WarpExchange&)) {
    Thread& thread = this_thread();
    Warp& warp = *thread.warp;
    const unsigned lane = thread.lane();
    const std::uint32_t bit = 1u << lane;
    const auto mismatch = [&](const std::string& what) {
        raise(FaultKind::WarpMismatch,
              std::string(operation) + " with mask " + hexadecimal(mask) + " by " + describe_thread(thread) + ": " + what);
    };
    if ((mask & bit) == 0) mismatch("the calling lane " + std::to_string(lane) + " is not in the mask");
    if ((mask & ~warp.present) != 0) mismatch("the mask names lanes that do not exist in this warp");

    auto exchange = std::find_if(warp.exchanges.begin(), warp.exchanges.end(),
                                 [&](const WarpExchange& other) { return (other.mask & mask) != 0; });
    if (exchange == warp.exchanges.end()) {
        warp.exchanges.push_back({});
        exchange = std::prev(warp.exchanges.end());
        exchange->mask = mask;
        exchange->operation = operation;
    }
    if (exchange->mask != mask)
        mismatch("another lane waits in " + std::string(exchange->operation) + " with mask " +
                 hexadecimal(exchange->mask));
    if (exchange->operation != operation && std::strcmp(exchange->operation, operation) != 0)
        mismatch("another lane of the mask executes " + std::string(exchange->operation));

    exchange->in[lane] = in;
    exchange->out[lane] = out;
    exchange->arrived |= bit;
    if (exchange->arrived == mask) {
        const WarpExchange full = *exchange;
        warp.exchanges.erase(exchange);
        compute(full);
        for (unsigned other = 0; other < kWarpSize; ++other)
            if (other != lane && (mask >> other & 1) != 0) wake(warp.block->threads[warp.first_thread + other]);
        // Whoever arrives last is chance; it gets no head start over the others.
        preemption_point();
        return;
    }
    wait_for({Wait::Kind::WarpCollective, mask, 0, operation, {}});
}

void full_warp_collective(const char* operation, const void* in, void* out, void (*compute)(const WarpExchange&)) {
    warp_collective(kFullMask, operation, in, out, compute);
}

void block_barrier(unsigned id, unsigned count, bool sync, const char* operation, const std::source_location& where) {
    Thread& thread = this_thread();
    Block& block = *thread.block;
    if (id >= kNamedBarriers)
        raise(FaultKind::InvalidArgument, std::string(operation) + ": barrier " + std::to_string(id) + " is not in 0..15");
    if (id != 0 && (count == 0 || count % kWarpSize != 0))
        raise(FaultKind::InvalidArgument, std::string(operation) + ": thread count " + std::to_string(count) +
                                              " of barrier " + std::to_string(id) + " is not a multiple of 32");
    if (count > block.threads.size())
        raise(FaultKind::InvalidArgument, std::string(operation) + ": barrier " + std::to_string(id) + " wants " +
                                              std::to_string(count) + " threads, the block has " +
                                              std::to_string(block.threads.size()));
    BlockBarrier& barrier = block.barriers[id];
    const auto here = [&] { return std::string(where.file_name()) + ":" + std::to_string(where.line()); };
    if (barrier.arrived == 0) {
        barrier.expected = count;
        barrier.where = where;
    } else if (barrier.expected != count) {
        raise(FaultKind::DivergentBarrier, std::string(operation) + " at " + here() + ": barrier " + std::to_string(id) +
                                               " is used with " + std::to_string(count) + " and with " +
                                               std::to_string(barrier.expected) + " threads");
    } else if (id == 0 && (barrier.where.line() != where.line() ||
                           std::strcmp(barrier.where.file_name(), where.file_name()) != 0)) {
        // __syncthreads in divergent code is undefined even where the counts would add up.
        raise(FaultKind::DivergentBarrier, describe_thread(thread) + " is at the __syncthreads of " + here() +
                                               ", others wait at line " + std::to_string(barrier.where.line()));
    }
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        auto waiting = std::move(barrier.waiting);
        barrier.waiting.clear();
        for (Thread* other : waiting) wake(*other);
        note_progress();
        if (sync) preemption_point();
        return;
    }
    if (!sync) {
        note_progress();
        return;
    }
    barrier.waiting.push_back(&thread);
    wait_for({Wait::Kind::BlockBarrier, id, 0, operation, where});
}

}  // namespace emulator

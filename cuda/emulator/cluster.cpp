// Cluster barrier and distributed shared memory; see cluster.h and the PTX ISA, "barrier.cluster", "mapa".
#include "cluster.h"

#include "runtime.h"

namespace emulator {

namespace {

constexpr unsigned kRankShift = 24;

void complete_if_all_arrived(Cluster& cluster) {
    if (cluster.live == 0 || cluster.arrived < cluster.live) return;
    cluster.arrived = 0;
    for (Block* block : cluster.blocks)
        for (auto& thread : block->threads) thread.cluster_phase_done |= thread.at_cluster_barrier;
    auto waiting = std::move(cluster.waiting);
    cluster.waiting.clear();
    for (Thread* thread : waiting) wake(*thread);
    note_progress();
}

}  // namespace

void cluster_arrive(const char* instruction) {
    Thread& thread = this_thread();
    if (thread.at_cluster_barrier)
        raise(FaultKind::InvalidBarrier, std::string(instruction) + " by " + describe_thread(thread) +
                                             ", which has arrived and not waited yet");
    thread.at_cluster_barrier = true;
    thread.cluster_phase_done = false;
    ++thread.block->cluster->arrived;
    complete_if_all_arrived(*thread.block->cluster);
    note_progress();
    preemption_point();
}

void cluster_wait(const char* instruction) {
    Thread& thread = this_thread();
    if (!thread.at_cluster_barrier)
        raise(FaultKind::InvalidBarrier, std::string(instruction) + " by " + describe_thread(thread) + ", which has not arrived");
    while (!thread.cluster_phase_done) {
        thread.block->cluster->waiting.push_back(&thread);
        wait_for({Wait::Kind::ClusterBarrier, 0, 0, instruction, {}});
    }
    thread.at_cluster_barrier = false;
    preemption_point();
}

void cluster_thread_exited(Thread& thread) {
    Cluster& cluster = *thread.block->cluster;
    --cluster.live;
    if (thread.at_cluster_barrier && !thread.cluster_phase_done) --cluster.arrived;
    thread.at_cluster_barrier = false;
    complete_if_all_arrived(cluster);
}

std::uint32_t map_to_cluster(std::uint32_t address, std::uint32_t rank) {
    const auto& cluster = *this_thread().block->cluster;
    if (rank >= cluster.blocks.size())
        raise(FaultKind::InvalidArgument, "mapa: rank " + std::to_string(rank) + " in a cluster of " +
                                              std::to_string(cluster.blocks.size()) + " blocks");
    return (address & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

void check_running(const Block& block, const char* instruction) {
    if (block.live == 0)
        raise(FaultKind::ExitedBlock, std::string(instruction) + " accesses the shared memory of block " +
                                          std::to_string(block.rank) + " of its cluster, which has exited");
}

ClusterPlace cluster_place(std::uint32_t address, const char* instruction) {
    Block* own = this_thread().block;
    const std::uint32_t tag = address >> kRankShift;
    if (tag == 0) return {own, address};
    if (tag > own->cluster->blocks.size())
        raise(FaultKind::OutOfBounds, std::string(instruction) + ": no shared::cluster address: " + std::to_string(address));
    Block* block = own->cluster->blocks[tag - 1];
    check_running(*block, instruction);
    return {block, address & ((1u << kRankShift) - 1)};
}

unsigned char* cluster_pointer(std::uint32_t address, std::size_t bytes, std::size_t alignment, const char* instruction) {
    const auto place = cluster_place(address, instruction);
    auto* pointer = place.block->shared->resolve(place.address, bytes);
    if (pointer == nullptr)
        raise(FaultKind::OutOfBounds, std::string(instruction) + " touches " + std::to_string(bytes) +
                                          " bytes at shared address " + std::to_string(place.address) + " of block " +
                                          std::to_string(place.block->rank) + " of its cluster, outside every shared array");
    if (place.address % alignment != 0)
        raise(FaultKind::Misaligned, std::string(instruction) + " needs " + std::to_string(alignment) +
                                         "-byte alignment, shared address is " + std::to_string(place.address));
    return pointer;
}

}  // namespace emulator

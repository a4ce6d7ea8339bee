// Clusters: the barrier of all their threads, and addresses of the shared memory of other blocks.
//
// A shared::cluster address is a shared address with 1 + rank of its block in the upper 8 bits; without them it means
// the thread's own block, as every shared::cta address is a valid shared::cluster address.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Block;
struct Thread;

void cluster_arrive(const char* instruction);
void cluster_wait(const char* instruction);
// A thread ends: those that wait no longer wait for it.
void cluster_thread_exited(Thread& thread);

// mapa: the address of the same place in the block of `rank`.
std::uint32_t map_to_cluster(std::uint32_t address, std::uint32_t rank);
// The block that a shared::cluster address names and the address in it. Faults when that block has exited.
struct ClusterPlace {
    Block* block;
    std::uint32_t address;
};
ClusterPlace cluster_place(std::uint32_t address, const char* instruction);
unsigned char* cluster_pointer(std::uint32_t address, std::size_t bytes, std::size_t alignment, const char* instruction);
// Faults when `block` has exited.
void check_running(const Block& block, const char* instruction);

}  // namespace emulator

// The host interface: launch a kernel on the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

// CUDA's built-in vector type for indices, and the launch dimension with its defaults of 1.
struct uint3 {
    unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr unsigned count() const { return x * y * z; }
};

namespace emulator {

// When asynchronous copies take effect. Both extremes are legal on hardware; a correct kernel passes under both.
enum class Completion {
    Eager,  // at issue: shows buffers overwritten while still in use
    Lazy,   // as late as a wait allows, the destination being poison until then: shows missing waits
};

struct LaunchConfig {
    std::string name = "kernel";
    dim3 grid;
    dim3 block;
    unsigned cluster = 1;  // blocks of a cluster, along x
    std::size_t dynamic_shared_bytes = 0;
    Completion completion = Completion::Lazy;
    // Seed of the scheduler. Warps run by random priority with random demotions (probabilistic concurrency testing,
    // Burckhardt et al., ASPLOS 2010), so that each seed starves some warps; lanes run in random order.
    std::uint64_t seed = 1;
    // Blocks in flight at once, rounded up to whole clusters. Kernels whose blocks wait for each other need all of the grid.
    unsigned resident_blocks = 2;
    // Whether blocks wait for launches of other host threads. Waiting for memory is then no deadlock: the host thread yields,
    // and the kernel itself must give up at some time.
    bool across_devices = false;
};

struct LaunchStats {
    std::uint64_t switches = 0;   // fiber switches
    std::uint64_t deferred = 0;   // asynchronous effects applied late
};

// Runs `body` once for each thread of the grid. Throws Fault if a thread breaks a rule, if no thread can make
// progress, or if a red zone was overwritten. After a fault, objects with destructors in kernel frames are abandoned.
LaunchStats launch(const LaunchConfig& config, const std::function<void()>& body);

}  // namespace emulator

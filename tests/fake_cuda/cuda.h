// Parts of the CUDA driver API as far as the fake driver has them, and what it offers to its cuBLASLt and to tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

using CUresult = int;

// Queues `work` on the one stream, or records it.
extern "C" CUresult fake_cuda_enqueue(std::function<void()> work);

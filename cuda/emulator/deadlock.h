// Deadlock reports: which threads wait for what, and who is missing.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace emulator {

struct Block;
struct Thread;

std::string describe_deadlock(const std::string& kernel, const std::vector<std::unique_ptr<Block>>& blocks);

}  // namespace emulator

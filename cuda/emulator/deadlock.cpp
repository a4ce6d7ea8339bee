// Deadlock reports; see deadlock.h.
#include "deadlock.h"

#include <map>

#include "mbarrier_state.h"
#include "runtime.h"

namespace emulator {

namespace {

std::string place(const std::source_location& where) {
    std::string file = where.file_name();
    if (const auto slash = file.find_last_of('/'); slash != std::string::npos) file.erase(0, slash + 1);
    return file + ":" + std::to_string(where.line());
}

// "0-31, 64" from sorted thread indices.
std::string ranges(const std::vector<unsigned>& sorted) {
    std::string out;
    for (std::size_t i = 0; i < sorted.size();) {
        std::size_t j = i;
        while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
        if (!out.empty()) out += ", ";
        out += std::to_string(sorted[i]);
        if (j > i) out += "-" + std::to_string(sorted[j]);
        i = j + 1;
    }
    return out;
}

std::string describe_wait(const Block& block, const Wait& wait) {
    switch (wait.kind) {
        case Wait::Kind::BlockBarrier: {
            const auto& barrier = block.barriers[wait.id];
            return "barrier " + std::to_string(wait.id) + " (" + wait.operation + " at " + place(wait.where) + ", " +
                   std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) + " threads arrived)";
        }
        case Wait::Kind::WarpCollective: {
            std::vector<unsigned> lanes;
            for (unsigned lane = 0; lane < kWarpSize; ++lane)
                if (wait.id >> lane & 1) lanes.push_back(lane);
            return std::string("warp collective ") + wait.operation + " of lanes " + ranges(lanes);
        }
        case Wait::Kind::MemoryBarrier:
            return "mbarrier at shared address " + std::to_string(wait.id) + ", phase parity " +
                   std::to_string(wait.parity) + describe_mbarrier(block, static_cast<std::uint32_t>(wait.id));
        case Wait::Kind::ClusterBarrier:
            return std::string(wait.operation) + " (" + std::to_string(block.cluster->arrived) + " of " +
                   std::to_string(block.cluster->live) + " threads of the cluster arrived)";
        case Wait::Kind::Warpgroup: {
            const auto& group = block.warpgroups[wait.id];
            std::string out = std::string(wait.operation) + " of warpgroup " + std::to_string(wait.id) + " (executed by its warps:";
            for (const auto issued : group.issued) out += " " + std::to_string(issued);
            return out + " warpgroup instructions)";
        }
        case Wait::Kind::Polling: return std::string(wait.operation) + " polling memory";
        case Wait::Kind::None: break;
    }
    return "nothing";
}

}  // namespace

std::string describe_thread(const Thread& thread) {
    const auto triple = [](const uint3& p) {
        return "(" + std::to_string(p.x) + "," + std::to_string(p.y) + "," + std::to_string(p.z) + ")";
    };
    return "thread " + triple(thread.position) + " of block " + triple(thread.block->position);
}

std::string describe_deadlock(const std::string& kernel, const std::vector<std::unique_ptr<Block>>& blocks) {
    std::string out = "in '" + kernel + "': no thread can make progress";
    for (const auto& block : blocks) {
        out += "; block (" + std::to_string(block->position.x) + "," + std::to_string(block->position.y) + "," +
               std::to_string(block->position.z) + "):";
        std::map<std::string, std::vector<unsigned>> groups;
        for (const auto& thread : block->threads)
            groups[thread.state == ThreadState::Exited ? "exited"
                                                       : "at " + describe_wait(*block, thread.wait)]
                .push_back(thread.index);
        const char* separator = " ";
        for (const auto& [what, threads] : groups) {
            out += separator + ("threads " + ranges(threads)) + " " + what;
            separator = ", ";
        }
    }
    return out;
}

}  // namespace emulator

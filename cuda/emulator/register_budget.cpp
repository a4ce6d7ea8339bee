// The block's registers; see register_budget.h and the PTX ISA, "setmaxnreg".
#include "register_budget.h"

#include "runtime.h"

namespace emulator {

namespace {

constexpr unsigned kRegisters = 64 * 1024;
constexpr unsigned kWarpgroupThreads = 128;

struct Request {
    unsigned registers;
    bool increase;
};

void change(const WarpExchange& exchange) {
    const auto request = *static_cast<const Request*>(exchange.in[0]);
    const char* name = request.increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
    Warpgroup& group = this_warpgroup(name);
    Block& block = *this_thread().block;
    const auto number = warpgroup_issue(name, std::string(name) + " " + std::to_string(request.registers));
    warpgroup_await(number, name);
    if (group.registers == request.registers) return;  // another warp was here before
    if (group.registers != 0 && (group.registers < request.registers) != request.increase)
        raise(FaultKind::InvalidArgument, std::string(name) + " to " + std::to_string(request.registers) + " registers by " +
                                              describe_thread(this_thread()) + ", whose warpgroup has " +
                                              std::to_string(group.registers));
    // A warpgroup that has executed no setmaxnreg holds its share of all registers.
    const auto share = static_cast<unsigned>(kRegisters / block.threads.size() / 8 * 8);
    const auto others = [&] {
        unsigned sum = 0;
        for (const auto& other : block.warpgroups)
            if (&other != &group) sum += (other.registers != 0 ? other.registers : share) * kWarpgroupThreads;
        return sum;
    };
    while (others() + request.registers * kWarpgroupThreads > kRegisters && group.registers != request.registers) {
        group.waiting.push_back(&this_thread());
        const auto index = static_cast<std::uint64_t>(&group - block.warpgroups.data());
        wait_for({Wait::Kind::Warpgroup, index, 0, name, {}});
    }
    group.registers = request.registers;
    for (auto& other : block.warpgroups) {
        auto waiting = std::move(other.waiting);
        other.waiting.clear();
        for (Thread* thread : waiting) wake(*thread);
    }
}

}  // namespace

void set_register_budget(unsigned registers, bool increase) {
    const Request request{registers, increase};
    full_warp_collective(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", &request, nullptr, change);
}

}  // namespace emulator

// The scheduler: admits blocks, picks the next thread, applies deferred effects, and ends a launch.
#include "launch.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <optional>
#include <thread>

#include "bulk_store.h"
#include "cluster.h"
#include "deadlock.h"
#include "runtime.h"
#include "wgmma.h"

namespace emulator {

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kSignalStackBytes = 64 * 1024;
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr unsigned kMaxGridYz = 65535;
constexpr unsigned kMaxClusterBlocks = 8;  // portable
// Resumptions of polling threads without any progress before the launch is called dead, per polling thread.
constexpr std::uint64_t kFruitlessPolls = 256;
// Between looks at memory that another device is to write.
constexpr std::chrono::microseconds kNap{50};

// splitmix64 (Steele, Lea, Flood 2014): small, and the same on every platform.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    std::uint64_t below(std::uint64_t bound) { return next() % bound; }
    bool one_in(std::uint64_t n) { return below(n) == 0; }

private:
    std::uint64_t state_;
};

class Launch;
thread_local Launch* active = nullptr;

// Mapping stacks costs more than a small launch, so a host thread keeps the largest pool it needed.
StackPool& stacks_of_this_host_thread(std::size_t count) {
    thread_local std::unique_ptr<StackPool> pool;
    if (pool == nullptr || pool->count() < count) pool = std::make_unique<StackPool>(count, kStackBytes);
    return *pool;
}

class Launch {
public:
    Launch(const LaunchConfig& config, const std::function<void()>& body)
        : config_(config),
          body_(body),
          random_(config.seed),
          // Whole clusters.
          resident_((std::min<unsigned>(config.resident_blocks, config.grid.count()) + config.cluster - 1) / config.cluster *
                    config.cluster),
          stacks_(stacks_of_this_host_thread(static_cast<std::size_t>(resident_) * config.block.count())) {
        for (unsigned i = 0; i < resident_; ++i)
            shared_.push_back(std::make_unique<SharedMemory>(config.dynamic_shared_bytes));
        order_.resize(config.grid.count() / config.cluster);
        for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<unsigned>(i);
        for (std::size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random_.below(i)]);
    }

    LaunchStats run();

    // Called on fibers.
    void suspend() { ExecutionContext::transfer(current_->context, scheduler_); }
    [[noreturn]] void stop(FaultKind kind, const std::string& message) {
        fault_.emplace(kind, message);
        for (;;) suspend();
    }
    void thread_main();
    void segmentation_fault(void* address) {
        crash_address_ = address;
        for (;;) suspend();
    }

    Thread* current() const { return current_; }
    const LaunchConfig& config() const { return config_; }
    void preemption_point();
    void note_progress() { fruitless_polls_ = 0; }
    // A warp that gained a lane may now be the one to run.
    void note_ready(const Warp& warp) {
        if (favourite_ != nullptr && warp.priority > favourite_->priority) favourite_ = nullptr;
    }
    void start_async(std::function<void()> effect) { current_->block->deferred.push_back(std::move(effect)); }
    void note_read_only(const void* address, std::size_t bytes);
    bool is_local(const void* address) const { return stacks_.contains(address); }

private:
    void admit(std::size_t first_slot);
    void admit_block(Cluster& cluster, unsigned linear, std::size_t slot);
    void finish(Block& block);
    void demote(Warp& warp);
    Thread* pick_ready();
    Thread* pick_polling();
    Thread* take(Warp& warp, std::uint32_t lanes);
    bool apply_deferred();
    void wait_for_other_devices() const;
    void resume(Thread& thread);
    std::string crash_message(const Thread& thread) const;

    const LaunchConfig& config_;
    const std::function<void()>& body_;
    Random random_;
    unsigned resident_;
    StackPool& stacks_;
    std::vector<std::unique_ptr<SharedMemory>> shared_;
    std::vector<unsigned> order_;  // clusters in order of admission
    std::size_t admitted_ = 0;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::vector<std::unique_ptr<Cluster>> clusters_;
    ExecutionContext scheduler_;
    Thread* current_ = nullptr;
    Warp* favourite_ = nullptr;  // the ready warp of highest priority, if known
    std::optional<Fault> fault_;
    void* crash_address_ = nullptr;
    std::uint64_t fruitless_polls_ = 0;
    std::uint64_t demotions_ = 0;
    std::unordered_map<const void*, std::vector<unsigned char>> read_only_;
    LaunchStats stats_;
};

// While a launch runs on a host thread, segmentation faults of its kernels (guard pages, wild pointers) become faults of
// the launch. The handler is the process's and stays; faults outside a kernel go on to whoever handled them before.
class SegmentationFaultHandler {
public:
    SegmentationFaultHandler() : stack_(kSignalStackBytes) {
        static const struct sigaction previous = install();
        (void)previous;
        stack_t stack{};
        stack.ss_sp = stack_.data();
        stack.ss_size = stack_.size();
        sigaltstack(&stack, &old_stack_);
    }
    ~SegmentationFaultHandler() { sigaltstack(&old_stack_, nullptr); }

private:
    static struct sigaction& previous_action() {
        static struct sigaction action {};
        return action;
    }
    static struct sigaction install() {
        struct sigaction action {};
        action.sa_sigaction = [](int signal_number, siginfo_t* info, void* context) {
            // Switches away from the signal stack for good; the faulting fiber is never resumed.
            if (active != nullptr && active->current() != nullptr) active->segmentation_fault(info->si_addr);
            const auto& before = previous_action();
            if ((before.sa_flags & SA_SIGINFO) != 0)
                before.sa_sigaction(signal_number, info, context);
            else
                signal(SIGSEGV, SIG_DFL);
        };
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &previous_action());
        return previous_action();
    }

    std::vector<unsigned char> stack_;
    stack_t old_stack_{};
};

void Launch::thread_main() {
    try {
        body_();
    } catch (const std::exception& error) {
        stop(FaultKind::KernelException, describe_thread(*current_) + " threw: " + error.what());
    } catch (...) {
        stop(FaultKind::KernelException, describe_thread(*current_) + " threw");
    }
    Thread& thread = *current_;
    finish_bulk_stores(thread);
    finish_wgmma(thread);
    thread.state = ThreadState::Exited;
    --thread.block->live;
    cluster_thread_exited(thread);
    note_progress();
    for (;;) suspend();
}

// Admits the next cluster to the slots from `first_slot` on.
void Launch::admit(std::size_t first_slot) {
    const unsigned linear = order_[admitted_++];
    auto cluster = std::make_unique<Cluster>();
    cluster->running = config_.cluster;
    cluster->live = config_.cluster * config_.block.count();
    for (unsigned rank = 0; rank < config_.cluster; ++rank)
        admit_block(*cluster, linear * config_.cluster + rank, first_slot + rank);
    clusters_.push_back(std::move(cluster));
}

void Launch::admit_block(Cluster& cluster, unsigned linear, std::size_t slot) {
    auto block = std::make_unique<Block>();
    block->slot = slot;
    block->cluster = &cluster;
    block->rank = static_cast<unsigned>(cluster.blocks.size());
    cluster.blocks.push_back(block.get());
    block->position = {linear % config_.grid.x, linear / config_.grid.x % config_.grid.y,
                       linear / config_.grid.x / config_.grid.y};
    block->shared = shared_[slot].get();
    block->shared->reset();
    const unsigned count = config_.block.count();
    block->live = count;
    block->threads.resize(count);
    block->warps.resize((count + kWarpSize - 1) / kWarpSize);
    block->warpgroups.resize(count / (4 * kWarpSize));
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = block->threads[i];
        Warp& warp = block->warps[i / kWarpSize];
        thread.block = block.get();
        thread.warp = &warp;
        thread.index = i;
        thread.position = {i % config_.block.x, i / config_.block.x % config_.block.y,
                           i / config_.block.x / config_.block.y};
        thread.context.prepare(
            stacks_.stack(slot * count + i), kStackBytes, [](void* launch) { static_cast<Launch*>(launch)->thread_main(); },
            this);
        warp.present |= 1u << thread.lane();
    }
    for (unsigned w = 0; w < block->warps.size(); ++w) {
        Warp& warp = block->warps[w];
        warp.block = block.get();
        warp.first_thread = w * kWarpSize;
        warp.ready = warp.present;
        warp.priority = random_.next() >> 1;  // above every demoted priority
        warp.priority |= std::uint64_t{1} << 63;
    }
    blocks_.push_back(std::move(block));
}

void Launch::finish(Block& block) {
    // Effects nobody waited for still land before the block's memory is given up.
    for (auto& effect : block.deferred) effect();
    block.deferred.clear();
    if (const auto address = block.shared->damage())
        throw Fault(FaultKind::OutOfBounds, "in '" + config_.name + "': red zone of shared memory overwritten at shared address " +
                                                std::to_string(*address) + " (dynamic region: " +
                                                std::to_string(kSharedBase) + " to " +
                                                std::to_string(kSharedBase + config_.dynamic_shared_bytes) + ")");
    if (block.launched_dependents && !block.waited_for_grids)
        throw Fault(FaultKind::InvalidArgument,
                    "in '" + config_.name + "': griddepcontrol.launch_dependents without griddepcontrol.wait: a grid could start "
                    "before the grid before this one has finished");
}

// A change point: this warp now yields to all others until they are stuck or demoted themselves.
void Launch::demote(Warp& warp) {
    favourite_ = nullptr;
    warp.priority = (std::uint64_t{1} << 62) - ++demotions_;
}

void Launch::preemption_point() {
    if (!random_.one_in(4)) return;
    // Without a demotion only the other lanes of the warp, or a warp just woken, could get in between.
    if (random_.one_in(2)) demote(*current_->warp);
    suspend();
}

Thread* Launch::take(Warp& warp, std::uint32_t lanes) {
    const auto start = static_cast<unsigned>(random_.below(kWarpSize));
    const std::uint32_t rotated = std::rotr(lanes, static_cast<int>(start));
    const unsigned lane = (static_cast<unsigned>(std::countr_zero(rotated)) + start) % kWarpSize;
    return &warp.block->threads[warp.first_thread + lane];
}

Thread* Launch::pick_ready() {
    Warp* best = favourite_ != nullptr && favourite_->ready != 0 ? favourite_ : nullptr;
    if (best == nullptr) {
        for (auto& block : blocks_)
            for (auto& warp : block->warps)
                if (warp.ready != 0 && (best == nullptr || warp.priority > best->priority)) best = &warp;
        if (best == nullptr) return nullptr;
        favourite_ = best;
    }
    if (random_.one_in(256)) demote(*best);
    return take(*best, best->ready);
}

Thread* Launch::pick_polling() {
    std::vector<Warp*> warps;
    for (auto& block : blocks_)
        for (auto& warp : block->warps)
            if (warp.polling != 0) warps.push_back(&warp);
    if (warps.empty()) return nullptr;
    Warp& warp = *warps[random_.below(warps.size())];
    return take(warp, warp.polling);
}

bool Launch::apply_deferred() {
    std::vector<Block*> candidates;
    for (auto& block : blocks_)
        if (!block->deferred.empty()) candidates.push_back(block.get());
    if (candidates.empty()) return false;
    Block& block = *candidates[random_.below(candidates.size())];
    const auto index = static_cast<std::ptrdiff_t>(random_.below(block.deferred.size()));
    auto effect = std::move(block.deferred[static_cast<std::size_t>(index)]);
    block.deferred.erase(block.deferred.begin() + index);
    effect();
    ++stats_.deferred;
    note_progress();
    return true;
}

// Every thread that polls has looked in vain: lets other host threads run, and sleeps once that has not helped for a while.
void Launch::wait_for_other_devices() const {
    if (!config_.across_devices) return;
    if (fruitless_polls_ < kFruitlessPolls)
        std::this_thread::yield();
    else
        std::this_thread::sleep_for(kNap);
}

void Launch::resume(Thread& thread) {
    const std::uint32_t bit = 1u << thread.lane();
    thread.warp->polling &= ~bit;
    thread.warp->ready |= bit;
    note_ready(*thread.warp);
    thread.state = ThreadState::Ready;
    current_ = &thread;
    ++stats_.switches;
    ExecutionContext::transfer(scheduler_, thread.context);
    if (crash_address_ != nullptr || fault_) {
        const Fault fault = fault_ ? *fault_ : Fault(FaultKind::OutOfBounds, crash_message(thread));
        current_ = nullptr;
        throw Fault(fault.kind(), "in '" + config_.name + "': " +
                                      std::string(fault.what()).substr(std::string(name_of(fault.kind())).size() + 2));
    }
    current_ = nullptr;
    if (thread.state != ThreadState::Ready) thread.warp->ready &= ~bit;
    if (thread.state == ThreadState::Polling) thread.warp->polling |= bit;
}

std::string Launch::crash_message(const Thread& thread) const {
    if (stacks_.overflowed(crash_address_)) return describe_thread(thread) + " overflowed its stack of 128 KiB";
    for (const auto& shared : shared_)
        if (shared->near(crash_address_))
            return describe_thread(thread) + " accessed shared memory out of bounds at shared address " +
                   std::to_string(static_cast<std::int64_t>(static_cast<std::int32_t>(shared->address_of(crash_address_))));
    return describe_thread(thread) + " accessed " + describe_global(crash_address_);
}

void Launch::note_read_only(const void* address, std::size_t bytes) {
    auto& seen = read_only_[address];
    if (seen.size() >= bytes) return;
    const auto* p = static_cast<const unsigned char*>(address);
    seen.assign(p, p + bytes);
}

LaunchStats Launch::run() {
    SegmentationFaultHandler handler;
    for (unsigned slot = 0; slot < resident_; slot += config_.cluster) admit(slot);
    while (!blocks_.empty()) {
        Thread* thread = nullptr;
        if (random_.one_in(16)) thread = pick_polling();
        if (thread == nullptr) thread = pick_ready();
        if (thread == nullptr) {
            if (apply_deferred()) continue;
            thread = pick_polling();
            std::uint64_t polling = 0;
            for (const auto& block : blocks_)
                for (const auto& warp : block->warps) polling += static_cast<unsigned>(std::popcount(warp.polling));
            if (thread == nullptr || (++fruitless_polls_ > kFruitlessPolls * polling && !config_.across_devices))
                throw Fault(FaultKind::Deadlock, describe_deadlock(config_.name, blocks_));
            if (fruitless_polls_ % polling == 0) wait_for_other_devices();
        }
        Block& block = *thread->block;
        resume(*thread);
        if (block.live == 0) {
            finish(block);
            favourite_ = nullptr;
            Cluster* cluster = block.cluster;
            if (--cluster->running != 0) continue;
            const std::size_t slot = cluster->blocks.front()->slot;
            std::erase_if(blocks_, [&](const auto& candidate) { return candidate->cluster == cluster; });
            std::erase_if(clusters_, [&](const auto& candidate) { return candidate.get() == cluster; });
            if (admitted_ < order_.size()) admit(slot);
        }
    }
    if (auto damage = damaged_global_memory(); !damage.empty())
        throw Fault(FaultKind::OutOfBounds, "in '" + config_.name + "': " + damage);
    for (const auto& [address, bytes] : read_only_)
        if (std::memcmp(address, bytes.data(), bytes.size()) != 0)
            throw Fault(FaultKind::ReadOnlyViolated, "in '" + config_.name + "': " + describe_global(address) +
                                                         " was read as read-only data and changed during the kernel");
    return stats_;
}

}  // namespace

Thread& this_thread() {
    if (!in_kernel()) throw Fault(FaultKind::InvalidArgument, "a device function was called outside a kernel");
    return *active->current();
}

const LaunchConfig& launch_config() { return active->config(); }
bool in_kernel() { return active != nullptr && active->current() != nullptr; }

void raise(FaultKind kind, const std::string& message) {
    if (in_kernel()) active->stop(kind, message);
    throw Fault(kind, message);
}

void wait_for(const Wait& wait) {
    Thread& thread = this_thread();
    thread.state = ThreadState::Waiting;
    thread.wait = wait;
    active->suspend();
}

void wake(Thread& thread) {
    thread.state = ThreadState::Ready;
    thread.wait = Wait{};
    thread.warp->ready |= 1u << thread.lane();
    active->note_ready(*thread.warp);
    note_progress();
}

void poll(const Wait& wait) {
    Thread& thread = this_thread();
    thread.state = ThreadState::Polling;
    thread.wait = wait;
    active->suspend();
}

void preemption_point() { active->preemption_point(); }

void note_progress() { active->note_progress(); }

void start_async(std::function<void()> effect) {
    if (launch_config().completion == Completion::Eager)
        effect();
    else
        active->start_async(std::move(effect));
}

void note_read_only(const void* address, std::size_t bytes) { active->note_read_only(address, bytes); }
bool is_local(const void* address) { return active->is_local(address); }

LaunchStats launch(const LaunchConfig& config, const std::function<void()>& body) {
    if (active != nullptr) throw Fault(FaultKind::InvalidArgument, "a launch inside a kernel");
    const auto fail = [&](const std::string& what) {
        throw Fault(FaultKind::InvalidArgument, "launch of '" + config.name + "': " + what);
    };
    const unsigned threads = config.block.count();
    if (threads == 0 || threads > kMaxThreadsPerBlock)
        fail(std::to_string(threads) + " threads in a block; 1 to 1024 are possible");
    if (config.grid.count() == 0) fail("the grid is empty");
    if (config.grid.y > kMaxGridYz || config.grid.z > kMaxGridYz)
        fail(std::to_string(std::max(config.grid.y, config.grid.z)) + " blocks along y or z; at most 65535 are possible");
    if (config.cluster == 0 || config.cluster > kMaxClusterBlocks || config.grid.x % config.cluster != 0)
        fail("clusters of " + std::to_string(config.cluster) + " blocks in a grid of " + std::to_string(config.grid.x) +
             " along x; 1 to 8 blocks that divide the grid are possible");
    if (config.resident_blocks == 0) fail("resident_blocks is 0; at least one block must be in flight");
    if (config.dynamic_shared_bytes > kMaxSharedBytes)
        fail(std::to_string(config.dynamic_shared_bytes) + " bytes of shared memory; at most 232448 are possible");
    Launch launch(config, body);
    active = &launch;
    struct Reset {
        ~Reset() { active = nullptr; }
    } reset;
    return launch.run();
}

}  // namespace emulator

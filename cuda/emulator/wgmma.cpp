// Warpgroup products; see wgmma.h and the PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#include "wgmma.h"

#include <algorithm>
#include <array>

#include "cuda_language.h"
#include "matrix_descriptor.h"

namespace emulator {

namespace {

constexpr int kMaxDepth = 32;
// Registers in flight hold a signalling NaN: read, it spreads as a NaN; written back after arithmetic, it is quiet.
constexpr std::uint32_t kInFlight = 0x7fa5a5a5u;

// The accumulators of a warp while operations on them are in flight. `values` holds what the registers hold once the
// operations applied so far are counted in; the registers themselves hold kInFlight.
struct Accumulators {
    std::array<float*, kWarpSize> registers;
    unsigned count;
    std::vector<float> values;  // [lane][register]
    unsigned pending = 0;
};

struct Operation {
    WgmmaOperands operands;                // of lane 0
    std::vector<std::uint32_t> a;          // [lane][4], if A comes from registers
    std::shared_ptr<Accumulators> target;  // nullptr once computed (eager)
    std::uint64_t number;
};

// Contents of accumulators as wgmma left them; changing them needs a wgmma.fence before the next use.
struct Seen {
    const void* registers;
    std::vector<std::uint32_t> bits;
};

}  // namespace

struct WgmmaQueue {
    bool fenced = false;
    std::vector<Operation> open;
    std::deque<std::vector<Operation>> groups;
    std::vector<std::shared_ptr<Accumulators>> in_flight;
    std::vector<Seen> seen;  // since the last wgmma.fence
};

namespace {

WgmmaQueue& queue_of(Warp& warp) {
    if (warp.wgmma == nullptr) warp.wgmma = std::make_shared<WgmmaQueue>();
    return *warp.wgmma;
}

[[noreturn]] void mismatch(const std::string& what) {
    raise(FaultKind::WarpgroupMismatch, "wgmma by " + describe_thread(this_thread()) + ": " + what);
}

float decode(WgmmaElement element, const unsigned char* bytes) {
    if (element == WgmmaElement::E4m3) return e4m3_to_float(*bytes);
    std::uint16_t bits;
    std::memcpy(&bits, bytes, 2);
    return element == WgmmaElement::Bf16 ? bf16_to_float(bits) : half_to_float(bits);
}

// out[row][depth]: `rows` (a multiple of 8) rows of the matrix from row `first` on.
void fetch(Block& block, const MatrixDescriptor& matrix, bool mn_major, WgmmaElement element, unsigned first, unsigned rows,
           unsigned depth, float* out) {
    const unsigned size = element == WgmmaElement::E4m3 ? 1 : 2, per_chunk = 16 / size;
    const auto chunk_at = [&](std::uint32_t address) {
        const auto* bytes = block.shared->resolve_async(address, 16);
        if (bytes == nullptr)
            raise(FaultKind::OutOfBounds, "wgmma reads 16 bytes at shared address " + std::to_string(address) +
                                              ", outside every shared array");
        return bytes;
    };
    if (mn_major) {
        for (unsigned row = 0; row < rows; row += per_chunk)
            for (unsigned k = 0; k < depth; ++k) {
                const auto* chunk = chunk_at(matrix.mn_major_chunk((first + row) / per_chunk, k));
                for (unsigned e = 0; e < per_chunk; ++e) out[(row + e) * depth + k] = decode(element, chunk + e * size);
            }
    } else {
        for (unsigned row = 0; row < rows; ++row)
            for (unsigned k = 0; k < depth; k += per_chunk) {
                const auto* chunk = chunk_at(matrix.k_major_chunk(first + row, k / per_chunk));
                for (unsigned e = 0; e < per_chunk; ++e) out[row * depth + k + e] = decode(element, chunk + e * size);
            }
    }
}

// The fragment of A in registers: lane l holds rows l / 4 and l / 4 + 8, as in mma.sync.
void unpack_fragment(const std::vector<std::uint32_t>& registers, WgmmaElement element, unsigned depth, float* out) {
    const unsigned per_register = element == WgmmaElement::E4m3 ? 4 : 2, size = 4 / per_register;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        for (unsigned i = 0; i < 4; ++i)
            for (unsigned e = 0; e < per_register; ++e) {
                unsigned char bytes[4];
                std::memcpy(bytes, &registers[lane * 4 + i], 4);
                const unsigned row = lane / 4 + (i & 1) * 8, column = lane % 4 * per_register + e + (i >> 1) * (depth / 2);
                out[row * depth + column] = decode(element, bytes + e * size);
            }
}

// values[lane][register] += A * B for the 16 rows of warp `warp_in_group`. Exact products, summed in f64 over the depth
// of the instruction and rounded once; the hardware's order and rounding are not documented.
void compute(Block& block, const Operation& operation, unsigned warp_in_group, std::vector<float>& values) {
    const auto& operands = operation.operands;
    const unsigned depth = operands.element == WgmmaElement::E4m3 ? 32 : 16, count = operands.n / 2u;
    float a[16 * kMaxDepth], b[8 * kMaxDepth];
    if (operands.a_registers != nullptr)
        unpack_fragment(operation.a, operands.element, depth, a);
    else
        fetch(block, MatrixDescriptor::decode(operands.a), operands.a_mn_major, operands.element, warp_in_group * 16, 16,
              depth, a);
    const auto descriptor = MatrixDescriptor::decode(operands.b);
    for (unsigned column = 0; column < operands.n; column += 8) {
        fetch(block, descriptor, operands.b_mn_major, operands.element, column, 8, depth, b);
        double sum[16][8];
        const auto value = [&](unsigned row, unsigned j) -> float& {
            return values[(row % 8 * 4 + j / 2) * count + column / 2 + row / 8 * 2 + j % 2];
        };
        for (unsigned row = 0; row < 16; ++row)
            for (unsigned j = 0; j < 8; ++j) sum[row][j] = operands.accumulate ? value(row, j) : 0.0;
        multiply_add_16x8(a, b, static_cast<int>(depth), sum);
        for (unsigned row = 0; row < 16; ++row)
            for (unsigned j = 0; j < 8; ++j) value(row, j) = static_cast<float>(sum[row][j]);
    }
}

std::vector<float> gather(const std::array<float*, kWarpSize>& registers, unsigned count) {
    std::vector<float> values(kWarpSize * count);
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        std::memcpy(&values[lane * count], registers[lane], count * sizeof(float));
    return values;
}

void scatter(const std::array<float*, kWarpSize>& registers, unsigned count, const std::vector<float>& values) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        std::memcpy(registers[lane], &values[lane * count], count * sizeof(float));
}

std::vector<std::uint32_t> bits_of(const std::vector<float>& values) {
    std::vector<std::uint32_t> bits(values.size());
    std::memcpy(bits.data(), values.data(), values.size() * sizeof(float));
    return bits;
}

void remember(WgmmaQueue& queue, const void* registers, std::vector<std::uint32_t> bits) {
    std::erase_if(queue.seen, [&](const Seen& seen) { return seen.registers == registers; });
    queue.seen.push_back({registers, std::move(bits)});
}

void check_unchanged(const WgmmaQueue& queue, const void* registers, const std::vector<std::uint32_t>& bits) {
    for (const auto& seen : queue.seen)
        if (seen.registers == registers && seen.bits != bits)
            mismatch("the accumulators changed since the last wgmma without a wgmma.fence");
}

void apply(Warp& warp, Operation& operation) {
    if (operation.target == nullptr) return;
    auto& queue = *warp.wgmma;
    Accumulators& target = *operation.target;
    compute(*warp.block, operation, warp.first_thread / kWarpSize % 4, target.values);
    if (--target.pending != 0) return;
    for (const auto bits : bits_of(gather(target.registers, target.count)))
        if (bits != kInFlight) mismatch("accumulator registers were written while a wgmma on them was in flight");
    scatter(target.registers, target.count, target.values);
    remember(queue, target.registers[0], bits_of(target.values));
    std::erase(queue.in_flight, operation.target);
}

std::string signature(const WgmmaOperands& o) {
    static const char* const elements[] = {"bf16", "f16", "e4m3"};
    return std::string("wgmma ") + elements[static_cast<int>(o.element)] + " n" + std::to_string(o.n) +
           (o.a_registers != nullptr ? " A in registers" : " A " + std::to_string(o.a)) + (o.a_mn_major ? " transposed" : "") + " B " +
           std::to_string(o.b) + (o.b_mn_major ? " transposed" : "") + (o.accumulate ? " added" : "");
}

bool same(const WgmmaOperands& x, const WgmmaOperands& y) {
    return x.element == y.element && x.n == y.n && x.a_mn_major == y.a_mn_major && x.b_mn_major == y.b_mn_major &&
           (x.a_registers != nullptr) == (y.a_registers != nullptr) && (x.a_registers != nullptr || x.a == y.a) && x.b == y.b &&
           x.accumulate == y.accumulate;
}

void issue(const WarpExchange& exchange) {
    const auto operands_of = [&](unsigned lane) -> const WgmmaOperands& {
        return *static_cast<const WgmmaOperands*>(exchange.in[lane]);
    };
    Warp& warp = *this_thread().warp;
    WgmmaQueue& queue = queue_of(warp);
    Operation operation{operands_of(0), {}, nullptr, 0};
    const auto& operands = operation.operands;
    for (unsigned lane = 1; lane < kWarpSize; ++lane)
        if (!same(operands, operands_of(lane))) mismatch("the lanes of the warp give different operands");
    MatrixDescriptor::check(operands.b);
    if (operands.a_registers == nullptr) MatrixDescriptor::check(operands.a);
    operation.number = warpgroup_issue("wgmma.mma_async", signature(operands));
    if (!queue.fenced) mismatch("no wgmma.fence before the first wgmma");

    if (operands.a_registers != nullptr)
        for (unsigned lane = 0; lane < kWarpSize; ++lane)
            operation.a.insert(operation.a.end(), operands_of(lane).a_registers, operands_of(lane).a_registers + 4);
    std::array<float*, kWarpSize> registers;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) registers[lane] = operands_of(lane).d;
    const unsigned count = operands.n / 2u;
    const auto found = std::find_if(queue.in_flight.begin(), queue.in_flight.end(),
                                    [&](const auto& target) { return target->registers[0] == registers[0]; });
    if (found != queue.in_flight.end()) {
        if ((*found)->count != count) mismatch("the same accumulators with another shape while in flight");
        operation.target = *found;
    } else {
        auto values = gather(registers, count);
        check_unchanged(queue, registers[0], bits_of(values));
        operation.target = std::make_shared<Accumulators>(Accumulators{registers, count, std::move(values)});
        queue.in_flight.push_back(operation.target);
        for (float* r : registers)
            for (unsigned i = 0; i < count; ++i) std::memcpy(r + i, &kInFlight, sizeof kInFlight);
    }
    ++operation.target->pending;
    if (launch_config().completion == Completion::Eager) {
        apply(warp, operation);
        operation.target = nullptr;
    }
    queue.open.push_back(std::move(operation));
}

void commit(const WarpExchange&) {
    auto& queue = queue_of(*this_thread().warp);
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
}

void wait(const WarpExchange& exchange) {
    Warp& warp = *this_thread().warp;
    auto& queue = queue_of(warp);
    const auto pending = *static_cast<const std::uint32_t*>(exchange.in[0]);
    while (queue.groups.size() > pending) {
        for (auto& operation : queue.groups.front()) {
            warpgroup_await(operation.number, "wgmma.wait_group");
            apply(warp, operation);
        }
        queue.groups.pop_front();
    }
}

}  // namespace

void wgmma_issue(const WgmmaOperands& operands) {
    full_warp_collective("wgmma.mma_async", &operands, nullptr, issue);
    preemption_point();
}

void wgmma_fence_registers() {
    full_warp_collective("wgmma.fence", nullptr, nullptr, [](const WarpExchange&) {
        auto& queue = queue_of(*this_thread().warp);
        queue.fenced = true;
        queue.seen.clear();
    });
}

void wgmma_commit() { full_warp_collective("wgmma.commit_group", nullptr, nullptr, commit); }

void wgmma_wait(std::uint32_t pending) { full_warp_collective("wgmma.wait_group", &pending, nullptr, wait); }

void finish_wgmma(Thread& thread) {
    const auto* queue = thread.warp->wgmma.get();
    if (queue != nullptr && (!queue->open.empty() || !queue->groups.empty()))
        mismatch("the thread exits with a wgmma in flight; wait for its group first");
}

}  // namespace emulator

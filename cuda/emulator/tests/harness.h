// A small test harness: named tests, checks that say where and why, and launches under every schedule.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "../cuda_language.h"

namespace harness {

struct Test {
    const char* name;
    void (*body)();
};
inline std::vector<Test>& tests() {
    static std::vector<Test> list;
    return list;
}
struct Registration {
    Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

struct CheckFailed {
    std::string message;
};

#define TEST(name)                                                  \
    static void name();                                             \
    static const ::harness::Registration name##_registered(#name, name); \
    static void name()

#define CHECK(condition)                                                                                    \
    do {                                                                                                    \
        if (!(condition))                                                                                   \
            throw ::harness::CheckFailed{std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + #condition}; \
    } while (false)

// Runs all tests of the program; prints "PROGRAM: N passed, N failed".
inline int run_all(const char* program) {
    int passed = 0, failed = 0;
    for (const auto& test : tests()) {
        std::string problem;
        try {
            test.body();
        } catch (const CheckFailed& failure) {
            problem = failure.message;
        } catch (const std::exception& error) {
            problem = error.what();
        }
        if (problem.empty()) {
            ++passed;
        } else {
            ++failed;
            std::printf("  %s failed: %s\n", test.name, problem.c_str());
        }
    }
    const std::string path = program;
    std::printf("%s: %d passed, %d failed\n", path.substr(path.find_last_of('/') + 1).c_str(), passed, failed);
    return failed == 0 ? 0 : 1;
}

inline constexpr std::uint64_t kSeeds[] = {1, 2, 3, 4, 5};

// Calls run(config) under both completion modes and all seeds.
inline void under_all_schedules(emulator::LaunchConfig config,
                                const std::function<void(const emulator::LaunchConfig&)>& run) {
    for (auto completion : {emulator::Completion::Eager, emulator::Completion::Lazy})
        for (auto seed : kSeeds) {
            config.completion = completion;
            config.seed = seed;
            run(config);
        }
}

// The fault `run` raises, as "kind: message"; an empty string if it raises none.
inline std::string fault_of(const std::function<void()>& run) {
    try {
        run();
    } catch (const emulator::Fault& fault) {
        return fault.what();
    }
    return {};
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Deterministic values in [-1, 1).
class Values {
public:
    explicit Values(std::uint32_t seed) : state_(seed * 2654435761u + 1) {}
    std::uint32_t bits() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 17;
        return state_ ^= state_ << 5;
    }
    float next() { return static_cast<float>(static_cast<std::int32_t>(bits())) * 0x1p-31f; }

private:
    std::uint32_t state_;
};

}  // namespace harness

#define TEST_MAIN \
    int main(int, char** argv) { return ::harness::run_all(argv[0]); }

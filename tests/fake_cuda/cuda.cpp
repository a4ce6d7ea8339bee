// A CUDA driver without a device, as libcuda.so.1. It is as late as the real one may be: work that is queued on the stream
// runs when somebody waits for it, host memory is read and written only then, and it is strict: copies take page-locked
// memory only, every call needs a current context, and a recording is spoilt by whatever must not be recorded.
//
// FAKE_CUDA_* variables make it fail. Kernels do nothing, unless the test hands in the emulator.
#include "cuda.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

enum : CUresult {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNoDevice = 100,
    kInvalidDevice = 101,
    kInvalidContext = 201,
    kNotFound = 500,
    kIllegalAddress = 700,
    kPeerAccessAlreadyEnabled = 704,
    kCaptureUnsupported = 900,
    kCaptureInvalidated = 901,
};

long setting(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr ? otherwise : std::strtol(text, nullptr, 10);
}

// The emulator's entry points (cuda/emulator/interface.h).
struct RawLaunch {
    const char* kernel;
    const void* params;
    uint64_t params_bytes;
    uint64_t seed;
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    uint32_t eager;
    uint32_t resident_blocks;
    uint32_t across_devices;
};
using EmulatedLaunch = int (*)(const RawLaunch*, char*, size_t);
using EmulatedAllocate = void* (*)(const char*, uint64_t);
using EmulatedFree = void (*)(void*);
EmulatedLaunch emulated_launch = nullptr;
EmulatedAllocate emulated_allocate = nullptr;
EmulatedFree emulated_free = nullptr;

struct Function {
    std::string name;
    size_t params_bytes;
};

struct Graph {
    std::vector<std::function<void()>> work;
};

struct Event {
    uint64_t position = 0;
};

struct Driver {
    std::recursive_mutex mutex;
    std::map<std::string, size_t> kernels;  // parameter bytes
    std::map<std::string, std::unique_ptr<Function>> functions;
    std::map<uint64_t, size_t> memory, pinned;
    std::deque<std::function<void()>> queue;
    uint64_t queued = 0, done = 0;
    bool capturing = false, spoilt = false;
    std::vector<std::function<void()>> recording;
    CUresult sticky = kSuccess;
    size_t used = 0, total = 0;
    long objects = 0;  // contexts, streams, modules, events, graphs

    Driver() {
        total = static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 16l << 30));
        used = static_cast<size_t>(setting("FAKE_CUDA_USED", 0));
        if (const char* path = std::getenv("FAKE_CUDA_KERNELS")) {
            if (FILE* file = std::fopen(path, "r")) {
                char name[256];
                size_t bytes;
                while (std::fscanf(file, "%255s %zu", name, &bytes) == 2) kernels[name] = bytes;
                std::fclose(file);
            }
        }
    }

    void run_until(uint64_t position) {
        while (done < position && !queue.empty()) {
            auto work = std::move(queue.front());
            queue.pop_front();
            ++done;
            if (sticky == kSuccess) work();
        }
    }
};

Driver& driver() {
    static Driver* one = new Driver;
    return *one;
}

thread_local bool context_is_current = false;

using Guard = std::lock_guard<std::recursive_mutex>;

// What every call that needs a context begins with.
CUresult enter() {
    if (!context_is_current) return kInvalidContext;
    return driver().sticky;
}

CUresult enqueue(std::function<void()> work) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (CUresult status = enter()) return status;
    if (d.capturing) {
        d.recording.push_back(std::move(work));
        return kSuccess;
    }
    d.queue.push_back(std::move(work));
    ++d.queued;
    return kSuccess;
}

// A call that waits spoils a recording.
CUresult wait_for(uint64_t position) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (CUresult status = enter()) return status;
    if (d.capturing) {
        d.spoilt = true;
        return kCaptureUnsupported;
    }
    d.run_until(position);
    return d.sticky;
}

bool contains(const std::map<uint64_t, size_t>& ranges, const void* start, size_t bytes) {
    const uint64_t address = reinterpret_cast<uint64_t>(start);
    auto after = ranges.upper_bound(address);
    if (after == ranges.begin()) return false;
    --after;
    return address + bytes <= after->first + after->second;
}

void launch(const Function* function, const std::vector<uint64_t>& params, const RawLaunch& geometry) {
    const char* fault = std::getenv("FAKE_CUDA_FAULT");
    if (fault != nullptr && function->name == fault) {
        driver().sticky = kIllegalAddress;
        return;
    }
    if (emulated_launch == nullptr) return;
    RawLaunch launch = geometry;
    launch.kernel = function->name.c_str();
    launch.params = params.data();
    launch.params_bytes = function->params_bytes;
    char message[4096] = {};
    if (emulated_launch(&launch, message, sizeof message) != 0) {
        std::fprintf(stderr, "fake libcuda: %s: %s\n", function->name.c_str(), message);
        driver().sticky = kIllegalAddress;
    }
}

CUresult launch_kernel(void* f, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared, void** arguments,
                       bool cooperative) {
    if (f == nullptr || arguments == nullptr) return kInvalidValue;
    const unsigned blocks = grid[0] * grid[1] * grid[2], threads = block[0] * block[1] * block[2];
    if (blocks == 0 || threads == 0 || threads > 1024 || shared > 227 * 1024) return kInvalidValue;
    const Function* function = static_cast<Function*>(f);
    std::vector<uint64_t> params((function->params_bytes + 7) / 8);
    std::memcpy(params.data(), arguments[0], function->params_bytes);
    RawLaunch geometry = {};
    std::memcpy(geometry.grid, grid, sizeof grid);
    std::memcpy(geometry.block, block, sizeof block);
    geometry.shared_bytes = shared;
    geometry.seed = 1;
    geometry.eager = 1;
    geometry.resident_blocks = cooperative ? blocks : 1;
    return enqueue([=] { launch(function, params, geometry); });
}

}  // namespace

extern "C" {

// For tests.

CUresult fake_cuda_enqueue(std::function<void()> work) { return enqueue(std::move(work)); }

void fake_cuda_use_emulator(EmulatedLaunch launch, EmulatedAllocate allocate, EmulatedFree release) {
    emulated_launch = launch;
    emulated_allocate = allocate;
    emulated_free = release;
}

void fake_cuda_add_kernel(const char* name, size_t params_bytes) { driver().kernels[name] = params_bytes; }

// Allocations and handles that nobody has given back.
long fake_cuda_live() {
    Driver& d = driver();
    return d.objects + static_cast<long>(d.memory.size() + d.pinned.size());
}

// Operations that are queued and have not run.
long fake_cuda_pending() { return static_cast<long>(driver().queue.size()); }

// Start.

CUresult cuInit(unsigned) { return static_cast<CUresult>(setting("FAKE_CUDA_INIT", kSuccess)); }

CUresult cuDriverGetVersion(int* version) {
    *version = static_cast<int>(setting("FAKE_CUDA_VERSION", 13000));
    return kSuccess;
}

CUresult cuDeviceGetCount(int* count) {
    *count = static_cast<int>(setting("FAKE_CUDA_COUNT", 2));
    return kSuccess;
}

CUresult cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return kSuccess;
}

CUresult cuDeviceGetName(char* name, int length, int device) {
    std::snprintf(name, static_cast<size_t>(length), "Fake GPU %d", device);
    return kSuccess;
}

CUresult cuDeviceGetAttribute(int* value, int attribute, int) {
    const long capability = setting("FAKE_CUDA_CAPABILITY", 90);
    switch (attribute) {
        case 75: *value = static_cast<int>(capability / 10); return kSuccess;
        case 76: *value = static_cast<int>(capability % 10); return kSuccess;
        case 16: *value = 8; return kSuccess;           // multiprocessors
        case 97: *value = 227 * 1024; return kSuccess;  // shared memory a block may opt in to
        case 38: *value = 50 << 20; return kSuccess;    // second-level cache
        default: return kInvalidValue;
    }
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = driver().total;
    return kSuccess;
}

CUresult cuDevicePrimaryCtxRetain(void** context, int) {
    const CUresult status = static_cast<CUresult>(setting("FAKE_CUDA_CONTEXT", kSuccess));
    if (status == kSuccess) ++driver().objects;
    *context = &driver();
    return status;
}

CUresult cuDevicePrimaryCtxRelease_v2(int) {
    --driver().objects;
    return kSuccess;
}

CUresult cuCtxSetCurrent(void* context) {
    context_is_current = context != nullptr;
    return driver().sticky;
}

// FAKE_CUDA_PEERS: whether devices map each other's memory. The second time is an error, as with the real one.
CUresult cuDeviceCanAccessPeer(int* possible, int device, int peer) {
    *possible = device != peer && setting("FAKE_CUDA_PEERS", 0) != 0;
    return kSuccess;
}

CUresult cuCtxEnablePeerAccess(void* context, unsigned flags) {
    static bool enabled = false;
    if (CUresult status = enter()) return status;
    if (context == nullptr || flags != 0) return kInvalidValue;
    if (enabled) return kPeerAccessAlreadyEnabled;
    enabled = true;
    return kSuccess;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
    switch (error) {
        case kOutOfMemory: *text = "CUDA_ERROR_OUT_OF_MEMORY"; return kSuccess;
        case kIllegalAddress: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; return kSuccess;
        case kCaptureInvalidated: *text = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; return kSuccess;
        default: *text = "CUDA_ERROR_FAKE"; return kSuccess;
    }
}

CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "as the fake driver says";
    return kSuccess;
}

// Memory.

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    Driver& d = driver();
    Guard guard(d.mutex);
    *total = d.total;
    *free = d.total - d.used;
    return enter();
}

CUresult cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (CUresult status = enter()) return status;
    if (bytes == 0) return kInvalidValue;
    if (bytes > d.total - d.used) return kOutOfMemory;
    void* memory = emulated_allocate != nullptr ? emulated_allocate("fake", bytes) : std::malloc(bytes);
    if (memory == nullptr) return kOutOfMemory;
    *address = reinterpret_cast<uint64_t>(memory);
    d.memory[*address] = bytes;
    d.used += bytes;
    return kSuccess;
}

CUresult cuMemFree_v2(uint64_t address) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (!context_is_current) return kInvalidContext;
    const auto found = d.memory.find(address);
    if (found == d.memory.end()) return kInvalidValue;
    if (d.capturing) d.spoilt = true;
    d.run_until(d.queued);
    d.used -= found->second;
    d.memory.erase(found);
    void* memory = reinterpret_cast<void*>(address);
    emulated_free != nullptr ? emulated_free(memory) : std::free(memory);
    return kSuccess;
}

CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (CUresult status = enter()) return status;
    *memory = std::malloc(bytes);
    d.pinned[reinterpret_cast<uint64_t>(*memory)] = bytes;
    return kSuccess;
}

CUresult cuMemFreeHost(void* memory) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (!context_is_current) return kInvalidContext;
    d.pinned.erase(reinterpret_cast<uint64_t>(memory));
    std::free(memory);
    return kSuccess;
}

CUresult cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (!contains(d.pinned, from, bytes) || !contains(d.memory, reinterpret_cast<void*>(to), bytes)) return kInvalidValue;
    if (d.capturing) return d.spoilt = true, kCaptureUnsupported;
    return enqueue([=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
}

CUresult cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (!contains(d.pinned, to, bytes) || !contains(d.memory, reinterpret_cast<void*>(from), bytes)) return kInvalidValue;
    if (d.capturing) return d.spoilt = true, kCaptureUnsupported;
    return enqueue([=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); });
}

CUresult cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
    return enqueue([=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}

CUresult cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void*) {
    return enqueue([=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
}

// Code.

CUresult cuModuleLoadData(void** module, const void*) {
    if (CUresult status = enter()) return status;
    const CUresult status = static_cast<CUresult>(setting("FAKE_CUDA_MODULE", kSuccess));
    if (status == kSuccess) ++driver().objects;
    *module = &driver();
    return status;
}

CUresult cuModuleUnload(void*) {
    --driver().objects;
    return kSuccess;
}

CUresult cuModuleGetFunction(void** function, void*, const char* name) {
    Driver& d = driver();
    const auto found = d.kernels.find(name);
    if (found == d.kernels.end()) return kNotFound;
    auto& slot = d.functions[name];
    if (!slot) slot = std::make_unique<Function>(Function{name, found->second});
    *function = slot.get();
    return kSuccess;
}

CUresult cuFuncLoad(void*) { return enter(); }

CUresult cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* bytes) {
    if (index != 0) return kInvalidValue;
    *offset = 0;
    *bytes = static_cast<Function*>(function)->params_bytes;
    return kSuccess;
}

CUresult cuFuncGetAttribute(int* value, int, void*) {
    *value = 1024;
    return kSuccess;
}

CUresult cuFuncSetAttribute(void*, int, int value) {
    return value <= 227 * 1024 - 1024 ? enter() : kInvalidValue;
}

CUresult cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        void*, void** arguments, void**) {
    return launch_kernel(f, {gx, gy, gz}, {bx, by, bz}, shared, arguments, false);
}

CUresult cuLaunchCooperativeKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                   unsigned shared, void*, void** arguments) {
    return launch_kernel(f, {gx, gy, gz}, {bx, by, bz}, shared, arguments, true);
}

// Streams, events, graphs.

CUresult cuStreamCreate(void** stream, unsigned) {
    if (CUresult status = enter()) return status;
    ++driver().objects;
    *stream = &driver();
    return kSuccess;
}

CUresult cuStreamDestroy_v2(void*) {
    --driver().objects;
    return kSuccess;
}

CUresult cuStreamSynchronize(void*) { return wait_for(driver().queued); }

CUresult cuStreamBeginCapture_v2(void*, int) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (CUresult status = enter()) return status;
    if (d.capturing) return kInvalidValue;
    d.capturing = true;
    d.spoilt = false;
    d.recording.clear();
    return kSuccess;
}

CUresult cuStreamEndCapture(void*, void** graph) {
    Driver& d = driver();
    Guard guard(d.mutex);
    *graph = nullptr;
    if (!d.capturing) return kInvalidValue;
    d.capturing = false;
    if (d.spoilt) return kCaptureInvalidated;
    ++d.objects;
    *graph = new Graph{std::move(d.recording)};
    return kSuccess;
}

CUresult cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
    if (CUresult status = enter()) return status;
    ++driver().objects;
    *exec = new Graph(*static_cast<Graph*>(graph));
    return kSuccess;
}

CUresult cuGraphUpload(void*, void*) { return enter(); }

CUresult cuGraphLaunch(void* exec, void*) {
    if (driver().capturing) return driver().spoilt = true, kCaptureUnsupported;
    for (const auto& work : static_cast<Graph*>(exec)->work)
        if (CUresult status = enqueue(work)) return status;
    return kSuccess;
}

CUresult cuGraphDestroy(void* graph) {
    --driver().objects;
    delete static_cast<Graph*>(graph);
    return kSuccess;
}

CUresult cuGraphExecDestroy(void* exec) { return cuGraphDestroy(exec); }

CUresult cuEventCreate(void** event, unsigned) {
    if (CUresult status = enter()) return status;
    ++driver().objects;
    *event = new Event;
    return kSuccess;
}

CUresult cuEventRecord(void* event, void*) {
    Driver& d = driver();
    Guard guard(d.mutex);
    if (CUresult status = enter()) return status;
    static_cast<Event*>(event)->position = d.queued;
    return kSuccess;
}

CUresult cuEventSynchronize(void* event) { return wait_for(static_cast<Event*>(event)->position); }

CUresult cuEventElapsedTime_v2(float* milliseconds, void* before, void* after) {
    Driver& d = driver();
    const uint64_t first = static_cast<Event*>(before)->position, last = static_cast<Event*>(after)->position;
    if (last > d.done || last < first) return kInvalidValue;
    *milliseconds = static_cast<float>(last - first);  // a millisecond an operation
    return kSuccess;
}

CUresult cuEventDestroy_v2(void* event) {
    --driver().objects;
    delete static_cast<Event*>(event);
    return kSuccess;
}

}  // extern "C"

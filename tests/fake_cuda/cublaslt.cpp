// cuBLASLt for the fake driver: column-major products by plain loops in float64, and the library's checks.
#include "cuda.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>

namespace {

enum Status : int { kSuccess = 0, kInvalidValue = 7, kNotSupported = 15 };
enum Type : int { kF32 = 0, kBf16 = 14 };

struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t ld;
};

struct Attributes {
    int compute = 0;
    std::map<int, uint64_t> values;
    uint64_t get(int attribute, uint64_t otherwise) const {
        const auto found = values.find(attribute);
        return found == values.end() ? otherwise : found->second;
    }
};

int set(Attributes* attributes, int attribute, const void* value, size_t bytes) {
    if (bytes > 8) return kInvalidValue;
    uint64_t bits = 0;
    std::memcpy(&bits, value, bytes);
    attributes->values[attribute] = bits;
    return kSuccess;
}

// cublasLtMatmulAlgo_t, with what the choice was promised.
struct Algo {
    uint64_t alignment[3];  // of A, B and D
    uint64_t workspace;
    uint64_t data[4];
};

struct HeuristicResult {
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

constexpr int kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8, kBiasType = 26;

double load(const void* base, int type, int64_t index) {
    if (type == kF32) return static_cast<const float*>(base)[index];
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(base)[index]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void store(void* base, int type, int64_t index, double value) {
    const float rounded = static_cast<float>(value);
    if (type == kF32) {
        static_cast<float*>(base)[index] = rounded;
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &rounded, 4);
    bits += 0x7fff + (bits >> 16 & 1);
    static_cast<uint16_t*>(base)[index] = static_cast<uint16_t>(bits >> 16);
}

}  // namespace

extern "C" {

size_t cublasLtGetVersion() {
    const char* text = std::getenv("FAKE_CUBLASLT_VERSION");
    return text == nullptr ? 130000 : std::strtoul(text, nullptr, 10);
}

int cublasLtCreate(void** handle) {
    *handle = new int;
    return kSuccess;
}

int cublasLtDestroy(void* handle) {
    delete static_cast<int*>(handle);
    return kSuccess;
}

int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    *layout = new Layout{type, rows, cols, ld};
    return kSuccess;
}

int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return kSuccess;
}

int cublasLtMatmulDescCreate(Attributes** desc, int compute, int) {
    *desc = new Attributes;
    (*desc)->compute = compute;
    return kSuccess;
}

int cublasLtMatmulDescSetAttribute(Attributes* desc, int attribute, const void* value, size_t bytes) {
    return set(desc, attribute, value, bytes);
}

int cublasLtMatmulDescDestroy(Attributes* desc) {
    delete desc;
    return kSuccess;
}

int cublasLtMatmulPreferenceCreate(Attributes** preference) {
    *preference = new Attributes;
    return kSuccess;
}

int cublasLtMatmulPreferenceSetAttribute(Attributes* preference, int attribute, const void* value, size_t bytes) {
    return set(preference, attribute, value, bytes);
}

int cublasLtMatmulPreferenceDestroy(Attributes* preference) {
    delete preference;
    return kSuccess;
}

int cublasLtMatmulAlgoGetHeuristic(void*, Attributes* desc, Layout* a, Layout* b, Layout* c, Layout* d, Attributes* preference,
                                   int, HeuristicResult* result, int* count) {
    *count = 0;
    const bool transposed = desc->get(kTransposeA, 0) == 1;
    const uint64_t n = transposed ? a->cols : a->rows, k = transposed ? a->rows : a->cols;
    if (a->type != b->type || c->type != d->type || b->rows != k || d->rows != n || d->cols != b->cols) return kInvalidValue;
    // As the table of types in the documentation has it: the bias is of the output's type.
    if (desc->get(kEpilogue, 1) == 4 && desc->get(kBiasType, static_cast<uint64_t>(d->type)) != static_cast<uint64_t>(d->type))
        return kNotSupported;
    // In-place reduction adds in the output's type.
    if (preference->get(3, 7) & 5) return kNotSupported;
    *result = {};
    result->algo = {{preference->get(5, 256), preference->get(6, 256), preference->get(8, 256)}, preference->get(1, 0), {}};
    result->workspace = 4096;
    result->state = kSuccess;
    *count = 1;
    return kSuccess;
}

int cublasLtMatmul(void*, Attributes* desc, const float* alpha, const void* a, Layout* la, const void* b, Layout* lb,
                   const float* beta, const void* c, Layout* lc, void* d, Layout* ld, const Algo* algo, void* workspace,
                   size_t workspace_bytes, void*) {
    const void* operands[3] = {a, b, d};
    for (int i = 0; i < 3; ++i)
        if (reinterpret_cast<uint64_t>(operands[i]) % algo->alignment[i] != 0) return kInvalidValue;
    if (workspace == nullptr || workspace_bytes > algo->workspace) return kInvalidValue;
    const bool transposed = desc->get(kTransposeA, 0) == 1;
    const float* bias = nullptr;
    if (desc->get(kEpilogue, 1) == 4) bias = reinterpret_cast<const float*>(desc->get(kBiasPointer, 0));
    const Layout A = *la, B = *lb, C = *lc, D = *ld;
    const float scale = *alpha, keep = *beta;
    return fake_cuda_enqueue([=] {
        const int64_t k = static_cast<int64_t>(B.rows);
        for (int64_t col = 0; col < static_cast<int64_t>(D.cols); ++col)
            for (int64_t row = 0; row < static_cast<int64_t>(D.rows); ++row) {
                double sum = 0;
                for (int64_t i = 0; i < k; ++i) {
                    const int64_t at = transposed ? i + row * A.ld : row + i * A.ld;
                    sum += load(a, A.type, at) * load(b, B.type, i + col * B.ld);
                }
                sum *= scale;
                if (keep != 0) sum += keep * load(c, C.type, row + col * C.ld);
                if (bias != nullptr) sum += bias[row];
                store(d, D.type, row + col * D.ld, sum);
            }
    });
}

}  // extern "C"

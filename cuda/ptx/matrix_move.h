// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements between shared memory and the registers of a warp.
//
// Lane 8m + r supplies the shared address of row r of matrix m (16 bytes, 16-byte aligned). In registers lane l holds
// of each matrix the two neighbouring elements of row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1; with `trans` of the
// transposed matrix. PTX ISA, "Warp-level Matrix Load/Store: ldmatrix (sm_75), stmatrix (sm_90)".
#pragma once

#include "target.h"

namespace ptx {

#if defined(__CUDACC__)

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
#endif

#else

namespace twin {

struct MatrixOperands {
    uint32_t row;           // shared address this lane supplies
    const uint32_t* source;  // registers to store (stmatrix)
};

// Calls visit(element in shared memory, lane, matrix, half of the register) for all elements of `Count` matrices.
template <int Count, bool Trans, class Visit>
void for_each_element(const ::emulator::WarpExchange& exchange, const char* instruction, Visit visit) {
    for (int matrix = 0; matrix < Count; ++matrix)
        for (int row = 0; row < 8; ++row) {
            const auto& operands = *static_cast<const MatrixOperands*>(exchange.in[matrix * 8 + row]);
            auto* bytes = ::emulator::shared_pointer(operands.row, 16, 16, instruction);
            for (int column = 0; column < 8; ++column) {
                const int i = Trans ? column : row;
                const int j = Trans ? row : column;
                visit(bytes + 2 * column, i * 4 + j / 2, matrix, j % 2);
            }
        }
}

template <int Count, bool Trans>
void load_matrices(uint32_t (&r)[Count], uint32_t row) {
    const MatrixOperands operands{row, nullptr};
    ::emulator::full_warp_collective("ldmatrix", &operands, r, [](const ::emulator::WarpExchange& exchange) {
        for_each_element<Count, Trans>(
            exchange, "ldmatrix", [&](const unsigned char* element, int lane, int matrix, int half) {
                auto* registers = static_cast<uint32_t*>(exchange.out[lane]);
                std::memcpy(reinterpret_cast<unsigned char*>(registers + matrix) + 2 * half, element, 2);
            });
    });
}

template <int Count, bool Trans>
void store_matrices(uint32_t row, const uint32_t (&r)[Count]) {
    const MatrixOperands operands{row, r};
    ::emulator::full_warp_collective("stmatrix", &operands, nullptr, [](const ::emulator::WarpExchange& exchange) {
        for_each_element<Count, Trans>(exchange, "stmatrix", [&](unsigned char* element, int lane, int matrix, int half) {
            const uint32_t* registers = static_cast<const MatrixOperands*>(exchange.in[lane])->source;
            std::memcpy(element, reinterpret_cast<const unsigned char*>(registers + matrix) + 2 * half, 2);
        });
    });
}

}  // namespace twin

inline void ldmatrix_x1(uint32_t (&r)[1], uint32_t row) { twin::load_matrices<1, false>(r, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) { twin::load_matrices<2, false>(r, row); }
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { twin::load_matrices<4, false>(r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) { twin::load_matrices<2, true>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { twin::load_matrices<4, true>(r, row); }
inline void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) { twin::store_matrices<4, false>(row, r); }
inline void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) { twin::store_matrices<4, true>(row, r); }

#endif

}  // namespace ptx

// FP8 E4M3 in software: the same bits as cvt.rn.satfinite.e4m3x2.f32, for targets that lack the instruction and for one
// value at a time. OCP 8-bit Floating Point Specification: bias 7, no infinities, NaN is S.1111.111, largest finite 448.
#pragma once

#include "../ptx/target.h"

namespace longhaul {

using ptx::uint32_t;
using ptx::uint8_t;

__device__ __forceinline__ float e4m3_to_float(uint8_t code) {
    const uint32_t sign = (code & 0x80u) << 24, exponent = (code >> 3) & 15u, mantissa = code & 7u;
    if ((code & 0x7fu) == 0x7fu) return __uint_as_float(sign | 0x7fffffffu);
    // Subnormals are mantissa * 2^-9.
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0.001953125f;
        return sign != 0 ? -magnitude : magnitude;
    }
    return __uint_as_float(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}

// Rounds to nearest even and saturates; NaN stays NaN.
__device__ __forceinline__ uint8_t float_to_e4m3(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7f;
    if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);  // 448 and more
    if (magnitude < 0x3c800000u) {
        // Below 2^-6: in units of 2^-9, where adding 2^23 * 2^-9 rounds to an integer in the sum's low bits.
        const float shifted = __uint_as_float(magnitude) + 16384.0f;
        return static_cast<uint8_t>(sign | (__float_as_uint(shifted) & 0xfu));
    }
    const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
    const uint32_t code = (rounded >> 20) - (120u << 3);
    return static_cast<uint8_t>(sign | (code > 0x7eu ? 0x7eu : code));
}

}  // namespace longhaul

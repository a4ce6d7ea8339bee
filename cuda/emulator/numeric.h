// The 16-bit and 8-bit floating-point types of CUDA, with the conversions the kernels use.
//
// Encodings: bf16 (the upper half of an f32), IEEE binary16, and FP8 E4M3 (OCP 8-bit Floating Point Specification:
// bias 7, no infinities, NaN is S.1111.111, largest finite 448). Conversions round to nearest, ties to even; the E4M3
// conversion saturates, as cvt.rn.satfinite does.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct __nv_bfloat16 {
    std::uint16_t bits;
};
struct __half {
    std::uint16_t bits;
};
struct __nv_fp8_e4m3 {
    std::uint8_t bits;
};

namespace emulator {

inline float bf16_to_float(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

inline std::uint16_t float_to_bf16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Value of a small binary format: sign, `exponent_bits`, `mantissa_bits`, without the format's special values.
inline float small_float(std::uint32_t bits, int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const auto mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1));
    const auto exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1));
    const bool negative = (bits >> (mantissa_bits + exponent_bits)) & 1;
    const float magnitude = exponent == 0
                                ? std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits)
                                : std::ldexp(static_cast<float>(mantissa + (1 << mantissa_bits)),
                                             exponent - bias - mantissa_bits);
    return negative ? -magnitude : magnitude;
}

// Magnitude bits of `value` (finite, non-negative) rounded to nearest even; may exceed the format's largest value.
inline std::uint32_t round_small_float(float value, int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    if (value == 0.0f) return 0;
    int exponent = std::ilogb(value);
    if (exponent < 1 - bias) exponent = 1 - bias;
    // Units in the last place of the binade; exact, since scaling by a power of two and |value| has 24 bits.
    const double units = std::ldexp(static_cast<double>(value), mantissa_bits - exponent);
    const auto rounded = static_cast<std::uint32_t>(std::nearbyint(units));
    // Adding the mantissa to the exponent field carries into the next binade by itself; subnormals fall out likewise.
    return (static_cast<std::uint32_t>(exponent + bias - 1) << mantissa_bits) + rounded;
}

inline float half_to_float(std::uint16_t bits) {
    if ((bits & 0x7c00) == 0x7c00) {
        const float special = (bits & 0x3ff) != 0 ? NAN : INFINITY;
        return (bits & 0x8000) != 0 ? -special : special;
    }
    return small_float(bits, 5, 10);
}

inline std::uint16_t float_to_half(float value) {
    if (std::isnan(value)) return 0x7fff;
    const std::uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00);  // halfway to 65536 rounds to infinity
    return static_cast<std::uint16_t>(sign | round_small_float(magnitude, 5, 10));
}

inline float e4m3_to_float(std::uint8_t bits) {
    if ((bits & 0x7f) == 0x7f) return NAN;
    return small_float(bits, 4, 3);
}

inline std::uint8_t float_to_e4m3(float value) {
    if (std::isnan(value)) return 0x7f;
    const std::uint32_t sign = std::signbit(value) ? 0x80 : 0;
    const float magnitude = std::fabs(value);
    if (magnitude >= 448.0f) return static_cast<std::uint8_t>(sign | 0x7e);
    return static_cast<std::uint8_t>(sign | round_small_float(magnitude, 4, 3));
}

}  // namespace emulator

inline float __bfloat162float(__nv_bfloat16 value) { return emulator::bf16_to_float(value.bits); }
inline __nv_bfloat16 __float2bfloat16(float value) { return {emulator::float_to_bf16(value)}; }
inline float __half2float(__half value) { return emulator::half_to_float(value.bits); }
inline __half __float2half(float value) { return {emulator::float_to_half(value)}; }

// Number formats, conversions, ldmatrix, stmatrix and mma.sync against plain arithmetic.
#include "../../ptx/convert.h"
#include "../../ptx/matrix_move.h"
#include "../../ptx/mma.h"
#include "harness.h"

using emulator::DeviceArray;
using emulator::LaunchConfig;
using harness::contains;
using harness::fault_of;
using harness::under_all_schedules;

namespace {

// The nearest representable value found by search over all codes; ties go to the even code.
template <class Decode>
std::uint32_t nearest(float value, std::uint32_t codes, Decode decode) {
    std::uint32_t best = 0;
    double best_distance = INFINITY;
    for (std::uint32_t code = 0; code < codes; ++code) {
        const double candidate = decode(code);
        if (!std::isfinite(candidate)) continue;
        const double distance = std::fabs(candidate - static_cast<double>(value));
        if (distance < best_distance || (distance == best_distance && code % 2 == 0)) {
            best = code;
            best_distance = distance;
        }
    }
    return best;
}

LaunchConfig warp(std::size_t shared) {
    LaunchConfig config;
    config.block = dim3(32);
    config.dynamic_shared_bytes = shared;
    return config;
}

// One warp multiplies A (16 x K) by B (K x 8, given as 8 rows of K) with fragments gathered as the ISA describes.
template <class Storage, class Decode, class Encode, class Mma>
void check_mma(Decode decode, Encode encode, Mma mma) {
    constexpr int per_register = 4 / sizeof(Storage), depth = 8 * per_register;
    harness::Values random(11);
    std::vector<Storage> a(16 * depth), b(8 * depth);
    std::vector<float> c(16 * 8);
    for (auto& x : a) x = encode(random.next() * 4);
    for (auto& x : b) x = encode(random.next() * 4);
    for (auto& x : c) x = random.next();
    under_all_schedules(warp(0), [&](const LaunchConfig& config) {
        DeviceArray<float> out("out", 16 * 8);
        emulator::launch(config, [&, o = out.data()] {
            const int group = static_cast<int>(threadIdx.x) / 4, member = static_cast<int>(threadIdx.x) % 4;
            const auto pack = [&](const std::vector<Storage>& matrix, int row, int column) {
                std::uint32_t bits = 0;
                for (int e = 0; e < per_register; ++e)
                    bits |= static_cast<std::uint32_t>(matrix[row * depth + column + e]) << (e * 8 * sizeof(Storage));
                return bits;
            };
            const int k = member * per_register;
            const std::uint32_t fa[4] = {pack(a, group, k), pack(a, group + 8, k), pack(a, group, k + depth / 2),
                                         pack(a, group + 8, k + depth / 2)};
            const std::uint32_t fb[2] = {pack(b, group, k), pack(b, group, k + depth / 2)};
            float d[4];
            for (int e = 0; e < 4; ++e) d[e] = c[(group + e / 2 * 8) * 8 + member * 2 + e % 2];
            mma(d, fa, fb);
            for (int e = 0; e < 4; ++e) o[(group + e / 2 * 8) * 8 + member * 2 + e % 2] = d[e];
        });
        const auto result = out.read();
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 8; ++j) {
                double sum = c[i * 8 + j];
                for (int k = 0; k < depth; ++k)
                    sum += static_cast<double>(decode(a[i * depth + k])) * static_cast<double>(decode(b[j * depth + k]));
                CHECK(std::fabs(result[i * 8 + j] - sum) < 1e-5 * (1 + std::fabs(sum)));
            }
    });
}

}  // namespace

TEST(known_encodings) {
    CHECK(emulator::half_to_float(0x3c00) == 1.0f && emulator::half_to_float(0x7bff) == 65504.0f);
    CHECK(emulator::half_to_float(0x0001) == 0x1p-24f && emulator::half_to_float(0xfc00) == -INFINITY);
    CHECK(emulator::float_to_half(65519.9f) == 0x7bff && emulator::float_to_half(65520.0f) == 0x7c00);
    CHECK(emulator::e4m3_to_float(0x7e) == 448.0f && emulator::e4m3_to_float(0x01) == 0x1p-9f);
    CHECK(emulator::e4m3_to_float(0x38) == 1.0f && std::isnan(emulator::e4m3_to_float(0xff)));
    CHECK(emulator::float_to_e4m3(1e9f) == 0x7e && emulator::float_to_e4m3(-500.0f) == 0xfe);
    CHECK(emulator::float_to_bf16(1.0f) == 0x3f80 && emulator::bf16_to_float(0xc000) == -2.0f);
    CHECK(emulator::float_to_bf16(0x1.01p0f) == 0x3f80 && emulator::float_to_bf16(0x1.03p0f) == 0x3f82);
}

TEST(every_small_float_survives_a_round_trip) {
    for (std::uint32_t code = 0; code < 0x10000; ++code) {
        const auto bits = static_cast<std::uint16_t>(code);
        if (!std::isnan(emulator::half_to_float(bits))) CHECK(emulator::float_to_half(emulator::half_to_float(bits)) == bits);
        if (!std::isnan(emulator::bf16_to_float(bits))) CHECK(emulator::float_to_bf16(emulator::bf16_to_float(bits)) == bits);
    }
    for (std::uint32_t code = 0; code < 0x100; ++code) {
        const auto bits = static_cast<std::uint8_t>(code);
        if (!std::isnan(emulator::e4m3_to_float(bits))) CHECK(emulator::float_to_e4m3(emulator::e4m3_to_float(bits)) == bits);
    }
}

TEST(conversions_round_to_the_nearest_even_value) {
    const auto e4m3 = [](std::uint32_t code) { return emulator::e4m3_to_float(static_cast<std::uint8_t>(code)); };
    const auto half = [](std::uint32_t code) { return emulator::half_to_float(static_cast<std::uint16_t>(code)); };
    // All e4m3 values, the midpoints between them, and their neighbours.
    for (std::uint32_t code = 0; code < 0x7e; ++code) {
        const float middle = (e4m3(code) + e4m3(code + 1)) / 2;
        for (float value : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)})
            CHECK(emulator::float_to_e4m3(value) == nearest(value, 0x7f, e4m3));
    }
    harness::Values random(3);
    for (int i = 0; i < 300; ++i) {
        const float value = std::fabs(std::ldexp(random.next(), static_cast<int>(random.bits() % 36) - 20));
        CHECK(emulator::float_to_half(value) == nearest(value, 0x7c00, half));
    }
    for (std::uint32_t code = 0; code < 0x7bff; code += 97) {
        const float middle = (half(code) + half(code + 1)) / 2;
        CHECK(emulator::float_to_half(middle) == (code % 2 == 0 ? code : code + 1));
    }
}

TEST(packed_conversions_put_the_first_operand_low) {
    CHECK(ptx::cvt_bf16x2(1.0f, -2.0f) == 0xc0003f80u);
    CHECK(ptx::cvt_e4m3x2(1.0f, -448.0f) == 0xfe38u);
    CHECK(ptx::cvt_f16x2(1.0f, -2.0f) == 0xc0003c00u);
}

TEST(every_e4m3_is_a_half) {
    for (std::uint32_t code = 0; code < 0x100; ++code) {
        const std::uint32_t pair = ptx::cvt_f16x2_e4m3x2(static_cast<std::uint16_t>(code << 8 | 0x38));
        CHECK((pair & 0xffff) == 0x3c00);
        const float exact = emulator::e4m3_to_float(static_cast<std::uint8_t>(code));
        const float half = emulator::half_to_float(static_cast<std::uint16_t>(pair >> 16));
        CHECK(std::isnan(exact) ? std::isnan(half) : half == exact);
    }
}

TEST(ldmatrix_hands_out_rows_and_columns) {
    under_all_schedules(warp(4 * 128), [](const LaunchConfig& config) {
        DeviceArray<std::uint32_t> plain("plain", 32 * 4), transposed("transposed", 32 * 4), small("small", 32 * 5);
        emulator::launch(config, [p = plain.data(), t = transposed.data(), s = small.data()] {
            auto* tile = ptx::dynamic_shared<std::uint16_t>();  // 4 matrices of 8 rows of 8; element = its index
            for (unsigned i = threadIdx.x; i < 256; i += 32) tile[i] = static_cast<std::uint16_t>(i);
            __syncthreads();
            const auto row = ptx::shared_address(tile) + threadIdx.x * 16;
            std::uint32_t r[4], r1[1], r2[2], r2t[2];
            ptx::ldmatrix_x4(r, row);
            for (int m = 0; m < 4; ++m) p[threadIdx.x * 4 + m] = r[m];
            ptx::ldmatrix_x4_trans(r, row);
            for (int m = 0; m < 4; ++m) t[threadIdx.x * 4 + m] = r[m];
            // Lanes beyond the matrices supply addresses that are never used.
            ptx::ldmatrix_x1(r1, threadIdx.x < 8 ? row : 3);
            ptx::ldmatrix_x2(r2, threadIdx.x < 16 ? row : 3);
            ptx::ldmatrix_x2_trans(r2t, threadIdx.x < 16 ? row : 3);
            const std::uint32_t all[5] = {r1[0], r2[0], r2[1], r2t[0], r2t[1]};
            for (int m = 0; m < 5; ++m) s[threadIdx.x * 5 + m] = all[m];
        });
        const auto a = plain.read(), b = transposed.read(), c = small.read();
        for (std::uint32_t lane = 0; lane < 32; ++lane)
            for (std::uint32_t m = 0; m < 4; ++m) {
                const std::uint32_t row = lane / 4, column = lane % 4 * 2, base = m * 64;
                const auto straight = (base + row * 8 + column) | (base + row * 8 + column + 1) << 16;
                const auto turned = (base + column * 8 + row) | (base + (column + 1) * 8 + row) << 16;
                CHECK(a[lane * 4 + m] == straight);
                CHECK(b[lane * 4 + m] == turned);
                if (m == 0) CHECK(c[lane * 5] == straight);
                if (m < 2) CHECK(c[lane * 5 + 1 + m] == straight && c[lane * 5 + 3 + m] == turned);
            }
    });
}

TEST(stmatrix_is_the_inverse_of_ldmatrix) {
    under_all_schedules(warp(2 * 512), [](const LaunchConfig& config) {
        DeviceArray<std::uint16_t> out("out", 512);
        emulator::launch(config, [o = out.data()] {
            auto* tile = ptx::dynamic_shared<std::uint16_t>();
            const std::uint32_t row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
            std::uint32_t r[4];
            for (std::uint32_t m = 0; m < 4; ++m) r[m] = (m * 64 + row * 8 + column) | (m * 64 + row * 8 + column + 1) << 16;
            const auto address = ptx::shared_address(tile) + threadIdx.x * 16;
            ptx::stmatrix_x4(address, r);
            ptx::stmatrix_x4_trans(address + 512, r);
            __syncthreads();
            for (unsigned i = threadIdx.x; i < 512; i += 32) o[i] = tile[i];
        });
        const auto result = out.read();
        for (unsigned m = 0; m < 4; ++m)
            for (unsigned i = 0; i < 8; ++i)
                for (unsigned j = 0; j < 8; ++j) {
                    CHECK(result[m * 64 + i * 8 + j] == m * 64 + i * 8 + j);
                    CHECK(result[256 + m * 64 + j * 8 + i] == m * 64 + i * 8 + j);
                }
    });
}

TEST(mma_bf16_multiplies) {
    check_mma<std::uint16_t>(emulator::bf16_to_float, emulator::float_to_bf16, ptx::mma_m16n8k16_bf16);
}

TEST(mma_f16_multiplies) {
    check_mma<std::uint16_t>(emulator::half_to_float, emulator::float_to_half, ptx::mma_m16n8k16_f16);
}

TEST(mma_e4m3_multiplies) {
    check_mma<std::uint8_t>(emulator::e4m3_to_float, emulator::float_to_e4m3, ptx::mma_m16n8k32_e4m3);
}

TEST(matrix_instructions_need_the_whole_warp_and_aligned_rows) {
    const auto half_warp = fault_of([] {
        auto config = warp(512);
        config.block = dim3(16);
        emulator::launch(config, [] {
            std::uint32_t r[4];
            ptx::ldmatrix_x4(r, ptx::shared_address(ptx::dynamic_shared<char>()));
        });
    });
    CHECK(contains(half_warp, "warp mismatch"));
    const auto odd = fault_of([] {
        emulator::launch(warp(1024), [] {
            std::uint32_t r[4];
            ptx::ldmatrix_x4(r, ptx::shared_address(ptx::dynamic_shared<char>()) + threadIdx.x * 16 + 8);
        });
    });
    CHECK(contains(odd, "misaligned"));
}

TEST_MAIN

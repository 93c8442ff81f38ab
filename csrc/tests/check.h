// What the tests of the native code share: checks, keys of awkward kinds, and rows of every type in blocks of exactly
// their size, so that AddressSanitizer sees a read past either end.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "rows.h"

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                             \
        }                                                                             \
    } while (false)

namespace rag::test {

enum class Kind { random, duplicates, all_equal, zeros, one_huge };
constexpr Kind kKinds[] = {Kind::random, Kind::duplicates, Kind::all_equal, Kind::zeros, Kind::one_huge};

// [n, dim] float32.
inline std::vector<float> make_keys(Kind kind, int64_t n, int64_t dim, uint32_t seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> keys(n * dim);
    for (float& x : keys) x = normal(generator);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < dim; ++d) {
            float& x = keys[i * dim + d];
            if (kind == Kind::duplicates) x = keys[i % 3 * dim + d];
            if (kind == Kind::all_equal) x = 1.5f;
            if (kind == Kind::zeros) x = 0.f;
            if (kind == Kind::one_huge && i == n / 2) x *= 1e4f;
        }
    return keys;
}

// Rows of one type made from float32 ones, bits cut off; what they hold is what Rows::load says.
struct Typed {
    std::vector<float> floats;
    std::vector<uint16_t> halves;
    std::vector<int8_t> codes;
    std::vector<float> scales;
    Rows rows;

    Typed(const std::vector<float>& keys, int64_t n, int64_t dim, Dtype dtype) {
        rows = {nullptr, dtype, n, dim, dim, nullptr};
        if (dtype == Dtype::float32) rows.data = (floats = keys).data();
        if (dtype == Dtype::float16 || dtype == Dtype::bfloat16) {
            for (float x : keys) halves.push_back(dtype == Dtype::bfloat16 ? bfloat_bits(x) : half_bits(x));
            rows.data = halves.data();
        }
        if (dtype == Dtype::int8) {
            for (int64_t i = 0; i < n; ++i) {
                float most = 0.f;
                for (int64_t d = 0; d < dim; ++d) most = std::max(most, std::fabs(keys[i * dim + d]));
                scales.push_back(most / 127.f);
                for (int64_t d = 0; d < dim; ++d)
                    codes.push_back(most > 0.f ? static_cast<int8_t>(std::lround(keys[i * dim + d] / most * 127.f)) : 0);
            }
            rows.data = codes.data();
            rows.scales = scales.data();
        }
    }
    Typed(const Typed&) = delete;
    Typed& operator=(const Typed&) = delete;

    static uint16_t bfloat_bits(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return static_cast<uint16_t>(bits >> 16);
    }
    // Only what is normal in both types; anything else becomes 0 or the largest number.
    static uint16_t half_bits(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const uint32_t sign = bits >> 16 & 0x8000u;
        const int exponent = static_cast<int>(bits >> 23 & 0xffu) - 112;
        if (exponent <= 0) return static_cast<uint16_t>(sign);
        if (exponent >= 31) return static_cast<uint16_t>(sign | 0x7bffu);
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ffu));
    }
};

}  // namespace rag::test

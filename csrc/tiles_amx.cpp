#include "tile_kernels.h"

#ifdef RAG_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>

// In GCC 12's own header every call of an unmasked conversion warns.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define RAG_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define RAG_INLINE inline __attribute__((always_inline)) RAG_TARGET

namespace rag {
namespace {

constexpr int64_t kStep = 32;  // elements of 2 bytes in a row of a tile register
constexpr int64_t kRegister = 1024;

RAG_INLINE float length(__m512 squares) { return std::sqrt(_mm512_reduce_add_ps(squares)) * (1 + 1e-5f); }

// 16 elements as bfloat16 and what they are in float32.
RAG_INLINE __m256i round_off(__m512 x, __m512& rounded) {
    const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return bits;
}

// Calls put(i, d, high, low) with elements d .. d + 15 of every vector i.
template <class Put>
RAG_INLINE bool pack(const float* rows, int64_t dim, int64_t depth, Lengths* lengths, Put&& put) {
    __mmask16 any = 0;
    for (int64_t i = 0; i < kTile; ++i, rows += dim) {
        __m512 all = _mm512_setzero_ps(), lows = _mm512_setzero_ps(), rests = _mm512_setzero_ps();
        for (int64_t d = 0; d < depth; d += 16) {
            const int64_t left = dim - d;
            const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
            const __m512 x = _mm512_maskz_loadu_ps(mask, rows + d);
            __m512 high, low;
            const __m256i high_bits = round_off(x, high);
            const __m512 below = _mm512_sub_ps(x, high);
            const __m256i low_bits = round_off(below, low);
            const __m512 rest = _mm512_sub_ps(below, low);
            all = _mm512_fmadd_ps(x, x, all);
            lows = _mm512_fmadd_ps(low, low, lows);
            rests = _mm512_fmadd_ps(rest, rest, rests);
            any |= _mm512_cmp_ps_mask(low, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            put(i, d, high_bits, low_bits);
        }
        lengths[i] = {length(all), length(lows), length(rests)};
    }
    return any != 0;
}

// [depth / 32, kTile, 32]: rows of the left operand's registers.
RAG_TARGET bool pack_queries(const float* rows, int64_t dim, int64_t depth, char* high, char* low, Lengths* lengths) {
    return pack(rows, dim, depth, lengths, [&](int64_t i, int64_t d, __m256i high_bits, __m256i low_bits) RAG_TARGET {
        const int64_t at = (d / kStep * kTile + i) * 64 + d % kStep * 2;
        _mm256_store_si256(reinterpret_cast<__m256i*>(high + at), high_bits);
        _mm256_store_si256(reinterpret_cast<__m256i*>(low + at), low_bits);
    });
}

// [depth / 32, 2, 16, 16, 2]: in the right operand's registers a row has two elements of each of 16 keys.
RAG_TARGET bool pack_keys(const float* rows, int64_t dim, int64_t depth, char* high, char* low, Lengths* lengths) {
    return pack(rows, dim, depth, lengths, [&](int64_t i, int64_t d, __m256i high_bits, __m256i low_bits) RAG_TARGET {
        const int64_t at = (d / kStep * 2 + i / 16) * kRegister + d % kStep * 32 + i % 16 * 4;
        const __m256i apart = _mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112);
        _mm256_i32scatter_epi32(high + at, apart, high_bits, 4);
        _mm256_i32scatter_epi32(low + at, apart, low_bits, 4);
    });
}

// What is behind a pointer is in memory now, and is read from there again: the intrinsics do not say all they touch.
RAG_INLINE void in_memory(const void* data) { __asm__ volatile("" : : "r"(data) : "memory"); }

// Registers 0 to 3 are the sums, 4 and 5 queries, 6 and 7 keys.
RAG_INLINE void add_products(const char* queries, const char* keys, int64_t depth) {
    for (int64_t at = 0; at < depth * kTile * 2; at += 2 * kRegister) {
        _tile_loadd(4, queries + at, 64);
        _tile_loadd(6, keys + at, 64);
        _tile_loadd(7, keys + at + kRegister, 64);
        _tile_loadd(5, queries + at + kRegister, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

RAG_TARGET void multiply(const Packed& queries, const Packed& keys, int64_t depth, float* scores) {
    in_memory(keys.high);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // The small products first: what is rounded off them is nothing beside the large ones'.
    if (keys.low) add_products(queries.high, keys.low, depth);
    if (queries.low) add_products(queries.low, keys.high, depth);
    add_products(queries.high, keys.high, depth);
    _tile_stored(0, scores, kTile * 4);
    _tile_stored(1, scores + 16, kTile * 4);
    _tile_stored(2, scores + 16 * kTile, kTile * 4);
    _tile_stored(3, scores + 16 * kTile + 16, kTile * 4);
}

// Eight registers of 16 rows of 64 bytes. Other code of the thread may believe that its own settings are still there.
RAG_TARGET void begin(char saved[64]) {
    alignas(64) char settings[64] = {1};
    for (int i = 0; i < 8; ++i) settings[16 + 2 * i] = 64, settings[48 + i] = 16;
    in_memory(settings);
    _tile_storeconfig(saved);
    in_memory(saved);
    _tile_loadconfig(settings);
}

RAG_TARGET void end(const char saved[64]) {
    in_memory(saved);
    _tile_loadconfig(saved);
}

bool allowed() {
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
    constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTiles)) return false;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return false;
    return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}

const TileKernel kAmx{"amx", kStep, 2, true, pack_queries, pack_keys, multiply, begin, end, &kSelectAvx512};

}  // namespace

const TileKernel* amx_kernel() { return allowed() ? &kAmx : nullptr; }

}  // namespace rag
#endif

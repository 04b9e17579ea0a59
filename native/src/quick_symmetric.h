// Symmetric fake quantization from load to store in registers: the most frequent call, and no slower than it need be.
//
// The general way widens 16-bit numbers into a buffer and narrows them out of it, which takes twice the time. Only for
// AVX2, and where one amax applies to many elements.
#pragma once

#include "quantize.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace {

inline __m256 load_wide(const float* from) { return _mm256_loadu_ps(from); }

inline __m256 load_wide(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline __m256 load_wide(const BFloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline void store_narrow(__m256 value, float* to) { _mm256_storeu_ps(to, value); }

inline void store_narrow(__m256 value, Float16* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline void store_narrow(__m256 value, BFloat16* to) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

inline float widen(float value) { return value; }
inline float narrow(float value, float) { return value; }

// [0, n) with one set of parameters; the arithmetic of SymmetricFakeQuick, eight numbers at a time.
template <bool unsigned_, class T>
QDQ_NOINLINE bool quick_run(const SymmetricFakeQuick<unsigned_> op, const float* p, const T* x, T* out,
                            int64_t n) {
    const __m256 scale = _mm256_set1_ps(p[0]), reciprocal = _mm256_set1_ps(p[1]);
    const __m256 lo = _mm256_set1_ps(op.lo), hi = _mm256_set1_ps(op.bound), sign = _mm256_set1_ps(-0.0f);
    __m256 negative = _mm256_setzero_ps();
    int64_t i = 0;
#pragma GCC unroll 2
    for (; i + 8 <= n; i += 8) {
        const __m256 value = load_wide(x + i);
        if (unsigned_) negative = _mm256_or_ps(negative, _mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_LT_OQ));
        const __m256 rounded = _mm256_round_ps(_mm256_mul_ps(value, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        // These give their second operand where one is NaN.
        const __m256 code = _mm256_min_ps(hi, _mm256_max_ps(lo, rounded));
        const __m256 quotient = _mm256_mul_ps(code, reciprocal);
        const __m256 rest = _mm256_fnmadd_ps(quotient, scale, code);
        const __m256 corrected = _mm256_fmadd_ps(rest, reciprocal, quotient);
        store_narrow(_mm256_or_ps(corrected, _mm256_and_ps(code, sign)), out + i);
    }
    bool bad = _mm256_movemask_ps(negative) != 0;
    for (; i < n; ++i) {
        const float value = widen(x[i]);
        if (unsigned_) bad |= value < 0;
        out[i] = narrow(op.apply(value, 0.0f, p[0], p[1], 0.0f), T{});
    }
    return bad;
}

template <bool unsigned_, class T>
int quick_symmetric(const SymmetricFakeQuick<unsigned_> op, const T* x, T* out, const QdqLayout& layout,
                 int threads) {
    bool bad[kMostThreads] = {};
    const int parts = thread_count(layout.n, threads);
    parallel(layout.n, parts, [&](int64_t begin, int64_t end, int index) {
        for_runs(layout, begin, end, [&](int64_t parameter, int64_t start, int64_t n) {
            float p[kParameters] = {};
            op.parameters(parameter, p);
            bad[index] |= quick_run(op, p, x + start, out + start, n);
        });
    });
    for (int i = 0; i < parts; ++i)
        if (bad[i]) return QDQ_NEGATIVE_INPUT;
    return 0;
}

}  // namespace

#define QDQ_QUICK_SYMMETRIC 1

#endif

// Symmetric fake quantization from load to store in registers: the most frequent call, and no slower than it need be.
//
// The general way widens 16-bit numbers into a buffer and narrows them out of it, which takes twice the time. Only for
// AVX2.
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

// Sixteen numbers.
inline void store_narrow(__m256 first, __m256 last, float* to) {
    _mm256_storeu_ps(to, first);
    _mm256_storeu_ps(to + 8, last);
}

inline void store_narrow(__m256 first, __m256 last, Float16* to) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(first, kMode));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(last, kMode));
}

// The upper half of each number, rounded half to even. NaN needs no care: one that comes from 16 bits has a lower half of
// zeros, which rounding does not carry over.
inline __m256i upper_half(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    return _mm256_srli_epi32(sum, 16);
}

inline void store_narrow(__m256 first, __m256 last, BFloat16* to) {
    const __m256i mixed = _mm256_packus_epi32(upper_half(first), upper_half(last));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xD8));
}

inline float widen(float value) { return value; }
inline float narrow(float value, float) { return value; }

// The scale and its reciprocal for eight neighbours from i on: the same for all, or those of each.
struct OneScale {
    __m256 scale, reciprocal;
    OneScale(const float* p, const float* q) : scale(_mm256_set1_ps(*p)), reciprocal(_mm256_set1_ps(*q)) {}
    __m256 scale_at(int64_t) const { return scale; }
    __m256 reciprocal_at(int64_t) const { return reciprocal; }
    static int64_t index(int64_t) { return 0; }
};
struct ScaleOfEach {
    const float *scales, *reciprocals;
    ScaleOfEach(const float* p, const float* q) : scales(p), reciprocals(q) {}
    __m256 scale_at(int64_t i) const { return load_once(scales + i); }
    __m256 reciprocal_at(int64_t i) const { return load_once(reciprocals + i); }
    // Compilers make the load part of both instructions that use it, and loads are what this waits for.
    static __m256 load_once(const float* from) {
        __m256 value = _mm256_loadu_ps(from);
        __asm__("" : "+x"(value));
        return value;
    }
    static int64_t index(int64_t i) { return i; }
};

// [0, n); the arithmetic of SymmetricFakeQuick, sixteen numbers at a time.
template <class Scales, bool unsigned_, class T>
QDQ_NOINLINE bool quick_run(const SymmetricFakeQuick<unsigned_> op, const float* p, const float* q, const T* x, T* out,
                            int64_t n) {
    const Scales scales(p, q);
    const __m256 lo = _mm256_set1_ps(op.lo), hi = _mm256_set1_ps(op.bound);
    __m256 negative = _mm256_setzero_ps();
    auto quantized = [&](int64_t i) {
        const __m256 value = load_wide(x + i), scale = scales.scale_at(i), reciprocal = scales.reciprocal_at(i);
        if (unsigned_) negative = _mm256_or_ps(negative, _mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_LT_OQ));
        const __m256 rounded = _mm256_round_ps(_mm256_mul_ps(value, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        // These give their second operand where one is NaN.
        const __m256 code = _mm256_min_ps(hi, _mm256_max_ps(lo, rounded));
        const __m256 quotient = _mm256_mul_ps(code, reciprocal);
        const __m256 excess = _mm256_fmsub_ps(quotient, scale, code);
        return _mm256_fnmadd_ps(excess, reciprocal, quotient);
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256 first = quantized(i), last = quantized(i + 8);
        store_narrow(first, last, out + i);
    }
    bool bad = _mm256_movemask_ps(negative) != 0;
    for (; i < n; ++i) {
        const float value = widen(x[i]);
        if (unsigned_) bad |= value < 0;
        const int64_t k = Scales::index(i);
        out[i] = narrow(op.apply(value, 0.0f, p[k], q[k], 0.0f), T{});
    }
    return bad;
}

// Whether the parameters lie so that many neighbours share one, or each has the next.
inline bool quick_symmetric_suits(const QdqLayout& layout) {
    return layout.count == 1 || layout.inner >= kLongRun || layout.inner == 1;
}

// In float32 numbers.
constexpr int64_t kCacheLine = 16;

template <bool unsigned_, class T>
int quick_symmetric(const SymmetricFakeQuick<unsigned_> op, const T* x, T* out, const QdqLayout& layout,
                 int threads) {
    const bool by_run = layout.count == 1 || layout.inner >= kLongRun;
    std::vector<float> memory;
    float *scales = nullptr, *reciprocals = nullptr;
    int64_t period = layout.count;
    if (!by_run) {
        // A short list is repeated: a call for a few channels at a time would cost more than they do.
        if (period < kBuffer) period *= (kBuffer + period - 1) / period;
        const int64_t length = (period + kCacheLine - 1) / kCacheLine * kCacheLine;
        memory.resize(static_cast<size_t>(2 * length + kCacheLine));
        // On cache lines: half of the loads would need two of them otherwise.
        scales = memory.data() + (-(reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float)) & (kCacheLine - 1));
        reciprocals = scales + length;
        for (int64_t i = 0; i < period; ++i) {
            if (i < layout.count) {
                float p[kParameters] = {};
                op.parameters(i, p);
                scales[i] = p[0];
                reciprocals[i] = p[1];
            } else {
                scales[i] = scales[i - layout.count];
                reciprocals[i] = reciprocals[i - layout.count];
            }
        }
    }
    bool bad[kMostThreads] = {};
    const int parts = thread_count(layout.n, threads);
    parallel(layout.n, parts, [&](int64_t begin, int64_t end, int index) {
        if (by_run) {
            for_runs(layout, begin, end, [&](int64_t parameter, int64_t start, int64_t n) {
                float p[kParameters] = {};
                op.parameters(parameter, p);
                bad[index] |= quick_run<OneScale>(op, p, p + 1, x + start, out + start, n);
            });
            return;
        }
        for (int64_t i = begin, place = begin % period; i < end; place = 0) {
            const int64_t n = period - place < end - i ? period - place : end - i;
            const float *p = scales + place, *q = reciprocals + place;
            bad[index] |= quick_run<ScaleOfEach>(op, p, q, x + i, out + i, n);
            i += n;
        }
    });
    for (int i = 0; i < parts; ++i)
        if (bad[i]) return QDQ_NEGATIVE_INPUT;
    return 0;
}

}  // namespace

#define QDQ_QUICK_SYMMETRIC 1

#endif

// float16 and bfloat16 to float32 and back, many at a time; rounding half to even, NaN to a quiet NaN.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen(BFloat16 half) { return as_float(static_cast<uint32_t>(half.bits) << 16); }

inline BFloat16 narrow(float value, BFloat16) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return BFloat16{static_cast<uint16_t>(value != value ? 0x7FC0u : rounded)};
}

#if defined(__aarch64__)

inline float widen(Float16 half) {
    __fp16 value;
    std::memcpy(&value, &half.bits, sizeof value);
    return value;
}

inline Float16 narrow(float value, Float16) {
    const __fp16 half = static_cast<__fp16>(value);
    Float16 result;
    std::memcpy(&result.bits, &half, sizeof result.bits);
    return result;
}

#elif defined(__F16C__)

// By the processor, as in the loops below: unlike products of subnormal numbers it heeds no flush-to-zero mode.
inline float widen(Float16 half) { return _cvtsh_ss(half.bits); }

inline Float16 narrow(float value, Float16) {
    return Float16{static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

#else

inline float widen(Float16 half) {
    const uint32_t sign = (half.bits & 0x8000u) << 16;
    const uint32_t rest = half.bits & 0x7FFFu;
    // Exponent and significand in their place, then the difference of the two biases as an exact product; it makes
    // subnormal numbers normal as well. Infinity and NaN need the exponent of float32 filled up.
    const float shifted = as_float(rest << 13) * 0x1p112f;
    const uint32_t filled = rest >= 0x7C00u ? 0x7F800000u : 0u;
    return as_float(as_bits(shifted) | filled | sign);
}

inline Float16 narrow(float value, Float16) {
    const uint32_t bits = as_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t rest = bits & 0x7FFFFFFFu;
    // Normal results: rebias, and round half to even by hand. Overflow carries into infinity by itself.
    const uint32_t normal = (rest - 0x38000000u + 0x0FFFu + ((rest >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 lets the processor's rounding do it; the sum's last bits are the result.
    const uint32_t subnormal = as_bits(as_float(rest) + 0.5f) - 0x3F000000u;
    uint32_t half = rest < 0x38800000u ? subnormal : normal;
    half = rest >= 0x47800000u ? 0x7C00u : half;
    half = rest > 0x7F800000u ? 0x7E00u : half;
    return Float16{static_cast<uint16_t>(half | sign)};
}

#endif

// n numbers of `from` as `to`'s type; nothing to do, and not called, where the two are the same.
template <class Half>
inline void widen_all(const Half* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class Half>
inline void narrow_all(const float* from, Half* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = narrow(from[i], Half{});
}

#if defined(__F16C__)

inline void widen_all(const Float16* from, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (; i < n; ++i) to[i] = widen(from[i]);
}

inline void narrow_all(const float* from, Float16* to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    for (; i < n; ++i) to[i] = narrow(from[i], Float16{});
}

#endif

}  // namespace

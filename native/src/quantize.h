// The elementwise operations. Each is the formula of src/qdq/kernels/reference, in the same order of roundings.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "elementwise.h"

namespace {

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();
template <class C>
constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
template <class C>
constexpr C kTinyAmax = static_cast<C>(0x1p-24);

inline float round_even(float x) { return __builtin_rintf(x); }
inline double round_even(double x) { return __builtin_rint(x); }

// NaN stays.
template <class C>
inline C clamp(C x, C lo, C hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
}

// bound / amax; 1 where amax counts as zero, NaN where it is NaN or infinite.
template <class C>
inline C symmetric_scale(C amax, C bound) {
    if (amax <= kTinyAmax<C>) return C(1);
    return amax == kInfinity<C> ? kNaN<C> : bound / amax;
}

template <class C, bool unsigned_>
struct SymmetricFake {
    static constexpr bool kSecond = false, kRefusesNegative = unsigned_;
    const C* amax;
    C lo, bound;

    void parameters(int64_t p, C* out) const {
        out[0] = symmetric_scale(amax[p], bound);
        // A code over infinity is 0, and NaN stays NaN: what a zero amax asks for.
        out[1] = amax[p] <= kTinyAmax<C> ? kInfinity<C> : out[0];
    }
    C apply(C x, C, C scale, C divisor, C) const { return clamp(round_even(x * scale), lo, bound) / divisor; }
};

#if defined(__FMA__) || defined(__aarch64__)

// The same in float32 for codes of up to 8 bits, without the division that would take longer than all the rest. A
// quotient from the rounded reciprocal, corrected once by its exact remainder, is the rounded quotient (Markstein 1990,
// "Computation of elementary functions on the IBM RISC System/6000 processor"); that one correction is enough for
// integers up to 255 was seen for every significand, and native/check/quotients.c sees it again.
template <bool unsigned_>
struct SymmetricFakeQuick {
    static constexpr bool kSecond = false, kRefusesNegative = unsigned_;
    const float* amax;
    float lo, bound;

    // Whether no parameter is special and all quotients are far from the ends of the exponent's range.
    static bool suits(const float* amax, int64_t count, double lo, double bound) {
        bool all = lo >= -255 && bound <= 255;
        for (int64_t p = 0; p < count; ++p) all &= (amax[p] > 0x1p-24f) & (amax[p] < 0x1p100f);
        return all;
    }
    void parameters(int64_t p, float* out) const {
        out[0] = bound / amax[p];
        out[1] = 1 / out[0];
    }
    float apply(float x, float, float scale, float reciprocal, float) const {
        const float code = clamp(round_even(x * scale), lo, bound);
        const float quotient = code * reciprocal;
        const float excess = __builtin_fmaf(quotient, scale, -code);
        // Written so that a code of -0 gives -0: its excess is +0, and -0 - 0 is -0. (The excess itself is not negated:
        // GCC merges that into the product before, which changes the sign of a zero.)
        return __builtin_fmaf(excess, -reciprocal, quotient);
    }
};

#endif

template <class C, bool unsigned_>
struct SymmetricCodes {
    static constexpr bool kSecond = false, kRefusesNegative = unsigned_;
    const C* amax;
    C lo, bound;

    void parameters(int64_t p, C* out) const {
        out[0] = symmetric_scale(amax[p], bound);
        out[1] = amax[p] <= kTinyAmax<C> ? C(0) : std::isinf(amax[p]) ? kNaN<C> : C(1);
    }
    C apply(C x, C, C scale, C factor, C) const { return clamp(round_even(x * scale), lo, bound) * factor; }
};

template <class C>
struct AffineFake {
    static constexpr bool kSecond = false, kRefusesNegative = false;
    const C *step, *zero;
    C lo, hi;

    void parameters(int64_t p, C* out) const {
        out[0] = step[p];
        out[1] = zero[p];
    }
    C apply(C x, C, C step_size, C zero_point, C) const {
        return (clamp(round_even(x / step_size) + zero_point, lo, hi) - zero_point) * step_size;
    }
};

template <class C>
struct AffineCodes {
    static constexpr bool kSecond = false, kRefusesNegative = false;
    const C *step, *zero;
    C lo, hi;

    void parameters(int64_t p, C* out) const {
        out[0] = step[p];
        out[1] = zero[p];
    }
    C apply(C x, C, C step_size, C zero_point, C) const {
        return clamp(round_even(x / step_size) + zero_point, lo, hi);
    }
};

template <class C>
struct RangeFake {
    static constexpr bool kSecond = false, kRefusesNegative = false;
    const C *low, *high;
    C half;

    void parameters(int64_t p, C* out) const {
        const C width = high[p] - low[p];
        const C step = width == 0 ? C(1) : width / (2 * half - 1);
        out[0] = step;
        out[1] = round_even(low[p] / step) + half;
        // A zero-width range has one value. NaN + anything is NaN, and NaN is what says that there is a width.
        out[2] = width == 0 ? low[p] : kNaN<C>;
    }
    C apply(C x, C, C step, C zero, C only) const {
        const C value = (clamp(round_even(x / step) - zero, -half, half - 1) + zero) * step;
        const C constant = only + clamp(x, C(0), C(0));
        return only == only ? constant : value;
    }
};

struct FloatBits {
    using Int = int32_t;
    static constexpr int kShift = 23, kBias = 127, kMask = 0xFF;
};
struct DoubleBits {
    using Int = int64_t;
    static constexpr int kShift = 52, kBias = 1023, kMask = 0x7FF;
};

template <class C>
struct FloatFormatRounding {
    static constexpr bool kSecond = false, kRefusesNegative = false;
    using Bits = std::conditional_t<std::is_same_v<C, float>, FloatBits, DoubleBits>;
    using Int = typename Bits::Int;
    const C* amax;
    bool scaled, tiny_is_zero;
    Int mantissa_bits, min_exponent;
    C largest;

    static C from_bits(Int bits) {
        C value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    static Int to_bits(C value) {
        Int bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits;
    }

    void parameters(int64_t p, C* out) const {
        if (!scaled) {
            out[0] = out[1] = C(1);
            return;
        }
        out[0] = symmetric_scale(amax[p], largest);
        out[1] = amax[p] <= kTinyAmax<C> ? kInfinity<C> : out[0];
    }
    C rounded(C x) const {
        x = clamp(x, -largest, largest);
        Int exponent = ((to_bits(x) >> Bits::kShift) & Bits::kMask) - Bits::kBias;
        exponent = exponent < min_exponent ? min_exponent : exponent;
        const Int spacing = exponent - mantissa_bits;
        // Powers of two, far from the ends of the exponent's range: both products are exact. The exponent of NaN may
        // be out of it, which leaves NaN.
        const C quantum = from_bits((spacing + Bits::kBias) << Bits::kShift);
        const C inverse = from_bits((Bits::kBias - spacing) << Bits::kShift);
        return x == x ? round_even(x * inverse) * quantum : x;
    }
    C apply(C x, C, C scale, C divisor, C) const {
        // Without a scale both are 1, which changes nothing.
        const C value = rounded(x * scale) / divisor;
        return ((std::fabs(x) < kTinyAmax<C>) & tiny_is_zero) ? C(0) : value;
    }
};

template <class C>
struct PowerOfTwo {
    static constexpr bool kSecond = false, kRefusesNegative = false;
    using Format = FloatFormatRounding<C>;
    using Int = typename Format::Int;

    void parameters(int64_t, C*) const {}
    C apply(C x, C, C, C, C) const {
        // Half of the significand's range added, the exponent alone kept: half way and above goes up.
        const Int half = Int{1} << (Format::Bits::kShift - 1);
        const Int exponent = static_cast<Int>(Format::Bits::kMask) << Format::Bits::kShift;
        const C normal = Format::from_bits((Format::to_bits(x) + half) & exponent);
        // 2**-127 is subnormal in float32; what lies between it and its neighbour goes up.
        C result = x < C(0x1p-126) ? C(0x1p-126) : normal;
        result = x <= C(0x1p-127) ? C(0x1p-127) : result;
        return ((x >= C(0)) & (x < C(0x1.8p127))) ? result : kNaN<C>;
    }
};

template <class C>
struct SymmetricGradient {
    static constexpr bool kSecond = true, kRefusesNegative = false;
    const C* amax;

    void parameters(int64_t p, C* out) const { out[0] = amax[p]; }
    C apply(C x, C grad, C limit, C, C) const { return std::fabs(x) <= limit ? grad : C(0); }
};

template <class C>
struct AffineGradient {
    static constexpr bool kSecond = true, kRefusesNegative = false;
    const C *step, *zero;
    C lo, hi;

    void parameters(int64_t p, C* out) const {
        out[0] = (lo - zero[p]) * step[p];
        out[1] = (hi - zero[p]) * step[p];
    }
    C apply(C x, C grad, C low, C high, C) const { return ((x >= low) & (x <= high)) ? grad : C(0); }
};

// A sum of products of codes, in one or two exact parts, plus an integer bias, as codes of another step: what integer
// convolutions end with. The bias may need more bits than C has, and comes in two parts as well.
template <class C, bool two_parts>
struct Requantize {
    static constexpr bool kSecond = two_parts, kRefusesNegative = false;
    const C *bias_high, *bias_low, *ratio;
    C step;

    void parameters(int64_t p, C* out) const {
        out[0] = bias_high[p];
        out[1] = bias_low[p];
        out[2] = ratio[p];
    }
    C apply(C x, C second, C high, C low, C factor) const {
        const double sum = (static_cast<double>(x) + second) + (static_cast<double>(high) + low);
        return round_even(static_cast<C>(sum) * factor) * step;
    }
};

// The sum of two tensors of codes, as codes of another step: float32 products and sums, each rounded once from float64.
template <class C>
struct AddCodes {
    static constexpr bool kSecond = true, kRefusesNegative = false;
    C inverse_a, zero_a, ratio_a, inverse_b, zero_b, ratio_b, fixed, zero, step;

    void parameters(int64_t, C*) const {}
    C apply(C x, C second, C, C, C) const {
        // The values lie on their grids: a product with the inverse is as near to the code as the quotient.
        const double a = round_even(x * inverse_a) + zero_a, b = round_even(second * inverse_b) + zero_b;
        const C inner = static_cast<C>(b * static_cast<double>(ratio_b) + static_cast<double>(fixed));
        const C sum = static_cast<C>(a * static_cast<double>(ratio_a) + static_cast<double>(inner));
        return (round_even(sum) - zero) * step;
    }
};

}  // namespace

// Compiled once for every instruction set, with QDQ_LEVEL the name of the table. Everything but the table is in an
// anonymous namespace: functions of two instruction sets must never be merged by the linker.
#include "level.h"

#include "histogram.h"
#include "quantize.h"
#include "quick_symmetric.h"
#include "reductions.h"

namespace {

template <class T>
using ComputeOf = typename Compute<T>::Type;

// body(T{}) for the type of `dtype`; out of memory is reported, as no exception may leave a C function.
template <class Body>
int for_dtype(int dtype, const Body& body) {
    try {
        switch (dtype) {
            case QDQ_FLOAT32: return body(float{});
            case QDQ_FLOAT64: return body(double{});
            case QDQ_FLOAT16: return body(Float16{});
            default: return body(BFloat16{});
        }
    } catch (...) {  // the standard library throws only for memory here; nothing may leave a C function
        return QDQ_NO_MEMORY;
    }
}

template <class C>
bool any_below_zero(const C* values, int64_t n) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= values[i] < C(0);
    return found;
}

template <class C>
bool any_not_positive(const C* values, int64_t n) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= values[i] <= C(0);
    return found;
}

int symmetric(int dtype, int codes, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count,
              const void* amax_, double lo, double bound, int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        using C = ComputeOf<T>;
        const C* amax = static_cast<const C*>(amax_);
        const C low = static_cast<C>(lo), high = static_cast<C>(bound);
        if (any_below_zero(amax, count)) return static_cast<int>(QDQ_NEGATIVE_PARAMETER);
        if (codes) {
            if (lo < 0) return elementwise<SymmetricCodes<C, false>, T, T>({amax, low, high}, x, 0, out, layout, threads);
            return elementwise<SymmetricCodes<C, true>, T, T>({amax, low, high}, x, 0, out, layout, threads);
        }
#if defined(__FMA__) || defined(__aarch64__)
        if constexpr (std::is_same_v<C, float>) {
            if (SymmetricFakeQuick<false>::suits(amax, count, lo, bound)) {
#if defined(QDQ_QUICK_SYMMETRIC)
                if (quick_symmetric_suits(layout)) {
                    const T* from = static_cast<const T*>(x);
                    T* to = static_cast<T*>(out);
                    if (lo < 0) return quick_symmetric<false>({amax, low, high}, from, to, layout, threads);
                    return quick_symmetric<true>({amax, low, high}, from, to, layout, threads);
                }
#endif
                if (lo < 0) return elementwise<SymmetricFakeQuick<false>, T, T>({amax, low, high}, x, 0, out, layout, threads);
                return elementwise<SymmetricFakeQuick<true>, T, T>({amax, low, high}, x, 0, out, layout, threads);
            }
        }
#endif
        if (lo < 0) return elementwise<SymmetricFake<C, false>, T, T>({amax, low, high}, x, 0, out, layout, threads);
        return elementwise<SymmetricFake<C, true>, T, T>({amax, low, high}, x, 0, out, layout, threads);
    });
}

int affine(int dtype, int codes, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count,
           const void* step_, const void* zero_, double lo, double hi, int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        using C = ComputeOf<T>;
        const C *step = static_cast<const C*>(step_), *zero = static_cast<const C*>(zero_);
        const C low = static_cast<C>(lo), high = static_cast<C>(hi);
        if (any_not_positive(step, count)) return static_cast<int>(QDQ_NEGATIVE_PARAMETER);
        if (codes) return elementwise<AffineCodes<C>, T, C>({step, zero, low, high}, x, 0, out, layout, threads);
        return elementwise<AffineFake<C>, T, T>({step, zero, low, high}, x, 0, out, layout, threads);
    });
}

int range(int dtype, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count, const void* low_,
          const void* high_, int num_bits, int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        using C = ComputeOf<T>;
        const C *low = static_cast<const C*>(low_), *high = static_cast<const C*>(high_);
        for (int64_t i = 0; i < count; ++i)
            if (low[i] > high[i]) return static_cast<int>(QDQ_UNORDERED_RANGE);
        const C half = static_cast<C>(std::ldexp(1.0, num_bits - 1));
        return elementwise<RangeFake<C>, T, T>({low, high, half}, x, 0, out, layout, threads);
    });
}

int float_format(int dtype, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count,
                 const void* amax_, int plain, int mantissa_bits, int min_exponent, double max_value,
                 int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        using C = ComputeOf<T>;
        const C* amax = static_cast<const C*>(amax_);
        if (amax && any_below_zero(amax, count)) return static_cast<int>(QDQ_NEGATIVE_PARAMETER);
        const FloatFormatRounding<C> op{amax, amax != nullptr, plain == 0, mantissa_bits, min_exponent, static_cast<C>(max_value)};
        return elementwise<FloatFormatRounding<C>, T, T>(op, x, 0, out, layout, threads);
    });
}

int e8m0(int dtype, const void* x, void* out, int64_t n, int threads) {
    const QdqLayout layout{n, n, n, 1};
    return for_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        return elementwise<PowerOfTwo<ComputeOf<T>>, T, T>({}, x, 0, out, layout, threads);
    });
}

int requantize(const float* x, const float* second, float* out, int64_t n, int64_t row, int64_t inner, int64_t count,
               const float* bias_high, const float* bias_low, const float* ratio, float step, int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(QDQ_FLOAT32, [&](auto) {
        using One = Requantize<float, false>;
        using Two = Requantize<float, true>;
        if (!second) return elementwise<One, float, float>({bias_high, bias_low, ratio, step}, x, 0, out, layout, threads);
        return elementwise<Two, float, float>({bias_high, bias_low, ratio, step}, x, second, out, layout, threads);
    });
}

int add_codes(const float* x, const float* second, float* out, int64_t n, const float* numbers, int threads) {
    const QdqLayout layout{n, n, n, 1};
    return for_dtype(QDQ_FLOAT32, [&](auto) {
        const AddCodes<float> op{1 / numbers[0], numbers[1], numbers[2], 1 / numbers[3], numbers[4],
                                 numbers[5],     numbers[6], numbers[7], numbers[8]};
        return elementwise<AddCodes<float>, float, float>(op, x, second, out, layout, threads);
    });
}

int symmetric_gradient(int dtype, const void* grad, const void* x, void* out, int64_t n, int64_t row, int64_t inner,
                       int64_t count, const void* amax, int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        using C = ComputeOf<T>;
        return elementwise<SymmetricGradient<C>, T, T>({static_cast<const C*>(amax)}, x, grad, out, layout, threads);
    });
}

int affine_gradient(int dtype, const void* grad, const void* x, void* out, int64_t n, int64_t row, int64_t inner,
                    int64_t count, const void* step, const void* zero, double lo, double hi, int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        using C = ComputeOf<T>;
        const AffineGradient<C> op{static_cast<const C*>(step), static_cast<const C*>(zero), static_cast<C>(lo),
                                   static_cast<C>(hi)};
        return elementwise<AffineGradient<C>, T, T>(op, x, grad, out, layout, threads);
    });
}

int range_gradient_(int dtype, int inclusive, const void* grad, const void* x, void* out, int64_t n, const void* low,
                    const void* high, double* sums, int threads) {
    return for_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        if (inclusive) return range_gradient<T, true>(grad, x, out, n, low, high, sums, threads);
        return range_gradient<T, false>(grad, x, out, n, low, high, sums, threads);
    });
}

int absmax(int dtype, const void* x, int64_t n, int64_t row, int64_t inner, int64_t count, void* out, int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(dtype, [&](auto number) {
        return reduce_range<decltype(number), true>(x, layout, nullptr, out, threads);
    });
}

int minmax(int dtype, const void* x, int64_t n, int64_t row, int64_t inner, int64_t count, void* low, void* high,
           int threads) {
    const QdqLayout layout{n, row, inner, count};
    return for_dtype(dtype, [&](auto number) {
        return reduce_range<decltype(number), false>(x, layout, low, high, threads);
    });
}

int histogram_(int dtype, int absolute, const void* x, int64_t n, double width, int64_t first, int64_t bins,
               int64_t* counts, int64_t* others, int threads) {
    return for_dtype(dtype, [&](auto number) {
        const Bins all{width, first, bins, absolute != 0};
        return histogram<decltype(number)>(all, x, n, counts, others, threads);
    });
}

}  // namespace


extern const Level QDQ_LEVEL;
const Level QDQ_LEVEL = {
    QDQ_LEVEL_NAME, symmetric,       affine, range,  float_format, e8m0, requantize, add_codes, symmetric_gradient,
    affine_gradient, range_gradient_, absmax, minmax, histogram_,
};

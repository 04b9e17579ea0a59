// Smallest and largest values, and sums of gradients, in one read.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "elementwise.h"
#include "quantize.h"

namespace {

// Accumulators of a vector register each: enough to hide the latency of a comparison.
template <class C>
struct Lanes {
    static constexpr int kWidth = 32 / sizeof(C), kCount = 4;
    typedef C Vector __attribute__((vector_size(32), aligned(sizeof(C))));
};

// What was seen of one parameter's elements.
template <class C>
struct Range {
    C low = kInfinity<C>, high = -kInfinity<C>;
    bool nan = false;

    void add(const Range& other) {
        if (other.low < low) low = other.low;
        if (other.high > high) high = other.high;
        nan |= other.nan;
    }
};

template <class C, bool absolute>
inline Range<C> range_of(const C* x, int64_t n) {
    using Vector = typename Lanes<C>::Vector;
    constexpr int kWidth = Lanes<C>::kWidth, kCount = Lanes<C>::kCount;
    Range<C> result;
    int64_t i = 0;
    if (n >= kWidth * kCount) {
        Vector low[kCount], high[kCount];
        auto odd = Vector{} != Vector{};
        const Vector least = Vector{} - kInfinity<C>, most = Vector{} + kInfinity<C>;
        for (int k = 0; k < kCount; ++k) {
            low[k] = most;
            high[k] = least;
        }
        for (; i + kWidth * kCount <= n; i += kWidth * kCount) {
#pragma GCC unroll 4
            for (int k = 0; k < kCount; ++k) {
                Vector v = *reinterpret_cast<const Vector*>(x + i + k * kWidth);
                odd |= v != v;
                if (absolute) {
                    v = v < 0 ? -v : v;
                } else {
                    low[k] = v < low[k] ? v : low[k];
                }
                high[k] = v > high[k] ? v : high[k];
            }
        }
        for (int k = 0; k < kCount; ++k) {
            for (int j = 0; j < kWidth; ++j) {
                result.add(Range<C>{low[k][j], high[k][j], odd[j] != 0});
            }
        }
    }
    for (; i < n; ++i) {
        const C v = absolute ? std::fabs(x[i]) : x[i];
        result.add(Range<C>{v, v, v != v});
    }
    return result;
}

// Ranges of all parameters of a slice of the tensor.
template <class C, bool absolute>
class Ranges {
   public:
    explicit Ranges(const QdqLayout& layout)
        : layout_(layout), low_(static_cast<size_t>(layout.count), kInfinity<C>),
          high_(static_cast<size_t>(layout.count), absolute ? C(0) : -kInfinity<C>),
          nan_(static_cast<size_t>(layout.count), C(0)) {}

    void take(const C* x, int64_t begin, int64_t end) {
        if (layout_.inner == 1 && layout_.count >= 8) {
            int64_t p = begin % layout_.count;
            for (int64_t i = begin; i < end; p = 0) {
                int64_t n = layout_.count - p;
                if (n > end - i) n = end - i;
                take_each(x + (i - begin), p, n);
                i += n;
            }
            return;
        }
        for_runs(layout_, begin, end, [&](int64_t p, int64_t start, int64_t n) {
            const Range<C> seen = range_of<C, absolute>(x + (start - begin), n);
            merge(p, seen.low, seen.high, seen.nan ? kNaN<C> : C(0));
        });
    }

    void add(const Ranges& other) {
        for (int64_t p = 0; p < layout_.count; ++p) {
            const auto i = static_cast<size_t>(p);
            merge(p, other.low_[i], other.high_[i], other.nan_[i]);
        }
    }

    // Adding 0 turns -0 into 0, so that the result does not depend on the order; adding NaN marks what held one.
    C low(int64_t p) const { return low_[static_cast<size_t>(p)] + nan_[static_cast<size_t>(p)]; }
    C high(int64_t p) const { return high_[static_cast<size_t>(p)] + nan_[static_cast<size_t>(p)]; }

   private:
    void merge(int64_t p, C low, C high, C nan) {
        const auto i = static_cast<size_t>(p);
        if (low < low_[i]) low_[i] = low;
        if (high > high_[i]) high_[i] = high;
        nan_[i] += nan;
    }

    void take_each(const C* __restrict x, int64_t p, int64_t n) {
        C* __restrict low = low_.data() + p;
        C* __restrict high = high_.data() + p;
        C* __restrict nan = nan_.data() + p;
        for (int64_t i = 0; i < n; ++i) {
            const C v = absolute ? std::fabs(x[i]) : x[i];
            if (!absolute) low[i] = v < low[i] ? v : low[i];
            high[i] = v > high[i] ? v : high[i];
            nan[i] = v == v ? nan[i] : v;
        }
    }

    QdqLayout layout_;
    std::vector<C> low_, high_, nan_;
};

template <class T, bool absolute>
int reduce_range(const void* x_, const QdqLayout& layout, void* low_, void* high_, int threads) {
    using C = typename Compute<T>::Type;
    const T* x = static_cast<const T*>(x_);
    const int parts = thread_count(layout.n, threads);
    std::vector<Ranges<C, absolute>> seen(static_cast<size_t>(parts), Ranges<C, absolute>(layout));
    parallel(layout.n, parts, [&](int64_t begin, int64_t end, int index) {
        auto& mine = seen[static_cast<size_t>(index)];
        if constexpr (std::is_same_v<T, C>) {
            mine.take(x + begin, begin, end);
        } else {
            alignas(64) C wide[kBuffer];
            for (int64_t i = begin; i < end; i += kBuffer) {
                const int64_t n = i + kBuffer < end ? kBuffer : end - i;
                widen_all(x + i, wide, n);
                mine.take(wide, i, i + n);
            }
        }
    });
    for (int i = 1; i < parts; ++i) seen[0].add(seen[static_cast<size_t>(i)]);
    T* low = static_cast<T*>(low_);
    T* high = static_cast<T*>(high_);
    for (int64_t p = 0; p < layout.count; ++p) {
        if constexpr (std::is_same_v<T, C>) {
            if (low) low[p] = seen[0].low(p);
            high[p] = seen[0].high(p);
        } else {
            if (low) low[p] = narrow(seen[0].low(p), T{});
            high[p] = narrow(seen[0].high(p), T{});
        }
    }
    return 0;
}

// Sums are taken in float64 over slices of fixed length, in their order, so that threads change no digit.
constexpr int64_t kSumSlice = kBuffer;

template <class C, bool inclusive>
inline void range_gradient_slice(const C* grad, const C* x, C* out, int64_t n, C low, C high, double* sums) {
    constexpr int kLanes = 4;
    typedef C Numbers __attribute__((vector_size(kLanes * sizeof(C)), aligned(sizeof(C))));
    typedef double Sums __attribute__((vector_size(kLanes * sizeof(double))));
    Sums below = {}, above = {};
    const Numbers none = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Numbers v = *reinterpret_cast<const Numbers*>(x + i), g = *reinterpret_cast<const Numbers*>(grad + i);
        const auto under = inclusive ? v < low : v <= low, over = inclusive ? v > high : v >= high;
        const auto inside = inclusive ? (v >= low) & (v <= high) : (v > low) & (v < high);
        below += __builtin_convertvector(under ? g : none, Sums);
        above += __builtin_convertvector(over ? g : none, Sums);
        *reinterpret_cast<Numbers*>(out + i) = inside ? g : none;
    }
    double under_all = (below[0] + below[1]) + (below[2] + below[3]);
    double over_all = (above[0] + above[1]) + (above[2] + above[3]);
    for (; i < n; ++i) {
        const C v = x[i], g = grad[i];
        if (inclusive ? v < low : v <= low) under_all += static_cast<double>(g);
        if (inclusive ? v > high : v >= high) over_all += static_cast<double>(g);
        const bool inside = inclusive ? v >= low && v <= high : v > low && v < high;
        out[i] = inside ? g : C(0);
    }
    sums[0] = under_all;
    sums[1] = over_all;
}

template <class T, bool inclusive>
int range_gradient(const void* grad_, const void* x_, void* out_, int64_t n, const void* low_, const void* high_,
                   double* sums, int threads) {
    using C = typename Compute<T>::Type;
    const T *grad = static_cast<const T*>(grad_), *x = static_cast<const T*>(x_);
    T* out = static_cast<T*>(out_);
    const C low = *static_cast<const C*>(low_), high = *static_cast<const C*>(high_);
    const int64_t slices = (n + kSumSlice - 1) / kSumSlice;
    std::vector<double> all(static_cast<size_t>(2 * slices));
    // Threads take whole slices: their number is divided, not that of the elements.
    parallel(slices, thread_count(n, threads), [&](int64_t first, int64_t last, int) {
        for (int64_t slice = first; slice < last; ++slice) {
            const int64_t begin = slice * kSumSlice, length = begin + kSumSlice < n ? kSumSlice : n - begin;
            double* into = all.data() + 2 * slice;
            if constexpr (std::is_same_v<T, C>) {
                range_gradient_slice<C, inclusive>(grad + begin, x + begin, out + begin, length, low, high, into);
            } else {
                alignas(64) C wide[kSumSlice], wide_grad[kSumSlice];
                widen_all(x + begin, wide, length);
                widen_all(grad + begin, wide_grad, length);
                range_gradient_slice<C, inclusive>(wide_grad, wide, wide, length, low, high, into);
                narrow_all(wide, out + begin, length);
            }
        }
    }, 1);
    sums[0] = sums[1] = 0;
    for (int64_t slice = 0; slice < slices; ++slice) {
        sums[0] += all[static_cast<size_t>(2 * slice)];
        sums[1] += all[static_cast<size_t>(2 * slice + 1)];
    }
    return 0;
}

}  // namespace

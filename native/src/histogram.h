// Counting values into bins of equal width in one read, exactly.
//
// The bin of a value is floor(x / width), where the edges are k * width rounded to float64. A product with the
// reciprocal in x's own type is many times faster, and wrong only within its rounding error of an edge: values that lie
// so close are looked at again, in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "elementwise.h"
#include "quantize.h"

namespace {

constexpr int64_t kCountBlock = 64;
// 32-bit counters cannot overflow in this many elements.
constexpr int64_t kFlush = int64_t{1} << 30;
// Several tables, so that equal values in a row do not wait for each other's counter; while they fit the first cache.
constexpr int kTables = 4;
constexpr int64_t kMostTableBins = 1 << 14;

struct Bins {
    double width;
    int64_t first, count;
    bool absolute;

    // The definition: the number of the bin of a value that lies in one.
    int64_t exact(double x) const {
        double index = std::floor(x / width);
        index -= index * width > x;
        index += (index + 1) * width <= x;
        const int64_t bin = static_cast<int64_t>(index) - first;
        return (bin < 0 ? 0 : bin >= count ? count - 1 : bin) + first;
    }
};

// Smallest and largest C that lie in a bin.
template <class C>
struct Limits {
    C low, high;

    explicit Limits(const Bins& bins) {
        const double top = static_cast<double>(bins.first + bins.count) * bins.width;
        if (bins.absolute) {
            low = 0;
            high = below(top * (1 + 1e-12), true);
        } else {
            const double bottom = static_cast<double>(bins.first) * bins.width;
            low = static_cast<C>(bottom);
            if (static_cast<double>(low) < bottom) low = std::nextafter(low, kInfinity<C>);
            high = below(top, false);
        }
        const C finite = std::numeric_limits<C>::max();
        if (high > finite) high = finite;
        if (low < -finite) low = -finite;
    }

    static C below(double end, bool inclusive) {
        const C value = static_cast<C>(end);
        const bool fits = inclusive ? static_cast<double>(value) <= end : static_cast<double>(value) < end;
        return fits ? value : std::nextafter(value, -kInfinity<C>);
    }
};

// How a product with the reciprocal becomes a bin.
enum class Binning {
    kAbsolute,        // |x|, bins from 0
    kPowerOfTwo,      // of a width that makes the product exact
    kWidePowerOfTwo,  // above 1: exact, but that it may be 0 for denormal numbers
    kSigned,
};

template <class C>
class alignas(128) Counter {  // threads count side by side, and must not share a line of the cache
   public:
    explicit Counter(const Bins& bins)
        : bins_(bins), limits_(bins), tables_(bins.count <= kMostTableBins ? kTables : 1), stride_(bins.count + 16),
          table_(static_cast<size_t>(tables_ * stride_)), counts_(static_cast<size_t>(bins.count)) {
        int exponent;
        const bool power_of_two = std::frexp(bins.width, &exponent) == 0.5;
        inverse_ = static_cast<C>(1 / bins.width);
        const double most = std::fmax(std::fabs(static_cast<double>(bins.first)),
                                      std::fabs(static_cast<double>(bins.first + bins.count)));
        // The reciprocal and the product each round by half an epsilon, and adding this to the product once more.
        error_ = static_cast<C>(2 * most * std::numeric_limits<C>::epsilon());
        binning_ = bins.absolute    ? Binning::kAbsolute
                   : !power_of_two  ? Binning::kSigned
                   : inverse_ >= 1  ? Binning::kPowerOfTwo
                                    : Binning::kWidePowerOfTwo;
        usable_ = std::isnormal(inverse_) && error_ < C(0.25) && most < double(1 << 30);
    }

    // False where C is too narrow for these bins.
    bool usable() const { return usable_; }

    void count(const C* x, int64_t n) {
        since_flush_ += n;
        if (since_flush_ > kFlush) flush(n);
        int64_t i = 0;
        for (; i + kCountBlock <= n; i += kCountBlock) count_block(x + i);
        if (i == n) return;
        C rest[kCountBlock];
        for (int64_t k = 0; k < kCountBlock; ++k) rest[k] = i + k < n ? x[i + k] : kNaN<C>;
        count_block(rest);
        outside_ -= kCountBlock - (n - i);
    }

    void add_to(int64_t* counts, int64_t* others) {
        flush(0);
        for (int64_t k = 0; k < bins_.count; ++k) counts[k] += counts_[static_cast<size_t>(k)];
        others[0] += outside_;
        others[1] += zeros_;
    }

   private:
    using Index = std::conditional_t<std::is_same_v<C, float>, int32_t, int64_t>;
    static constexpr int kLanes = 32 / sizeof(C);
    typedef C Values __attribute__((vector_size(32), aligned(sizeof(C))));
    typedef Index Indices __attribute__((vector_size(32)));

    static bool any(Indices mask) {
#if defined(__AVX__)
        typedef long long Words __attribute__((vector_size(32)));
        return !__builtin_ia32_ptestz256((Words)mask, (Words)mask);
#else
        Index found = 0;
        for (int k = 0; k < kLanes; ++k) found |= mask[k];
        return found != 0;
#endif
    }

    void count_block(const C* x) {
        switch (binning_) {
            case Binning::kAbsolute: return count_block_by<Binning::kAbsolute>(x);
            case Binning::kPowerOfTwo: return count_block_by<Binning::kPowerOfTwo>(x);
            case Binning::kWidePowerOfTwo: return count_block_by<Binning::kWidePowerOfTwo>(x);
            default: return count_block_by<Binning::kSigned>(x);
        }
    }

    template <Binning binning>
    void count_block_by(const C* x) {
        constexpr bool absolute = binning == Binning::kAbsolute;
        alignas(32) Index bin[kCountBlock];
        Indices zeros = {};
        // The quotient of the largest value may be the number of bins; what lies in none goes after that.
        const Index first = static_cast<Index>(bins_.first), after = static_cast<Index>(bins_.first + bins_.count + 1);
        const Indices dump = Indices{} + after;
        const C low = limits_.low, high = limits_.high, inverse = inverse_, error = error_;
        const Values none = {};
        for (int64_t i = 0; i < kCountBlock; i += kLanes) {
            Values v = *reinterpret_cast<const Values*>(x + i);
            if (absolute) v = (Values)((Indices)v & ~(Indices)(-none));
            Indices inside = v <= high;
            if (!absolute) inside &= v >= low;
            const Values scaled = (Values)((Indices)(v * inverse) & inside);
            Indices index, unsure = {};
            if (absolute) {
                // Negative numbers below 1 are truncated to 0, which is right for zeros and what is close to them.
                index = __builtin_convertvector(scaled + error, Indices);
                unsure = index ^ __builtin_convertvector(scaled - error, Indices);
            } else {
                index = __builtin_convertvector(scaled, Indices);
                index += __builtin_convertvector(index, Values) > scaled;  // a comparison gives 0 or -1
                if (binning == Binning::kWidePowerOfTwo) index += (scaled == 0) & (v < 0);
                if (binning == Binning::kSigned) {
                    const Values above = scaled - __builtin_convertvector(index, Values);
                    unsure = ((above <= error) | (above >= 1 - error)) & ~(v == 0) & inside;
                }
            }
            zeros += v == 0;
            index = inside ? index : dump;
            *reinterpret_cast<Indices*>(bin + i) = index;
            if ((absolute || binning == Binning::kSigned) && __builtin_expect(any(unsure), 0)) {
                for (int k = 0; k < kLanes; ++k)
                    if (bin[i + k] != after) bin[i + k] = static_cast<Index>(bins_.exact(static_cast<double>(v[k])));
            }
        }
        for (int k = 0; k < kLanes; ++k) zeros_ -= zeros[k];
        uint32_t* table = table_.data() - first;
        if (tables_ == kTables) {
            uint32_t *const second = table + stride_, *const third = second + stride_, *const fourth = third + stride_;
            for (int64_t i = 0; i < kCountBlock; i += kTables) {
                ++table[bin[i]];
                ++second[bin[i + 1]];
                ++third[bin[i + 2]];
                ++fourth[bin[i + 3]];
            }
        } else {
            for (int64_t i = 0; i < kCountBlock; ++i) ++table[bin[i]];
        }
    }

    void flush(int64_t coming) {
        for (int t = 0; t < tables_; ++t) {
            const uint32_t* table = table_.data() + t * stride_;
            for (int64_t k = 0; k < bins_.count; ++k) counts_[static_cast<size_t>(k)] += table[k];
            // Beyond the last edge, but not beyond the end.
            counts_[static_cast<size_t>(bins_.count - 1)] += table[bins_.count];
            outside_ += table[bins_.count + 1];
        }
        std::fill(table_.begin(), table_.end(), 0u);
        since_flush_ = coming;
    }

    const Bins bins_;
    const Limits<C> limits_;
    const int tables_;
    const int64_t stride_;
    std::vector<uint32_t> table_;
    std::vector<int64_t> counts_;
    C inverse_, error_;
    Binning binning_;
    bool usable_;
    int64_t outside_ = 0, zeros_ = 0, since_flush_ = 0;
};

// Values by the definition alone, where no product is exact enough.
inline void count_exactly(const Bins& bins, const double* x, int64_t n, int64_t* counts, int64_t* others) {
    const Limits<double> limits(bins);
    for (int64_t i = 0; i < n; ++i) {
        const double v = bins.absolute ? std::fabs(x[i]) : x[i];
        if (v >= limits.low && v <= limits.high)
            ++counts[bins.exact(v) - bins.first];
        else
            ++others[0];
        others[1] += v == 0;
    }
}

template <class C, class T>
inline const C* as_type(const T* x, C* buffer, int64_t n) {
    if constexpr (std::is_same_v<T, C>) {
        return x;
    } else if constexpr (std::is_same_v<T, float>) {
        for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<C>(x[i]);
        return buffer;
    } else if constexpr (std::is_same_v<C, float>) {
        widen_all(x, buffer, n);
        return buffer;
    } else {
        for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<C>(widen(x[i]));
        return buffer;
    }
}

template <class C, class T>
bool histogram_in(const Bins& bins, const T* x, int64_t n, int64_t* counts, int64_t* others, int parts) {
    std::vector<Counter<C>> counters;
    counters.reserve(static_cast<size_t>(parts));
    for (int i = 0; i < parts; ++i) counters.emplace_back(bins);
    if (!counters[0].usable()) return false;
    parallel(n, parts, [&](int64_t begin, int64_t end, int index) {
        C buffer[kBuffer];
        for (int64_t i = begin; i < end; i += kBuffer) {
            const int64_t length = i + kBuffer < end ? kBuffer : end - i;
            counters[static_cast<size_t>(index)].count(as_type<C>(x + i, buffer, length), length);
        }
    });
    for (auto& counter : counters) counter.add_to(counts, others);
    return true;
}

template <class T>
int histogram(const Bins& bins, const void* x_, int64_t n, int64_t* counts, int64_t* others, int threads) {
    const T* x = static_cast<const T*>(x_);
    const int parts = thread_count(n, threads);
    if constexpr (!std::is_same_v<T, double>) {
        if (histogram_in<float>(bins, x, n, counts, others, parts)) return 0;
    }
    if (histogram_in<double>(bins, x, n, counts, others, parts)) return 0;
    double buffer[kBuffer];
    for (int64_t i = 0; i < n; i += kBuffer) {
        const int64_t length = i + kBuffer < n ? kBuffer : n - i;
        count_exactly(bins, as_type<double>(x + i, buffer, length), length, counts, others);
    }
    return 0;
}

}  // namespace

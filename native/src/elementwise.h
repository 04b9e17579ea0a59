// One loop for every elementwise operation: parameters by run or by element, 16-bit numbers through a buffer.
//
// An operation is a struct with
//   kSecond            whether it reads a second tensor (a gradient)
//   kRefusesNegative   whether an x below 0 is refused
//   parameters(p, out) the up to three numbers that the elements of parameter p need
//   apply(x, second, a, b, c)
#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "halves.h"
#include "layout.h"
#include "threads.h"

namespace {

constexpr int kParameters = 3;
// Elements of 16 bits are widened, and parameters of short runs are spread out, this many at a time: in the first cache.
constexpr int64_t kBuffer = 1024;
// Runs from this length on are vectorised one by one.
constexpr int64_t kLongRun = 32;

template <class T>
struct Compute {
    using Type = float;
};
template <>
struct Compute<double> {
    using Type = double;
};

#if defined(__GNUC__)
#define QDQ_NOINLINE __attribute__((noinline))
#endif

// `out` may be the tensor that is read, but always at the same index: that is no reason not to vectorise.
#if defined(__clang__)
#define QDQ_SAME_INDEX _Pragma("clang loop vectorize(assume_safety)")
#else
#define QDQ_SAME_INDEX _Pragma("GCC ivdep")
#endif

// [0, n) with one set of parameters. Not inlined: seeing where the parameters come from, compilers make a loop for every
// special case, and vectorise none.
template <class Op, class C>
QDQ_NOINLINE bool apply_run(const Op op, const C* p, const C* x, const C* second, C* out, int64_t n) {
    const C a = p[0], b = p[1], c = p[2];
    if (Op::kRefusesNegative) {
        int bad = 0;
QDQ_SAME_INDEX
        for (int64_t i = 0; i < n; ++i) {
            const C value = x[i];
            bad |= value < C(0);
            out[i] = op.apply(value, C(0), a, b, c);
        }
        return bad != 0;
    }
    if (Op::kSecond) {
QDQ_SAME_INDEX
        for (int64_t i = 0; i < n; ++i) out[i] = op.apply(x[i], second[i], a, b, c);
    } else {
QDQ_SAME_INDEX
        for (int64_t i = 0; i < n; ++i) out[i] = op.apply(x[i], C(0), a, b, c);
    }
    return false;
}

// [0, n) with parameters of its own for each element.
template <class Op, class C>
QDQ_NOINLINE bool apply_each(const Op op, const C* a, const C* b, const C* c, const C* x, const C* second, C* out,
                       int64_t n) {
    if (Op::kRefusesNegative) {
        int bad = 0;
QDQ_SAME_INDEX
        for (int64_t i = 0; i < n; ++i) {
            const C value = x[i];
            bad |= value < C(0);
            out[i] = op.apply(value, C(0), a[i], b[i], c[i]);
        }
        return bad != 0;
    }
    if (Op::kSecond) {
QDQ_SAME_INDEX
        for (int64_t i = 0; i < n; ++i) out[i] = op.apply(x[i], second[i], a[i], b[i], c[i]);
    } else {
QDQ_SAME_INDEX
        for (int64_t i = 0; i < n; ++i) out[i] = op.apply(x[i], C(0), a[i], b[i], c[i]);
    }
    return false;
}

// A tensor, and the parameters of all its elements where runs are short.
template <class Op, class C>
class Elementwise {
   public:
    Elementwise(const Op& op, const QdqLayout& layout) : op_(op), layout_(layout) {
        by_run_ = layout.count == 1 || layout.inner >= kLongRun;
        if (by_run_) return;
        // Read as they are, the lists are repeated: a call for a few channels at a time would cost more than they do.
        const bool repeated = layout.inner == 1 && layout.count < kBuffer;
        period_ = layout.count * (repeated ? (kBuffer + layout.count - 1) / layout.count : 1);
        for (auto& list : lists_) list.resize(static_cast<size_t>(period_));
        for (int64_t p = 0; p < period_; ++p) {
            C values[kParameters] = {};
            op.parameters(p % layout.count, values);
            for (int k = 0; k < kParameters; ++k) lists_[k][static_cast<size_t>(p)] = values[k];
        }
    }

    // Elements [begin, end); the pointers are those of element `begin`.
    bool operator()(const C* x, const C* second, C* out, int64_t begin, int64_t end) const {
        bool bad = false;
        auto at = [&](int64_t i) { return Op::kSecond ? second + i : second; };
        if (by_run_) {
            for_runs(layout_, begin, end, [&](int64_t p, int64_t start, int64_t n) {
                C values[kParameters] = {};
                op_.parameters(p, values);
                const int64_t i = start - begin;
                bad |= apply_run(op_, values, x + i, at(i), out + i, n);
            });
            return bad;
        }
        if (layout_.inner == 1) {
            // Neighbours belong to neighbouring parameters until the last: the lists can be read as they are.
            int64_t p = begin % period_;
            for (int64_t i = begin; i < end; p = 0) {
                int64_t n = period_ - p;
                if (n > end - i) n = end - i;
                const int64_t k = i - begin;
                bad |= apply_each(op_, lists_[0].data() + p, lists_[1].data() + p, lists_[2].data() + p, x + k, at(k),
                                  out + k, n);
                i += n;
            }
            return bad;
        }
        C spread[kParameters][kBuffer];
        for (int64_t i = begin; i < end; i += kBuffer) {
            const int64_t stop = i + kBuffer < end ? i + kBuffer : end;
            for_runs(layout_, i, stop, [&](int64_t p, int64_t start, int64_t n) {
                for (int k = 0; k < kParameters; ++k) {
                    const C value = lists_[k][static_cast<size_t>(p)];
                    C* to = spread[k] + (start - i);
                    for (int64_t j = 0; j < n; ++j) to[j] = value;
                }
            });
            const int64_t k = i - begin;
            bad |= apply_each(op_, spread[0], spread[1], spread[2], x + k, at(k), out + k, stop - i);
        }
        return bad;
    }

   private:
    const Op& op_;
    const QdqLayout layout_;
    bool by_run_;
    int64_t period_ = 0;
    std::vector<C> lists_[kParameters];
};

// `Out` is `In` or its compute type.
template <class Op, class In, class Out>
int elementwise(const Op& op, const void* x_, const void* second_, void* out_, const QdqLayout& layout, int threads) {
    using C = typename Compute<In>::Type;
    const In* x = static_cast<const In*>(x_);
    const In* second = static_cast<const In*>(second_);
    Out* out = static_cast<Out*>(out_);
    const Elementwise<Op, C> run(op, layout);
    bool bad[kMostThreads] = {};
    const int parts = thread_count(layout.n, threads);
    parallel(layout.n, parts, [&](int64_t begin, int64_t end, int index) {
        if constexpr (std::is_same_v<In, C>) {
            bad[index] = run(x + begin, Op::kSecond ? second + begin : nullptr, out + begin, begin, end);
        } else {
            alignas(64) C wide[kBuffer], wide_second[Op::kSecond ? kBuffer : 1];
            bool found = false;
            for (int64_t i = begin; i < end; i += kBuffer) {
                const int64_t n = i + kBuffer < end ? kBuffer : end - i;
                widen_all(x + i, wide, n);
                if constexpr (Op::kSecond) widen_all(second + i, wide_second, n);
                if constexpr (std::is_same_v<Out, C>) {
                    found |= run(wide, wide_second, out + i, i, i + n);
                } else {
                    found |= run(wide, wide_second, wide, i, i + n);
                    narrow_all(wide, out + i, n);
                }
            }
            bad[index] = found;
        }
    });
    for (int i = 0; i < parts; ++i)
        if (bad[i]) return QDQ_NEGATIVE_INPUT;
    return 0;
}

}  // namespace

// The C interface of qdq's CPU kernels.
//
// Every function works on dense memory, in the order in which the elements lie there. `x`, `grad` and `out` hold `n`
// elements of `dtype`; `out` may be `x` or `grad`. Parameters (amax, step sizes, ...) are of the compute type, float, or
// double where `dtype` is QDQ_FLOAT64. Element i belongs to parameter
//
//     ((i / row) * ceil(row / inner) + (i % row) / inner) % count
//
// so that one form covers a tensor with one parameter (count 1), any axis of any memory order, and blocks of `inner`
// elements along rows of `row`, of which the last may be short.
//
// `threads` is the most threads to use. The return value is 0, or a sum of the refusals below; with one, `out` holds
// nothing of use.
#ifndef QDQ_KERNELS_H
#define QDQ_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define QDQ_EXPORT __attribute__((visibility("default")))
#else
#define QDQ_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised with every change of a signature or of a meaning: a library of another number is not loaded.
#define QDQ_INTERFACE 2

enum { QDQ_FLOAT32 = 0, QDQ_FLOAT64 = 1, QDQ_FLOAT16 = 2, QDQ_BFLOAT16 = 3 };

enum {
    QDQ_NEGATIVE_PARAMETER = 1,  // an amax below 0, a step size of 0 or below
    QDQ_NEGATIVE_INPUT = 2,      // in unsigned quantization
    QDQ_UNORDERED_RANGE = 4,     // a lower end above its upper end
    QDQ_NO_MEMORY = 8,
};

typedef struct {
    int64_t n, row, inner, count;
} QdqLayout;

QDQ_EXPORT int qdq_interface(void);
// The instruction set in use: "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64" or "generic".
QDQ_EXPORT const char* qdq_level(void);
// Takes another instruction set, for tests; 0 where this processor or build does not have it.
QDQ_EXPORT int qdq_set_level(const char* name);
// 1 where the library was built with OpenMP.
QDQ_EXPORT int qdq_openmp(void);

// clamp(round(x * scale), lo, bound) with scale = bound / amax; divided by scale where `codes` is 0.
QDQ_EXPORT int qdq_symmetric(int dtype, int codes, const void* x, void* out, int64_t n, int64_t row, int64_t inner,
                             int64_t count, const void* amax, double lo, double bound, int threads);

// The same with one amax, not to codes, its arguments in one block of memory: passing them one by one takes longer than
// quantizing a small tensor.
typedef struct {
    const void* x;
    void* out;
    const void* amax;
    int64_t n, dtype, threads;
    double lo, bound;
} QdqFakeTensor;
QDQ_EXPORT int qdq_fake_tensor(const void* arguments);

// clamp(round(x / step) + zero, lo, hi), of the compute type, where `codes` is 1; else (that - zero) * step, of `dtype`.
QDQ_EXPORT int qdq_affine(int dtype, int codes, const void* x, void* out, int64_t n, int64_t row, int64_t inner,
                          int64_t count, const void* step, const void* zero, double lo, double hi, int threads);

// The published affine form over [low, high].
QDQ_EXPORT int qdq_range(int dtype, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count,
                         const void* low, const void* high, int num_bits, int threads);

// Rounding to a small floating-point format, scaled by max_value / amax unless `amax` is null; |x| < 2**-24 gives 0
// unless `plain`.
QDQ_EXPORT int qdq_float_format(int dtype, const void* x, void* out, int64_t n, int64_t row, int64_t inner,
                                int64_t count, const void* amax, int plain, int mantissa_bits, int min_exponent,
                                double max_value, int threads);

// Rounding to a power of two from 2**-127 to 2**127, half up; NaN for what has none.
QDQ_EXPORT int qdq_e8m0(int dtype, const void* x, void* out, int64_t n, int threads);


// round(float(x + second + bias) * ratio) * step, the sum in float64; float32 only. `bias` is bias_high +
// bias_low; `second` may be null.
QDQ_EXPORT int qdq_requantize(const float* x, const float* second, float* out, int64_t n, int64_t row, int64_t inner,
                              int64_t count, const float* bias_high, const float* bias_low, const float* ratio,
                              float step, int threads);

// Codes of two tensors added: (round(float(a * ratio_a + float(b * ratio_b + fixed))) - zero) * step, the products and
// sums in float64, where a = round(x / step_a) + zero_a for x on the grid of step_a, b likewise; float32 only. `numbers`
// holds step_a, zero_a, ratio_a, step_b, zero_b, ratio_b, fixed, zero, step.
QDQ_EXPORT int qdq_add_codes(const float* x, const float* second, float* out, int64_t n, const float* numbers,
                             int threads);

// grad where |x| <= amax, else 0.
QDQ_EXPORT int qdq_symmetric_gradient(int dtype, const void* grad, const void* x, void* out, int64_t n, int64_t row,
                                      int64_t inner, int64_t count, const void* amax, int threads);

// The same with one amax, as qdq_fake_tensor.
typedef struct {
    const void *grad, *x;
    void* out;
    const void* amax;
    int64_t n, dtype, threads;
} QdqTensorGradient;
QDQ_EXPORT int qdq_tensor_gradient(const void* arguments);

// grad where (lo - zero) * step <= x <= (hi - zero) * step, else 0.
QDQ_EXPORT int qdq_affine_gradient(int dtype, const void* grad, const void* x, void* out, int64_t n, int64_t row,
                                   int64_t inner, int64_t count, const void* step, const void* zero, double lo,
                                   double hi, int threads);

// grad where low <= x <= high (`inclusive`), or low < x < high; sums[0] gets the sum of grad where x is below (or at
// low, if not inclusive), sums[1] where it is above.
QDQ_EXPORT int qdq_range_gradient(int dtype, int inclusive, const void* grad, const void* x, void* out, int64_t n,
                                  const void* low, const void* high, double* sums, int threads);

// Largest |x| for each of `count` parameters, of `dtype`; NaN where one was seen; 0 where there is no element.
QDQ_EXPORT int qdq_absmax(int dtype, const void* x, int64_t n, int64_t row, int64_t inner, int64_t count, void* out,
                          int threads);

// Smallest and largest x for each of `count` parameters; NaN where one was seen; inf and -inf where there is none.
QDQ_EXPORT int qdq_minmax(int dtype, const void* x, int64_t n, int64_t row, int64_t inner, int64_t count, void* low,
                          void* high, int threads);

// Adds to counts[k] the number of x (of |x|, if `absolute`) with (first + k) * width <= x < (first + k + 1) * width,
// edges in float64; with `absolute`, the last bin also holds what reaches its upper end within 1e-12 of it.
// others[0] gets the values in no bin and NaN, others[1] those equal to 0.
QDQ_EXPORT int qdq_histogram(int dtype, int absolute, const void* x, int64_t n, double width, int64_t first,
                             int64_t bins, int64_t* counts, int64_t* others, int threads);

#ifdef __cplusplus
}
#endif

#endif

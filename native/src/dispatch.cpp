// The exported functions: each calls the table of the best instruction set that this processor has.
#include <cstring>

#include "level.h"

#if defined(QDQ_X86_LEVELS)
extern const Level qdq_level_v2, qdq_level_v3, qdq_level_v4;
#else
extern const Level qdq_level_native;
#endif

namespace {

const Level* best() {
#if defined(QDQ_X86_LEVELS)
    __builtin_cpu_init();
    // What the levels ask for, by feature: older compilers do not know the levels by name here
    // (nor f16c, which every processor with AVX2 has).
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
    if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        return &qdq_level_v4;
    if (v3) return &qdq_level_v3;
    return &qdq_level_v2;
#else
    return &qdq_level_native;
#endif
}

const Level* current = best();

}  // namespace

int qdq_interface(void) { return QDQ_INTERFACE; }

const char* qdq_level(void) { return current->name; }

int qdq_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int qdq_set_level(const char* name) {
#if defined(QDQ_X86_LEVELS)
    const Level* top = best();
    const Level* const levels[] = {&qdq_level_v4, &qdq_level_v3, &qdq_level_v2};
    bool reached = false;
    for (const Level* level : levels) {
        reached |= level == top;
        if (reached && std::strcmp(level->name, name) == 0) {
            current = level;
            return 1;
        }
    }
    return 0;
#else
    return std::strcmp(current->name, name) == 0;
#endif
}

int qdq_symmetric(int dtype, int codes, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count,
                  const void* amax, double lo, double bound, int threads) {
    return current->symmetric(dtype, codes, x, out, n, row, inner, count, amax, lo, bound, threads);
}

int qdq_fake_tensor(const void* arguments) {
    QdqFakeTensor call;
    std::memcpy(&call, arguments, sizeof call);
    // The memory of a tensor of zeros may not exist.
    if (call.n > 0 && (!call.x || !call.out || !call.amax)) return QDQ_NO_MEMORY;
    return current->symmetric(static_cast<int>(call.dtype), 0, call.x, call.out, call.n, call.n, call.n, 1, call.amax,
                              call.lo, call.bound, static_cast<int>(call.threads));
}

int qdq_affine(int dtype, int codes, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count,
               const void* step, const void* zero, double lo, double hi, int threads) {
    return current->affine(dtype, codes, x, out, n, row, inner, count, step, zero, lo, hi, threads);
}

int qdq_range(int dtype, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count,
              const void* low, const void* high, int num_bits, int threads) {
    return current->range(dtype, x, out, n, row, inner, count, low, high, num_bits, threads);
}

int qdq_float_format(int dtype, const void* x, void* out, int64_t n, int64_t row, int64_t inner, int64_t count,
                     const void* amax, int plain, int mantissa_bits, int min_exponent, double max_value, int threads) {
    return current->float_format(dtype, x, out, n, row, inner, count, amax, plain, mantissa_bits, min_exponent,
                                 max_value, threads);
}

int qdq_e8m0(int dtype, const void* x, void* out, int64_t n, int threads) {
    return current->e8m0(dtype, x, out, n, threads);
}

int qdq_requantize(const float* x, const float* second, float* out, int64_t n, int64_t row, int64_t inner,
                   int64_t count, const float* bias_high, const float* bias_low, const float* ratio, float step,
                   int threads) {
    return current->requantize(x, second, out, n, row, inner, count, bias_high, bias_low, ratio, step, threads);
}

int qdq_add_codes(const float* x, const float* second, float* out, int64_t n, const float* numbers, int threads) {
    return current->add_codes(x, second, out, n, numbers, threads);
}

int qdq_symmetric_gradient(int dtype, const void* grad, const void* x, void* out, int64_t n, int64_t row, int64_t inner,
                           int64_t count, const void* amax, int threads) {
    return current->symmetric_gradient(dtype, grad, x, out, n, row, inner, count, amax, threads);
}

int qdq_tensor_gradient(const void* arguments) {
    QdqTensorGradient call;
    std::memcpy(&call, arguments, sizeof call);
    return current->symmetric_gradient(static_cast<int>(call.dtype), call.grad, call.x, call.out, call.n, call.n,
                                       call.n, 1, call.amax, static_cast<int>(call.threads));
}

int qdq_affine_gradient(int dtype, const void* grad, const void* x, void* out, int64_t n, int64_t row, int64_t inner,
                        int64_t count, const void* step, const void* zero, double lo, double hi, int threads) {
    return current->affine_gradient(dtype, grad, x, out, n, row, inner, count, step, zero, lo, hi, threads);
}

int qdq_range_gradient(int dtype, int inclusive, const void* grad, const void* x, void* out, int64_t n, const void* low,
                       const void* high, double* sums, int threads) {
    return current->range_gradient(dtype, inclusive, grad, x, out, n, low, high, sums, threads);
}

int qdq_absmax(int dtype, const void* x, int64_t n, int64_t row, int64_t inner, int64_t count, void* out, int threads) {
    return current->absmax(dtype, x, n, row, inner, count, out, threads);
}

int qdq_minmax(int dtype, const void* x, int64_t n, int64_t row, int64_t inner, int64_t count, void* low, void* high,
               int threads) {
    return current->minmax(dtype, x, n, row, inner, count, low, high, threads);
}

int qdq_histogram(int dtype, int absolute, const void* x, int64_t n, double width, int64_t first, int64_t bins,
                  int64_t* counts, int64_t* others, int threads) {
    return current->histogram(dtype, absolute, x, n, width, first, bins, counts, others, threads);
}

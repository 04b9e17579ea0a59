/* Calls the library through its C interface and compares with plain loops: `check libqdq_kernels.so [LEVEL]`.
 * Returns 0 if all agrees, 1 if not, 3 where this processor does not have the instruction set LEVEL.
 *
 * In C99, so that the header stays one for C. `make cross` runs it on another processor, where there is no PyTorch. */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qdq_kernels.h"

enum { N = 100003, CHANNELS = 7, BINS = 100 };

static float x[N], grad[N], out[N], expected[N];
static int failures = 0;

static void fail(const char* what, long at, double got, double wanted) {
    if (++failures <= 20) fprintf(stderr, "FAILED: %s at %ld: %.9g, expected %.9g\n", what, at, got, wanted);
}

static void compare(const char* what) {
    for (long i = 0; i < N; ++i)
        if (memcmp(&out[i], &expected[i], sizeof out[i]) != 0 && !(isnan(out[i]) && isnan(expected[i])))
            fail(what, i, out[i], expected[i]);
}

static void equal(const char* what, double got, double wanted) {
    if (!(got == wanted)) fail(what, 0, got, wanted);
}

static float clamped(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

/* Looks a function up under the type that the header gives it. */
#define FUNCTION(name)                                       \
    __typeof__(name)* name##_ = NULL;                        \
    *(void**)&name##_ = dlsym(library, #name);               \
    if (name##_ == NULL) {                                   \
        fprintf(stderr, "FAILED: %s is missing\n", #name);   \
        return 1;                                            \
    }

int main(int count, char** arguments) {
    if (count != 2 && count != 3) {
        fprintf(stderr, "usage: %s LIBRARY [LEVEL]\n", arguments[0]);
        return 2;
    }
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        fprintf(stderr, "FAILED: %s\n", dlerror());
        return 1;
    }
    FUNCTION(qdq_interface) FUNCTION(qdq_level) FUNCTION(qdq_set_level) FUNCTION(qdq_openmp) FUNCTION(qdq_symmetric)
    FUNCTION(qdq_affine) FUNCTION(qdq_range) FUNCTION(qdq_float_format) FUNCTION(qdq_e8m0)
    FUNCTION(qdq_symmetric_gradient) FUNCTION(qdq_affine_gradient) FUNCTION(qdq_range_gradient) FUNCTION(qdq_absmax)
    FUNCTION(qdq_minmax) FUNCTION(qdq_histogram)

    equal("qdq_interface", qdq_interface_(), QDQ_INTERFACE);
    equal("qdq_set_level of the level in use", qdq_set_level_(qdq_level_()), 1);
    equal("qdq_set_level of none", qdq_set_level_("none"), 0);
    if (count == 3 && !qdq_set_level_(arguments[2])) return 3;

    unsigned state = 1;
    for (long i = 0; i < N; ++i) {
        state = state * 1664525u + 1013904223u;
        x[i] = ((float)(state >> 8) / 8388608.0f - 1.0f) * 1.5f;
        grad[i] = (float)(i % 17) - 8.0f;
    }
    x[0] = 0.0f, x[1] = -0.0f, x[2] = INFINITY, x[3] = -INFINITY, x[4] = NAN, x[5] = 1e-40f, x[6] = 0.5f / 127.0f;

    for (int threads = 1; threads <= 2; ++threads) {
        float amax[CHANNELS];
        for (int c = 0; c < CHANNELS; ++c) amax[c] = 0.25f * (float)(c + 1);

        /* Channels of 3 elements, repeated. */
        for (long i = 0; i < N; ++i) {
            const float scale = 127.0f / amax[i / 3 % CHANNELS];
            expected[i] = clamped(rintf(x[i] * scale), -127.0f, 127.0f) / scale;
        }
        equal("qdq_symmetric", qdq_symmetric_(QDQ_FLOAT32, 0, x, out, N, 3 * CHANNELS, 3, CHANNELS, amax, -127, 127, threads),
              0);
        compare("symmetric fake quantization");

        for (long i = 0; i < N; ++i) expected[i] = fabsf(x[i]) <= amax[2] ? grad[i] : 0.0f;
        equal("qdq_symmetric_gradient",
              qdq_symmetric_gradient_(QDQ_FLOAT32, grad, x, out, N, N, N, 1, &amax[2], threads), 0);
        compare("symmetric gradient");

        const float step = 0.01f, zero = 10.0f;
        for (long i = 0; i < N; ++i) expected[i] = (clamped(rintf(x[i] / step) + zero, -128, 127) - zero) * step;
        equal("qdq_affine", qdq_affine_(QDQ_FLOAT32, 0, x, out, N, N, N, 1, &step, &zero, -128, 127, threads), 0);
        compare("affine fake quantization");

        const float bottom = (-128 - zero) * step, top = (127 - zero) * step;
        for (long i = 0; i < N; ++i) expected[i] = x[i] >= bottom && x[i] <= top ? grad[i] : 0.0f;
        equal("qdq_affine_gradient",
              qdq_affine_gradient_(QDQ_FLOAT32, grad, x, out, N, N, N, 1, &step, &zero, -128, 127, threads), 0);
        compare("affine gradient");

        const float from = -0.5f, to = 0.75f, width = (to - from) / 255.0f, offset = rintf(from / width) + 128.0f;
        for (long i = 0; i < N; ++i)
            expected[i] = (clamped(rintf(x[i] / width) - offset, -128, 127) + offset) * width;
        equal("qdq_range", qdq_range_(QDQ_FLOAT32, x, out, N, N, N, 1, &from, &to, 8, threads), 0);
        compare("fake quantization over a range");

        amax[0] = -1.0f;
        equal("a negative amax", qdq_symmetric_(QDQ_FLOAT32, 0, x, out, N, N, N, 1, amax, -127, 127, threads),
              QDQ_NEGATIVE_PARAMETER);

        const float low = -0.5f, high = 0.75f;
        double sums[2] = {0, 0}, below = 0, above = 0;
        for (long i = 0; i < N; ++i) {
            expected[i] = x[i] >= low && x[i] <= high ? grad[i] : 0.0f;
            below += x[i] < low ? grad[i] : 0;
            above += x[i] > high ? grad[i] : 0;
        }
        equal("qdq_range_gradient", qdq_range_gradient_(QDQ_FLOAT32, 1, grad, x, out, N, &low, &high, sums, threads), 0);
        compare("range gradient");
        equal("sum below", sums[0], below);
        equal("sum above", sums[1], above);

        /* The last values alone: no infinity, no NaN. */
        float largest = 0, smallest_seen = 0, largest_seen = 0, wanted_low = x[7], wanted_high = x[7];
        for (long i = 7; i < N; ++i) {
            wanted_low = x[i] < wanted_low ? x[i] : wanted_low;
            wanted_high = x[i] > wanted_high ? x[i] : wanted_high;
        }
        const long finite = N - 7;
        equal("qdq_minmax",
              qdq_minmax_(QDQ_FLOAT32, x + 7, finite, finite, finite, 1, &smallest_seen, &largest_seen, threads), 0);
        equal("smallest", smallest_seen, wanted_low);
        equal("largest", largest_seen, wanted_high);
        equal("qdq_absmax", qdq_absmax_(QDQ_FLOAT32, x + 7, finite, finite, finite, 1, &largest, threads), 0);
        equal("largest magnitude", largest, fmax(-wanted_low, wanted_high));
        equal("qdq_absmax", qdq_absmax_(QDQ_FLOAT32, x, N, N, N, 1, &largest, threads), 0);
        if (!isnan(largest)) fail("largest magnitude with NaN", 0, largest, NAN);

        int64_t counts[BINS] = {0}, wanted[BINS] = {0}, others[2] = {0, 0}, outside = 0;
        for (long i = 0; i < N; ++i) {
            const double magnitude = fabs((double)x[i]);
            if (magnitude < 1.25) {
                int bin = (int)(magnitude / 0.0125);
                while (bin > 0 && magnitude < bin * 0.0125) --bin;
                while (magnitude >= (bin + 1) * 0.0125) ++bin;
                ++wanted[bin];
            } else {
                ++outside;
            }
        }
        equal("qdq_histogram", qdq_histogram_(QDQ_FLOAT32, 1, x, N, 0.0125, 0, BINS, counts, others, threads), 0);
        for (int k = 0; k < BINS; ++k) equal("count", (double)counts[k], (double)wanted[k]);
        equal("outside", (double)others[0], (double)outside);
        equal("zeros", (double)others[1], 2);
    }

    /* Small formats: E4M3 to nearest even, saturating; powers of two, half up. */
    const float values[8] = {0.3f, 449.0f, 17.0f, 19.0f, -1000.0f, 0.0009765625f, 0.00293f, 0.0f};
    const float e4m3[8] = {0.3125f, 448.0f, 16.0f, 20.0f, -448.0f, 0.0f, 0.00390625f, 0.0f};
    float small[8];
    equal("qdq_float_format", qdq_float_format_(QDQ_FLOAT32, values, small, 8, 8, 8, 1, NULL, 1, 3, -6, 448, 1), 0);
    for (int i = 0; i < 8; ++i) equal("E4M3", small[i], e4m3[i]);
    const float scales[4] = {2.9f, 3.0f, 1.0f, 1e-45f}, powers[4] = {2.0f, 4.0f, 1.0f, 0x1p-127f};
    equal("qdq_e8m0", qdq_e8m0_(QDQ_FLOAT32, scales, small, 4, 1), 0);
    for (int i = 0; i < 4; ++i) equal("E8M0", small[i], powers[i]);

    /* 16 bits: 1, -2, 0.5, 100 with an amax of 2, in both encodings; computed in float, rounded once. */
    const uint16_t half[4] = {0x3C00, 0xC000, 0x3800, 0x5640}, bfloat[4] = {0x3F80, 0xC000, 0x3F00, 0x42C8};
    const uint16_t half_wanted[4] = {0x3C08, 0xC000, 0x3808, 0x4000}, bfloat_wanted[4] = {0x3F81, 0xC000, 0x3F01, 0x4000};
    const float two = 2.0f;
    uint16_t words[4];
    equal("float16", qdq_symmetric_(QDQ_FLOAT16, 0, half, words, 4, 4, 4, 1, &two, -127, 127, 1), 0);
    for (int i = 0; i < 4; ++i) equal("float16", words[i], half_wanted[i]);
    equal("bfloat16", qdq_symmetric_(QDQ_BFLOAT16, 0, bfloat, words, 4, 4, 4, 1, &two, -127, 127, 1), 0);
    for (int i = 0; i < 4; ++i) equal("bfloat16", words[i], bfloat_wanted[i]);

    if (failures != 0) {
        fprintf(stderr, "%d comparisons failed (%s)\n", failures, qdq_level_());
        return 1;
    }
    printf("all comparisons passed: %s, %s\n", qdq_level_(), qdq_openmp_() ? "OpenMP" : "one thread");
    return 0;
}

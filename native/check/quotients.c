/* Whether the quotient of every integer up to 255 by every float32 significand is exact after one correction, as
 * SymmetricFakeQuick in native/src/quantize.h computes it. Powers of two change neither. Returns 0 if so.
 *
 *     cc -O3 -mfma -ffp-contract=off quotients.c -lm && ./a.out */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

int main(void) {
    long wrong = 0;
    for (uint32_t significand = 0; significand < (1u << 23); ++significand) {
        const uint32_t bits = 0x3F800000u | significand;
        float scale;
        memcpy(&scale, &bits, sizeof scale);
        const float reciprocal = 1.0f / scale;
        for (int code = 1; code <= 255; ++code) {
            const float value = (float)code, quotient = value * reciprocal;
            const float corrected = fmaf(fmaf(-quotient, scale, value), reciprocal, quotient);
            wrong += corrected != value / scale;
        }
    }
    printf("%ld quotients differ\n", wrong);
    return wrong != 0;
}

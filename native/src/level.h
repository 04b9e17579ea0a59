// The functions of one instruction set: level.cpp is compiled once for each.
#pragma once

#include "qdq_kernels.h"

struct Level {
    const char* name;
    decltype(&qdq_symmetric) symmetric;
    decltype(&qdq_affine) affine;
    decltype(&qdq_range) range;
    decltype(&qdq_float_format) float_format;
    decltype(&qdq_e8m0) e8m0;
    decltype(&qdq_requantize) requantize;
    decltype(&qdq_add_codes) add_codes;
    decltype(&qdq_symmetric_gradient) symmetric_gradient;
    decltype(&qdq_affine_gradient) affine_gradient;
    decltype(&qdq_range_gradient) range_gradient;
    decltype(&qdq_absmax) absmax;
    decltype(&qdq_minmax) minmax;
    decltype(&qdq_histogram) histogram;
};

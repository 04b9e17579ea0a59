// Which parameter an element belongs to: a walk over the runs of elements that share one.
#pragma once

#include <cstdint>

#include "qdq_kernels.h"

namespace {

// body(parameter, start, length) for every run in [begin, end).
template <class Body>
inline void for_runs(const QdqLayout& l, int64_t begin, int64_t end, const Body& body) {
    if (begin >= end) return;
    if (l.count == 1) {
        body(int64_t{0}, begin, end - begin);
        return;
    }
    const int64_t per_row = (l.row + l.inner - 1) / l.inner;
    int64_t row_start = begin / l.row * l.row;
    int64_t column = (begin - row_start) / l.inner;
    int64_t parameter = (begin / l.row * per_row + column) % l.count;
    while (begin < end) {
        int64_t stop = row_start + (column + 1) * l.inner;
        const int64_t row_end = row_start + l.row;
        if (++column == per_row) {
            stop = row_end;
            row_start = row_end;
            column = 0;
        }
        if (stop > end) stop = end;
        body(parameter, begin, stop - begin);
        begin = stop;
        if (++parameter == l.count) parameter = 0;
    }
}

}  // namespace

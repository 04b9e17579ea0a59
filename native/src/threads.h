// How work is divided among threads. The division depends on the size and the number of threads only.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Below this a second thread costs more than it saves (a wake-up takes some microseconds).
constexpr int64_t kLeastPerThread = 16384;
constexpr int kMostThreads = 256;

inline int thread_count(int64_t n, int wanted) {
    int64_t most = n / kLeastPerThread;
    if (most < 1) most = 1;
    if (wanted > kMostThreads) wanted = kMostThreads;
    return wanted < most ? (wanted < 1 ? 1 : wanted) : static_cast<int>(most);
}

// body(begin, end, index) for `parts` slices of [0, n), each but the last a multiple of `granule`.
template <class Body>
void parallel(int64_t n, int parts, const Body& body, int64_t granule = 64) {
    if (parts <= 1) {
        body(int64_t{0}, n, 0);
        return;
    }
    const int64_t slice = ((n + parts - 1) / parts + granule - 1) / granule * granule;
    auto part = [&](int i) {
        const int64_t begin = slice * i < n ? slice * i : n;
        const int64_t end = begin + slice < n ? begin + slice : n;
        body(begin, end, i);
    };
#ifdef _OPENMP
    // Inside somebody's parallel region there may be one thread: the loop gives it all slices.
#pragma omp parallel for schedule(static, 1) num_threads(parts)
#endif
    for (int i = 0; i < parts; ++i) part(i);
}

}  // namespace

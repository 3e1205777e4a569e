// OpenMP, or one thread where the build has none. Include from baseline files only.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_max_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
inline int omp_in_parallel() { return 0; }
#endif

namespace peft_kernels {

// Threads for `work` units when fewer than `grain` per thread do not pay for waking one up.
inline int threads_for(int64_t work, int64_t grain) {
  return int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), work / grain)));
}

}  // namespace peft_kernels

#include "cpu/columns_portable.h"

namespace peft_kernels {

void columns_avx512(const ColumnPass& pass, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                    float* products) {
  run(pass, m0, m1, n0, n1, sums, products);
}

}  // namespace peft_kernels

// One pass over a matrix that scales its columns and sums them: what a scaled, biased linear layer has beside its GEMM.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace peft_kernels {

// u and v [M, N] of `dtype`, rows ldu and ldv apart. out = u * scale (rows ldo apart; out may be u), sums[n] = the sum
// of column n of u, products[n] = that of u * v. Null for what is not wanted; v is read for `products` alone. Sums are
// float32 in an order that depends on M alone. Throws std::invalid_argument before anything is written.
void scale_and_sum_columns(const void* u, DType dtype, int64_t M, int64_t N, int64_t ldu, const void* v, int64_t ldv,
                           const float* scale, void* out, int64_t ldo, float* sums, float* products);

}  // namespace peft_kernels

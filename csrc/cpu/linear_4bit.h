// y = x W' + bias + LoRA terms and dx = dy W + LoRA terms over a 4-bit weight, decoded inside the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/weight4.h"

namespace peft_kernels {

// (S, ldS, B, dtype of B, r, scaling): y += scaling * S B', with S [M, r] float32 and B [N, r] contiguous.
using ForwardTerm = std::tuple<std::uintptr_t, int64_t, std::uintptr_t, int, int64_t, double>;
// (T, ldT, A, dtype of A, r, dropout p, seed): dx += mask * (T A), with T [M, r] float32 and A [r, K] contiguous.
using BackwardTerm = std::tuple<std::uintptr_t, int64_t, std::uintptr_t, int, int64_t, double, uint64_t>;

// x [M, K] (rows ldx apart) -> y [M, N] (rows ldy apart), both of `dtype`; the weight is decoded to `dtype`, sums are
// float32 in an order that depends on M alone, y is rounded once. bias [N] or null. With out_scale [N], y is what it
// would have been times out_scale, and that unscaled result goes to `unscaled` (laid out as y) unless it is null.
// Throws std::invalid_argument for what linear_4bit_supported() denies.
void linear_4bit_forward(const void* x, DType dtype, int64_t M, int64_t ldx, const Weight4& weight, const void* bias,
                         DType bias_dtype, const std::vector<ForwardTerm>& terms, void* y, int64_t ldy,
                         const float* out_scale, void* unscaled);

// dy [M, N] -> dx [M, K], as above. With in_scale [N], row n of the weight is scaled by in_scale[n] as it is decoded.
void linear_4bit_backward(const void* dy, DType dtype, int64_t M, int64_t ldy, const Weight4& weight,
                          const std::vector<BackwardTerm>& terms, void* dx, int64_t ldx, const float* in_scale);

// Whether the two functions above take this call at the instruction set in force.
bool linear_4bit_forward_supported(DType dtype, int64_t M, int64_t K, int64_t blocksize);
bool linear_4bit_backward_supported(DType dtype, int64_t M, int64_t K, int64_t blocksize);

}  // namespace peft_kernels

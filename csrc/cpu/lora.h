// The side GEMMs of a LoRA layer. x is read in its own dtype and never widened in memory; sums are float32.
//
// All throw std::invalid_argument before anything is written. Results do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"

namespace peft_kernels {

struct Matrix {  // row-major, `ld` elements from row to row
  const void* data;
  DType dtype;
  int64_t ld;
};

struct Dropout {  // the mask is a function of seed, row and column: cpu/philox.h
  double p;
  uint64_t seed;
  PK_INLINE bool active() const { return p != 0; }
};

struct ExpandTerm {  // mask (.) alpha * S P'
  const float* s;    // [M, rank]
  int64_t lds;
  Matrix p;
  bool p_is_nr;  // p is [N, rank], else [rank, N]
  int64_t rank;
  float alpha;
  Dropout dropout;
};

// S[M, r] = alpha * drop(x)[M, K] P', P being [r, K], or [K, r] if p_is_kr.
void lora_shrink(const Matrix& x, int64_t M, int64_t K, const Matrix& p, bool p_is_kr, int64_t r, float alpha,
                 const Dropout& dropout, float* S, int64_t ldS);

// out = alpha * drop(x)[M, I]' P[M, r], contiguous [I, r], or [r, I] if out_is_ri.
void lora_wgrad(const Matrix& x, int64_t M, int64_t I, const float* P, int64_t ldP, int64_t r, float alpha,
                const Dropout& dropout, void* out, DType out_dtype, bool out_is_ri);

// out[M, N] += the sum of the terms, in one pass over out and with one rounding.
void lora_expand_add(void* out, DType dtype, int64_t M, int64_t N, int64_t ldo, const ExpandTerm* terms, int64_t count);

// out[M, K] = 0 or 1 / (1 - p).
void philox_mask(uint64_t seed, int64_t M, int64_t K, double p, float* out);

}  // namespace peft_kernels

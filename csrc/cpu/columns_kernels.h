// What each instruction set provides to columns.cpp, which owns checks, threads and the order of summation.
#pragma once

#include "cpu/columns.h"

namespace peft_kernels {

struct ColumnPass {  // as the arguments of scale_and_sum_columns
  const void* u;
  const void* v;
  const float* scale;
  void* out;
  DType dtype;
  int64_t ldu, ldv, ldo;
};

constexpr int64_t kColumnBlock = 256;  // columns of a work item: half a kilobyte of a bf16 row, sums that stay in L1
constexpr int64_t kColumnRows = 64;    // rows of a work item, summed apart: rounding errors grow with a chain's length

// Columns [n0, n1) of rows [m0, m1); n1 - n0 <= kColumnBlock. Overwrites sums[n1 - n0] and products[n1 - n0] (or null).
using ColumnKernel = void (*)(const ColumnPass& pass, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                              float* products);
void columns_scalar(const ColumnPass& pass, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                    float* products);
void columns_avx2(const ColumnPass& pass, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums, float* products);
void columns_avx512(const ColumnPass& pass, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                    float* products);

}  // namespace peft_kernels

// What each instruction set provides to linear_4bit.cpp, which owns checks, threads and blocking.
#pragma once

#include "cpu/linear_4bit.h"

namespace peft_kernels {

// mask * scaling * (left P): P is B' [r, N] in the forward pass (stored [N, r]), A [r, K] in the backward pass.
struct Linear4Term {
  const float* left;  // [M, r], rows ld apart
  int64_t ld;
  const void* right;
  DType dtype;
  int64_t r;
  float scaling;
  double p;  // dropout of the term; 0 in the forward pass
  uint64_t seed;
};

// One call. `in` is x or dy, `out` is y or dx; "lanes" are the columns of `out`: n forward, k backward.
struct Linear4Job {
  const void* in;
  DType dtype;
  int64_t M, ld_in;
  const Weight4* weight;
  const void* bias;
  DType bias_dtype;
  const Linear4Term* terms;
  int64_t term_count, rank_sum;
  void* out;
  int64_t ld_out;
};

constexpr int64_t kLinear4Lanes = 64;      // columns of a GEMM panel: four vectors of 16 float32
constexpr int64_t kLinear4DotLanes = 48;   // columns of a dot-form work item: a multiple of every tile height and of 16
constexpr int64_t kLinear4SmallRows = 16;  // the portable kernels' largest M

// Dot form, for few rows: lanes run along k, W is decoded in registers. Columns [n0, n1), n0 % kLinear4DotLanes == 0.
void linear4_dot_avx512bf16(const Linear4Job& job, int64_t n0, int64_t n1);

// Broadcast form: a panel of W is decoded once for rows [m0, m1) of `in`. One panel of lanes from lane0.
void linear4_forward_panel_avx512bf16(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1);
void linear4_backward_panel_avx512bf16(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1);

// This thread's 64-byte aligned scratch, kept between calls because fresh pages cost more than the kernels do.
enum class Linear4Scratch { Panel, Sums, Terms, Input, Count };
void* linear4_scratch(Linear4Scratch slot, size_t bytes);

}  // namespace peft_kernels

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
  const float* out_scale = nullptr;  // forward, [N]: multiplies the result
  void* unscaled = nullptr;          // forward: takes the result before that, laid out as `out`
  const float* in_scale = nullptr;   // backward, [N]: multiplies the rows of W
  const float* in_f32 = nullptr;     // `in` from row first_f32 on in float32, for the kernels that multiply so
  int64_t ld_in_f32 = 0, first_f32 = 0;
};

constexpr int64_t kLinear4Lanes = 64;     // columns of a GEMM panel: four vectors of 16 float32
constexpr int64_t kLinear4DotLanes = 48;  // columns of a dot-form work item: a multiple of every tile height and of 16

// Dot form, for few rows: lanes run along k, W is decoded in registers. Columns [n0, n1), n0 % kLinear4DotLanes == 0;
// x: what the first function made of job.in, in this thread's scratch.
const uint16_t* linear4_dot_input_avx512bf16(const Linear4Job& job);
void linear4_dot_avx512bf16(const Linear4Job& job, const uint16_t* x, int64_t n0, int64_t n1);

// Broadcast form: a panel of W is decoded once for rows [m0, m1) of `in`. One panel of lanes from lane0.
void linear4_forward_panel_avx512bf16(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1);
void linear4_backward_panel_avx512bf16(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1);

// The same with float32 arithmetic, for every dtype: what runs without AVX512-BF16, and on float16 and float32 with it.
struct Linear4F32Kernels {
  void (*forward_panel)(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1);
  void (*backward_panel)(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1);
  void (*widen_row)(const Linear4Job& job, int64_t m, int64_t count, float* out);  // row m of `in`
};
extern const Linear4F32Kernels kLinear4F32Avx2, kLinear4F32Avx512;

// Dot form in float32 arithmetic, forward. 4096 x 4096 on Skylake, panels' time / this, AVX-512: 5 rows 1.6, 8
// rows 1.4, 12 rows 1.0; AVX2: 1.4, 1.2, 1.0.
constexpr int64_t kLinear4SmallRows = 8;
void linear4_small_forward(const Linear4Job& job, int threads);

struct Linear4SmallKernel {
  // Columns [n0, n1), at most kLinear4Lanes; x: [M, K] of job.in, every 64 elements in the kernel's order.
  void (*run)(const Linear4Job& job, const float* x, int64_t n0, int64_t n1);
  int (*element)(int position);  // which of 64 elements x has at a position
};
extern const Linear4SmallKernel kLinear4SmallAvx2[3], kLinear4SmallAvx512[3];  // by dtype

// This thread's 64-byte aligned scratch, kept between calls because fresh pages cost more than the kernels do.
enum class Linear4Scratch { Panel, Sums, Terms, Input, Scales, Count };
void* linear4_scratch(Linear4Scratch slot, size_t bytes);

}  // namespace peft_kernels

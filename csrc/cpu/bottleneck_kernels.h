// What each instruction set supplies to bottleneck.cpp, which owns argument checks, threads and scratch.
//
// Matrices are multiplied in units of 32 bits along the summed index: a float32, or (where the machine multiplies them)
// a pair of bfloat16. A panel [units][lanes] holds one operand, lanes being columns of the result; rows of units
// broadcast the other.
#pragma once

#include "cpu/bottleneck.h"

namespace peft_kernels {

constexpr int64_t kPanelLanes = 64;   // of a panel: four vectors
constexpr int64_t kTileRows = 6;      // of a product: 24 sums in registers
constexpr int64_t kBlockRows = 48;    // rows of x whose hidden a thread holds at a time
constexpr int64_t kChunkUnits = 256;  // summed apart, as eager's blocked sums are; a panel of 64 KB

// Rows that are read as mask * (value - subtract[m]) * row_scale[m] * column_scale[k], the mask of zeros and ones.
struct Source {
  Matrix matrix;
  const float *subtract, *row_scale, *column_scale;  // or null
  Dropout dropout;
};

// One call. What its steps share lies in scratch that bottleneck.cpp lays out.
struct BottleneckJob {
  Adapter adapter;
  const float *down_bias, *up_bias, *ln_weight, *ln_bias, *channel, *gate;  // the adapter's vectors, or null
  int64_t M, rank_lanes;                                                    // r rounded up to 16
  Source x, dy;                     // x normalized (unless pairs of bfloat16 are multiplied), dy masked
  const float *mean, *inverse_std;  // [M], with layer norm
  uint32_t *reduce, *expand;        // panels of the weight that the row pass sums over K or N first, and of the other
  float *hidden_bias, *hidden_sum;  // [rank_lanes]: bd + Wd b; with layer norm the sums over k of Wd w
  // forward
  float ln_eps;
  Matrix residual;
  void *y, *z;
  DType y_dtype, z_dtype;
  float* stats;
  float *column_scale, *column_bias;  // [N rounded up to 64]: s c, s c bu
  // backward
  Matrix saved_z;
  AdapterGradients gradients;
  float inverse_keep;       // of the dropout
  float* gate_bias;         // [N]: c bu
  uint32_t* columns;        // [r + 1][ld_columns units]: g act(Z) and ones g; later dZ, or where x is not normalized
  int64_t ld_columns;       // dZ / std
  float* weight_scratch;    // [threads][weight_scratch_floats(r)], over reduce and expand when these are not needed
  float *dz_sum, *dz_mean;  // [r]: sums of dZ; of dZ mean / std where x is not normalized, else zeros
};

// Steps of one call, each an index space that threads share; a step starts when the one before it has ended.
struct BottleneckKernels {
  int64_t elements;  // per unit
  void (*widen)(const Vector& from, int64_t count, float* to);
  int64_t (*pack_items)(int64_t rank_lanes, int64_t reduced, int64_t expanded);
  void (*pack_forward)(const BottleneckJob& job, int64_t item);
  void (*forward_rows)(const BottleneckJob& job, int64_t m0, int64_t m1);
  void (*hidden_columns)(const BottleneckJob& job, int64_t m0, int64_t m1);
  void (*up_gradients)(const BottleneckJob& job, int64_t part, int64_t begin, int64_t end);
  void (*pack_backward)(const BottleneckJob& job, int64_t item);
  void (*backward_rows)(const BottleneckJob& job, int64_t m0, int64_t m1);
  void (*sum_dz)(const BottleneckJob& job, int64_t rank);
  void (*down_gradients)(const BottleneckJob& job, int64_t part, int64_t begin, int64_t end);
};

// A thread's share of the weight gradients: sums for a tile, and two panels.
constexpr int64_t weight_scratch_floats(int64_t r) { return (r + 1 + 2 * kChunkUnits) * kPanelLanes; }

// This thread's 64-byte aligned scratch, kept between calls because fresh pages cost more than the kernels do.
// Slot 0: what the threads of a call share; 1: a step's own; 2: the columns, which only backward has.
void* bottleneck_scratch(int slot, size_t bytes);

extern const BottleneckKernels kBottleneckScalar, kBottleneckAvx2, kBottleneckAvx512;
// With pairs of bfloat16, where x and both weights are bfloat16 and the machine has AVX512-BF16.
extern const BottleneckKernels kBottleneckBf16Pairs;

}  // namespace peft_kernels

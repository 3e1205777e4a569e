// What each instruction set supplies to lora.cpp, which owns argument checks, threads and blocking.
#pragma once

#include "cpu/lora.h"

namespace peft_kernels {

// P of a shrink, cut along k. Rank j of block b = k / block_k starts at data + b * block_stride + j * ld. How the ranks
// of a packed block share their rows is up to pack_panel; its last columns are zero-filled to a multiple of 32.
struct ShrinkPanels {
  const void* data;
  DType dtype;  // F32, or BF16 for the kernels that multiply bf16 pairs
  bool packed;  // else P itself
  bool split;   // every 32 values as 16 even ones, then 16 odd ones: how one AND and one shift widen 32 bf16 of x
  int64_t block_k, block_stride, ld;
};

constexpr int64_t kPanelBytes = 2048;  // of one rank: 512 float32; 8 ranks of it leave half of a 32 KB L1 to x
constexpr int64_t kTile = 32;          // columns of a wgrad or expand tile: a cache line of bf16
constexpr int64_t kShrinkRows = 48;    // of x per work item: its partial sums for 64 ranks fit in L2
constexpr int64_t kShrinkRanks = 64;
constexpr int64_t kExpandRanks = 64;  // summed apart, else 256 ranks err more than twice as much as eager's blocked sum
constexpr int64_t kWgradRows = 128;   // of x per pass over the columns of a work item

struct LoraKernels {
  bool splits_bf16;      // takes split panels for bf16 x
  bool multiplies_bf16;  // takes BF16 panels for bf16 x
  int64_t direct_rows;   // up to this many rows a shrink reads P in place instead of packing panels

  // Packs ranks [0, r) of columns [k0, k0 + kn) into one zero-filled panel block, ld = block_k.
  void (*pack_panel)(const Matrix& p, bool p_is_kr, int64_t r, int64_t k0, int64_t kn, const ShrinkPanels& panels,
                     void* block);
  // S[m0:m1, j0:j1] = alpha * drop(x)[m0:m1, :K] P'; m1 - m0 <= kShrinkRows, j1 - j0 <= kShrinkRanks.
  void (*shrink)(const Matrix& x, const Dropout& dropout, int64_t m0, int64_t m1, int64_t K, const ShrinkPanels& panels,
                 int64_t j0, int64_t j1, float alpha, float* S, int64_t ldS);
  // Adds drop(x)[m0:m1, i0:i1]' P[m0:m1, :r] to tiles [tile][r][kTile]; i0 % kTile == 0.
  void (*wgrad)(const Matrix& x, const Dropout& dropout, int64_t m0, int64_t m1, int64_t i0, int64_t i1, const float* P,
                int64_t ldP, int64_t r, float* tiles);
  // out = alpha * tiles, for columns [i0, i1) of an [r, I] or [I, r] matrix.
  void (*wgrad_store)(const float* tiles, int64_t r, int64_t i0, int64_t i1, int64_t I, float alpha, void* out,
                      DType out_dtype, bool out_is_ri);
  // out[m0:m1, n0:n1] += sum of the terms, rounded once; n0 % kTile == 0.
  void (*expand_add)(void* out, DType dtype, int64_t ldo, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                     const ExpandTerm* terms, int64_t count);
  void (*dropout_rows)(uint64_t seed, int64_t m0, int64_t m1, int64_t K, double p, float* out);
};

extern const LoraKernels kLoraScalar, kLoraAvx2, kLoraAvx512, kLoraAvx512Bf16;

// This thread's 64-byte aligned scratch, kept between calls because fresh pages cost more than the kernels do.
// Slot 0: buffers that a work item shares with other threads; 1 and 2: the kernels' own.
void* lora_scratch(int slot, size_t bytes);

}  // namespace peft_kernels

// What each instruction set supplies to prompt_attention.cpp, which owns argument checks, threads and memory.
//
// Operands of a product are matrices of 32-bit units: one float32, or two bfloat16 that are neighbours along the
// product's inner dimension. D and P are padded with zeros to Dp and Pp, multiples of kLanes.
#pragma once

#include "cpu/prompt_attention.h"

namespace peft_kernels {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlockRows = 32;  // queries that a block takes through all its products

struct PromptSizes {
  int64_t D, P, Dp, Pp, step;  // step: elements of a unit
};

// One prompt head as operands; each is Dp * Pp / step units. Those that a pass does not need are null.
struct PromptPanels {
  uint32_t* kt;  // [Dp / step][Pp]: q kt = scores
  uint32_t* vt;  // the same of V: dy vt
  uint32_t* kn;  // [Pp / step][Dp]: dscores kn = dq
  uint32_t* vn;  // the same of V
};

// Up to kBlockRows queries that share a prompt head.
struct QueryBlock {
  int64_t rows, columns;     // columns: as many of the Pp as some query sees, a multiple of kLanes
  int64_t seen[kBlockRows];  // keys that each query sees
  const void *q[kBlockRows], *in[kBlockRows], *dy[kBlockRows];  // in: base forward, null if none; the output backward
  void* to[kBlockRows];                                         // out forward, dq backward, null if not wanted
  float* lse[kBlockRows];
  float* delta[kBlockRows];  // where a gated backward leaves sum P dP
  float gate[kBlockRows];
};

struct Options {
  DType dtype;  // of q, in, dy, to
  float scale;
  bool gated, add_dq;
};

struct PromptPasses {
  // k and v: rows of `ld` elements.
  void (*pack)(const PromptSizes& sizes, const void* k, int64_t ldk, const void* v, int64_t ldv, DType dtype,
               const PromptPanels& panels, void* scratch);
  void (*forward)(const PromptSizes& sizes, const PromptPanels& panels, const QueryBlock& block, const Options& options,
                  void* scratch);
  // The same from the rows themselves: for so few queries that packing them does not pay.
  void (*direct)(const PromptSizes& sizes, const void* k, int64_t ldk, const void* v, int64_t ldv, DType prompt_dtype,
                 const QueryBlock& block, const Options& options, void* scratch);
  // Adds to dk and dv, [Pp][Dp] float32, unless they are null.
  void (*backward)(const PromptSizes& sizes, const PromptPanels& panels, const QueryBlock& block,
                   const Options& options, float* dk, float* dv, void* scratch);
};

struct PromptKernels {
  PromptPasses float32, bf16;  // bf16: in units of two bfloat16; null where the processor has no product of them
};

extern const PromptKernels kPromptScalar, kPromptAvx2, kPromptAvx512, kPromptAvx512Bf16;

}  // namespace peft_kernels

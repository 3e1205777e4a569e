// Attention over a few learned keys (a prefix or a prompt) beside a library's attention over the others.
//
// Both throw std::invalid_argument before anything is written. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace peft_kernels {

struct PromptShape {
  DType dtype, prompt_dtype;  // of q, base, out, dy, dq; of the prompts and their gradients
  int64_t B, H, Hkv, L, D, P;
  bool per_sample;  // prompts (B, Hkv, P, D), else (Hkv, P, D)
  bool causal;      // query l sees prompts p <= l, else all
  float scale;
};

struct Heads {  // (B, H, L, D), strides in elements, unit stride along D
  void* data;
  int64_t stride_b, stride_h, stride_l;
};

// Without a gate: base and lse (B, H, L) are those of the other keys (base.data null: there are none); out and lse
// become those of all keys. With a gate (H): out = base + gate * attention(q, prompts), and lse becomes the prompts'
// own. out may be base. The prompts' stride_b is not read unless they come per sample.
void prompt_attention_forward(const PromptShape& shape, const Heads& q, const Heads& prompt_k, const Heads& prompt_v,
                              const Heads& base, float* lse, const float* gate, const Heads& out);

// lse as the forward left it. Without a gate, `out` is the forward's. The prompts' part of dq is added to what dq holds
// if add_dq. dq.data, dprompt_k.data (with dprompt_v's) and dgate (H) may be null: not wanted.
void prompt_attention_backward(const PromptShape& shape, const Heads& dy, const Heads& q, const Heads& prompt_k,
                               const Heads& prompt_v, const Heads& out, const float* lse, const float* gate,
                               const Heads& dq, bool add_dq, const Heads& dprompt_k, const Heads& dprompt_v,
                               float* dgate);

}  // namespace peft_kernels

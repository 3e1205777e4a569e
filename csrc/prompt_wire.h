// The prompt attention kernels with flat arguments, as def_kernel takes them.
#pragma once

#include <tuple>

#include "cpu/prompt_attention.h"
#include "wire.h"

namespace peft_kernels {

// (data, stride of the batch, of the heads, of the tokens)
using WireHeads = std::tuple<std::uintptr_t, int64_t, int64_t, int64_t>;

// (dtype, dtype of the prompts, B, H, Hkv, L, D, P, per_sample, causal, scale)
using WireShape = std::tuple<int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, float>;

template <>
struct Wire<Heads> {
  using type = WireHeads;
  static Heads unwrap(const type& t) { return {(void*)std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }
};

template <>
struct Wire<PromptShape> {
  using type = WireShape;
  static PromptShape unwrap(const type& t) {
    const auto& [dtype, prompt_dtype, B, H, Hkv, L, D, P, per_sample, causal, scale] = t;
    return {
        Wire<DType>::unwrap(dtype), Wire<DType>::unwrap(prompt_dtype), B, H, Hkv, L, D, P, per_sample, causal, scale};
  }
};

template <>
struct Wire<const Heads&> : Wire<Heads> {};

template <>
struct Wire<const PromptShape&> : Wire<PromptShape> {};

}  // namespace peft_kernels

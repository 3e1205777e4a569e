// The LoRA kernels with flat arguments, as def_kernel takes them.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/lora.h"
#include "wire.h"

namespace peft_kernels {

inline void wire_lora_shrink(const void* x, DType x_dtype, int64_t M, int64_t K, int64_t ldx, const void* p,
                             DType p_dtype, bool p_is_kr, int64_t r, float alpha, double dropout_p, uint64_t seed,
                             float* s, int64_t lds) {
  lora_shrink({x, x_dtype, ldx}, M, K, {p, p_dtype, p_is_kr ? r : K}, p_is_kr, r, alpha, {dropout_p, seed}, s, lds);
}

inline void wire_lora_wgrad(const void* x, DType x_dtype, int64_t M, int64_t I, int64_t ldx, const float* p,
                            int64_t ldp, int64_t r, float alpha, double dropout_p, uint64_t seed, void* out,
                            DType out_dtype, bool out_is_ri) {
  lora_wgrad({x, x_dtype, ldx}, M, I, p, ldp, r, alpha, {dropout_p, seed}, out, out_dtype, out_is_ri);
}

// (S, ldS, P, P dtype, P is [N, r], r, alpha, dropout_p, seed)
using WireExpandTerm = std::tuple<std::uintptr_t, int64_t, std::uintptr_t, int, bool, int64_t, float, double, uint64_t>;

inline void wire_lora_expand_add(void* out, DType dtype, int64_t M, int64_t N, int64_t ldo,
                                 std::vector<WireExpandTerm> terms) {
  std::vector<ExpandTerm> unwrapped;
  for (const auto& [s, lds, p, p_dtype, p_is_nr, rank, alpha, dropout_p, seed] : terms) {
    const Matrix matrix = {Wire<const void*>::unwrap(p), Wire<DType>::unwrap(p_dtype), p_is_nr ? rank : N};
    unwrapped.push_back({Wire<const float*>::unwrap(s), lds, matrix, p_is_nr, rank, alpha, {dropout_p, seed}});
  }
  lora_expand_add(out, dtype, M, N, ldo, unwrapped.data(), int64_t(unwrapped.size()));
}

inline void wire_philox_mask(uint64_t seed, int64_t M, int64_t K, double p, float* out) {
  philox_mask(seed, M, K, p, out);
}

}  // namespace peft_kernels

// The bottleneck adapter with flat arguments, as def_kernel takes them.
#pragma once

#include <array>
#include <tuple>

#include "cpu/bottleneck.h"
#include "wire.h"

namespace peft_kernels {

using WireVector = std::pair<std::uintptr_t, int>;            // address, dtype
using WireMatrix = std::tuple<std::uintptr_t, int, int64_t>;  // address, dtype, row stride

inline Matrix unwrap_matrix(const WireMatrix& matrix) {
  const auto& [data, dtype, ld] = matrix;
  return {Wire<const void*>::unwrap(data), Wire<DType>::unwrap(dtype), ld};
}

// (down, up, r, K, N, vectors, scaling, activation, dropout_p, seed, add_x); the vectors, each an address (0 is null)
// and a dtype: down_bias, up_bias, ln_weight, ln_bias, channel, gate
using WireAdapter = std::tuple<WireMatrix, WireMatrix, int64_t, int64_t, int64_t, std::array<WireVector, 6>, float, int,
                               double, uint64_t, bool>;

inline Adapter unwrap_adapter(const WireAdapter& wired) {
  const auto& [down, up, r, K, N, vectors, scaling, activation, dropout_p, seed, add_x] = wired;
  Adapter adapter{};
  adapter.down = unwrap_matrix(down), adapter.up = unwrap_matrix(up);
  adapter.r = r, adapter.K = K, adapter.N = N;
  Vector* const to[] = {&adapter.down_bias, &adapter.up_bias, &adapter.ln_weight,
                        &adapter.ln_bias,   &adapter.channel, &adapter.gate};
  for (size_t i = 0; i < vectors.size(); ++i)
    *to[i] = {Wire<const void*>::unwrap(vectors[i].first), Wire<DType>::unwrap(vectors[i].second)};
  adapter.scaling = scaling, adapter.activation = Activation(activation);
  adapter.dropout = {dropout_p, seed}, adapter.add_x = add_x;
  return adapter;
}

inline void wire_bottleneck_forward(const WireAdapter& adapter, const WireMatrix& x, int64_t M, float ln_eps,
                                    const WireMatrix& residual, void* y, DType y_dtype, void* z, DType z_dtype,
                                    float* stats) {
  bottleneck_forward(unwrap_adapter(adapter), unwrap_matrix(x), M, ln_eps, unwrap_matrix(residual), y, y_dtype, z,
                     z_dtype, stats);
}

// gradients: dx, down_weight, down_bias, up_weight, up_bias, ln_weight, ln_bias, channel, gate; 0 where not wanted
inline void wire_bottleneck_backward(const WireAdapter& adapter, const WireMatrix& x, int64_t M, const WireMatrix& dy,
                                     const WireMatrix& z, const float* stats, DType dx_dtype,
                                     const std::array<std::uintptr_t, 9>& gradients) {
  const auto at = [&](int i) { return Wire<void*>::unwrap(gradients[i]); };
  bottleneck_backward(unwrap_adapter(adapter), unwrap_matrix(x), M, unwrap_matrix(dy), unwrap_matrix(z), stats,
                      {at(0), dx_dtype, at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)});
}

}  // namespace peft_kernels

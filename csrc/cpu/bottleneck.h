// A bottleneck adapter, forward and backward: Y = residual + mask * s (act(LN(x) Wd' + bd) Wu' + bu).
//
// Sums are float32. All functions throw std::invalid_argument before anything is written. Results do not depend on the
// number of threads.
#pragma once

#include "cpu/activation.h"
#include "cpu/lora.h"

namespace peft_kernels {

struct Vector {  // contiguous, or null data
  const void* data;
  DType dtype;
};

struct Adapter {
  Matrix down, up;            // [r, K], [N, r]
  int64_t r, K, N;            //
  Vector down_bias, up_bias;  // [r], [N], or null
  Vector ln_weight, ln_bias;  // [K], or null: no layer norm (no bias)
  Vector channel, gate;       // factors [N] and [M], or null
  float scaling;              // a further factor
  Activation activation;
  Dropout dropout;
  bool add_x;  // the residual is x itself (N = K)
};

// stats: mean and 1 / std of every row, [2, M], with layer norm; z: [M, r] pre-activation, or null data.
void bottleneck_forward(const Adapter& adapter, const Matrix& x, int64_t M, float ln_eps, const Matrix& residual,
                        void* y, DType y_dtype, void* z, DType z_dtype, float* stats);

// Null where not wanted. Contiguous, of the parameters' dtypes.
struct AdapterGradients {
  void* dx;
  DType dx_dtype;  // x's, also without dx
  void *down_weight, *down_bias, *up_weight, *up_bias, *ln_weight, *ln_bias, *channel, *gate;
};

// x may be null data where neither its gradient with layer norm nor one of the down-projection is wanted.
void bottleneck_backward(const Adapter& adapter, const Matrix& x, int64_t M, const Matrix& dy, const Matrix& z,
                         const float* stats, const AdapterGradients& gradients);

}  // namespace peft_kernels

// The activations of a bottleneck adapter and their derivatives, branch-free so that the compiler vectorizes the loops
// for whatever the including file may use. NaN in, NaN out.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace peft_kernels {

// In the order of ACTIVATIONS in ops/bottleneck_adapter/activations.py.
enum class Activation {
  Identity,
  Relu,
  Relu2,
  Relu6,
  LeakyRelu,
  Gelu,
  GeluTanh,
  QuickGelu,
  Silu,
  Mish,
  Tanh,
  Sigmoid,
  Count
};

namespace {

// 2^n e^f with |f| <= ln 2 / 2: ln 2 in two parts of which the first is short, so that its product with n is exact, and
// e^f by a polynomial fitted on Chebyshev nodes (2e-9).
PK_INLINE float exp_f32(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the rounded integer
  const float n = shifted - 12582912.0f, f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 0.00139485899f * f + 0.00837513527f;
  p = p * f + 0.0416662181f;
  p = p * f + 0.166664154f;
  p = p * f + 0.500000011f;
  p = (p * f) * f + f;
  return (p + 1.0f) * bits_float((float_bits(shifted) + 127) << 23);
}

PK_INLINE float sigmoid_f32(float z) { return 1.0f / (1.0f + exp_f32(-z)); }

// Near zero a polynomial in z^2 (4e-9), since the difference of two numbers near one would lose the small ones.
PK_INLINE float tanh_f32(float z) {
  const float magnitude = z < 0 ? -z : z, s = z * z;
  float p = -0.00560768872f * s + 0.0205449054f;
  p = p * s - 0.0537070676f;
  p = p * s + 0.133309573f;
  p = p * s - 0.333332535f;
  const float near = p * s * z + z, far = 1.0f - 2.0f / (exp_f32(2.0f * magnitude) + 1.0f);
  return magnitude < 0.63f ? near : (z < 0 ? -far : far);
}

// The distribution function of the normal distribution, 0.5 (1 + erf(z / sqrt 2)): near zero a polynomial in the square
// (1e-9), further out e^(-x^2) times one in 1 / (1 + x / 2) (9e-9).
PK_INLINE float normal_cdf_f32(float z) {
  const float x = (z < 0 ? -z : z) * 0.707106781f, s = x * x;
  float p = 7.88249711e-05f * s - 0.000801885499f;
  p = p * s + 0.00518931194f;
  p = p * s - 0.0268543288f;
  p = p * s + 0.112835975f;
  p = p * s - 0.376126269f;
  p = p * s + 1.12837917f;
  const float t = 1.0f / (1.0f + 0.5f * x);
  float q = -0.0560818667f * t - 0.0492007033f;
  q = q * t + 0.393119416f;
  q = q * t + 0.108699142f;
  q = q * t + 0.327981758f;
  q = q * t + 0.274196809f;
  q = q * t + 0.000558278542f;
  const float erfc = x < 1.0f ? 1.0f - p * x : exp_f32(-s) * q;
  return z < 0 ? 0.5f * erfc : 1.0f - 0.5f * erfc;
}

struct Pointwise {  // a function's value and derivative
  float value, slope;
};

template <Activation kind>
PK_INLINE Pointwise pointwise(float z) {
  if constexpr (kind == Activation::Relu) {
    return {z < 0 ? 0.0f : z, z <= 0 ? 0.0f : 1.0f};
  } else if constexpr (kind == Activation::Relu2) {
    const float positive = z < 0 ? 0.0f : z;
    return {positive * positive, 2.0f * positive};
  } else if constexpr (kind == Activation::Relu6) {
    return {z < 0 ? 0.0f : (z > 6.0f ? 6.0f : z), z <= 0 || z >= 6.0f ? 0.0f : 1.0f};
  } else if constexpr (kind == Activation::LeakyRelu) {
    return {z > 0 ? z : 0.01f * z, z > 0 ? 1.0f : 0.01f};
  } else if constexpr (kind == Activation::Gelu) {
    const float cdf = normal_cdf_f32(z);
    return {z * cdf, cdf + z * 0.398942280f * exp_f32(-0.5f * z * z)};
  } else if constexpr (kind == Activation::GeluTanh) {
    const float t = tanh_f32(0.797884561f * (z + 0.044715f * z * z * z)), slope = 1.0f + 3.0f * 0.044715f * z * z;
    // far out z^2 overflows where 1 - t^2 is zero
    const float tail = t * t < 1.0f ? 0.5f * z * (1.0f - t * t) * 0.797884561f * slope : 0.0f;
    return {0.5f * z * (1.0f + t), 0.5f * (1.0f + t) + tail};
  } else if constexpr (kind == Activation::QuickGelu) {
    const float s = sigmoid_f32(1.702f * z);
    return {z * s, s + 1.702f * z * s * (1.0f - s)};
  } else if constexpr (kind == Activation::Silu) {
    const float s = sigmoid_f32(z);
    return {z * s, s + z * s * (1.0f - s)};
  } else if constexpr (kind == Activation::Mish) {
    const float e = exp_f32(z > 20.0f ? 20.0f : z), n = e * (e + 2.0f);  // tanh(log(1 + e)) = n / (n + 2)
    const float t = z > 20.0f ? 1.0f : n / (n + 2.0f), rest = z > 20.0f ? 0.0f : 2.0f / (n + 2.0f);
    return {z * t, t + z * rest * (1.0f + t) * (e / (1.0f + e))};
  } else if constexpr (kind == Activation::Tanh) {
    const float t = tanh_f32(z);
    return {t, 1.0f - t * t};
  } else if constexpr (kind == Activation::Sigmoid) {
    const float s = sigmoid_f32(z);
    return {s, s * (1.0f - s)};
  } else {
    return {z, 1.0f};
  }
}

template <Activation kind>
void pointwise_row(const float* __restrict z, int64_t n, float* __restrict value, float* __restrict slope) {
  if (slope) {
    for (int64_t i = 0; i < n; ++i) {
      const Pointwise at = pointwise<kind>(z[i]);
      value[i] = at.value;
      slope[i] = at.slope;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) value[i] = pointwise<kind>(z[i]).value;
  }
}

// value = act(z) and, unless it is null, slope = act'(z).
inline void activate(Activation kind, const float* z, int64_t n, float* value, float* slope) {
  switch (kind) {
#define PK_CASE(NAME)    \
  case Activation::NAME: \
    return pointwise_row<Activation::NAME>(z, n, value, slope)
    PK_CASE(Identity);
    PK_CASE(Relu);
    PK_CASE(Relu2);
    PK_CASE(Relu6);
    PK_CASE(LeakyRelu);
    PK_CASE(Gelu);
    PK_CASE(GeluTanh);
    PK_CASE(QuickGelu);
    PK_CASE(Silu);
    PK_CASE(Mish);
    PK_CASE(Tanh);
    PK_CASE(Sigmoid);
#undef PK_CASE
    case Activation::Count:
      return;
  }
}

}  // namespace
}  // namespace peft_kernels

// Sixteen float32 lanes in the compilers' own vector type: one source for every instruction set.
//
// Included by files of different instruction sets: everything has internal linkage, see cpu/inline.h.
#pragma once

#include <cstring>

#include "cpu/dtype.h"

#ifdef __AVX512F__
#include "cpu/lora_avx512_common.h"
#endif

namespace peft_kernels {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

PK_INLINE f32x16 splat(float x) { return x - f32x16{}; }

template <class V>
PK_INLINE V load_vector(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
PK_INLINE void store_vector(void* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

PK_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
#ifdef __AVX512F__
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

PK_INLINE i32x16 lane_numbers() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

PK_INLINE f32x16 first_lanes_of(f32x16 v, int64_t n, float other) {
  return lane_numbers() < int32_t(n) - i32x16{} ? v : splat(other);
}

PK_INLINE float sum_lanes(f32x16 v) {
  float lanes[16];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

PK_INLINE float max_lanes(f32x16 v) {
  float lanes[16];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// e^x within 2 units in the last place; zero where it would be subnormal, NaN stays NaN. x is at most 88.
PK_INLINE f32x16 exponential(f32x16 x) {
  const f32x16 lowest = splat(-87.33f), clamped = x < lowest ? lowest : x;
  const f32x16 magic = splat(12582912.0f);  // adding it rounds to an integer
  const f32x16 n = multiply_add(clamped, splat(1.44269504f), magic) - magic;
  f32x16 r = multiply_add(n, splat(-0.693359375f), clamped);
  r = multiply_add(n, splat(2.12194440e-4f), r);
  constexpr float kSeries[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                               5.0000001201e-1f};
  f32x16 p = splat(1.9875691500e-4f);
  for (int i = 0; i < 5; ++i) p = multiply_add(p, r, splat(kSeries[i]));
  p = multiply_add(p * r, r, r) + splat(1.0f);
  const i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
  return x < lowest ? f32x16{} : p * (f32x16)power;
}

PK_INLINE u16x16 to_bf16(f32x16 v) {
#ifdef __AVX512F__
  return (u16x16)round_bf16((__m512)v);
#else
  const u32x16 bits = (u32x16)v, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40u, u16x16);
#endif
}

// n <= 16 consecutive elements; the other lanes are zero.
PK_INLINE f32x16 load_elements(const void* data, DType dtype, int64_t index, int64_t n) {
#ifdef __AVX512F__
  return (f32x16)load16(data, dtype, index, __mmask16((1u << n) - 1));
#else
  float lanes[16] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = load_f32(data, index + i, dtype);
  return load_vector<f32x16>(lanes);
#endif
}

PK_INLINE void store_elements(void* data, DType dtype, int64_t index, int64_t n, f32x16 v) {
#ifdef __AVX512F__
  store16(data, dtype, index, (__m512)v, __mmask16((1u << n) - 1));
#else
  float lanes[16];
  store_vector(lanes, v);
  for (int64_t i = 0; i < n; ++i) store_f32(data, index + i, dtype, lanes[i]);
#endif
}

}  // namespace
}  // namespace peft_kernels

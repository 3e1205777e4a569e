// Sixteen float32 as one value on every instruction set, for kernels that are written once.
//
// Internal linkage and always inlined: see cpu/inline.h. Loads and stores of `count` elements touch nothing beyond
// them; a load fills the rest with zeros.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

#if defined(__AVX512F__)
#include "cpu/vec_avx512.h"
#elif defined(__AVX2__)
#include <immintrin.h>
#endif

namespace peft_kernels {
namespace {

constexpr int64_t kVec = 16;

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
constexpr int kVecRegisters = 32;

PK_INLINE Vec vec_zero() { return {_mm512_setzero_ps()}; }
PK_INLINE Vec vec_set(float value) { return {_mm512_set1_ps(value)}; }
PK_INLINE Vec vec_load(const float* p) { return {_mm512_loadu_ps(p)}; }
PK_INLINE void vec_store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
PK_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
PK_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
PK_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
PK_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
PK_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
PK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {multiply_add(a.v, b.v, c.v)}; }
PK_INLINE float vec_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
PK_INLINE float vec_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
PK_INLINE Vec vec_larger(Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), b.v, a.v)};
}
PK_INLINE Vec vec_first(Vec a, int64_t count, float other = 0) {
  return {_mm512_mask_blend_ps(first16(count), _mm512_set1_ps(other), a.v)};
}

PK_INLINE Vec vec_load(const void* data, DType dtype, int64_t i, int64_t count = kVec) {
  return {load16(data, dtype, i, first16(count))};
}

PK_INLINE void vec_store(void* data, DType dtype, int64_t i, Vec a, int64_t count = kVec) {
  store16(data, dtype, i, a.v, first16(count));
}

PK_INLINE void vec_transpose(Vec (&v)[16]) {
  __m512 rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = v[i].v;
  transpose16(rows);
  for (int i = 0; i < 16; ++i) v[i].v = rows[i];
}

#else

#pragma GCC diagnostic ignored "-Wpsabi"  // by value, but never across a call
typedef float VecHalf __attribute__((vector_size(32)));  // GCC and Clang lower it to what the machine has

struct Vec {
  VecHalf a, b;
};
constexpr int kVecRegisters = 16;

PK_INLINE Vec vec_zero() { return {VecHalf{}, VecHalf{}}; }
PK_INLINE Vec vec_set(float x) { return {VecHalf{x, x, x, x, x, x, x, x}, VecHalf{x, x, x, x, x, x, x, x}}; }
PK_INLINE Vec vec_load(const float* p) {
  Vec v;
  __builtin_memcpy(&v.a, p, 32);
  __builtin_memcpy(&v.b, p + 8, 32);
  return v;
}
PK_INLINE void vec_store(float* p, Vec v) {
  __builtin_memcpy(p, &v.a, 32);
  __builtin_memcpy(p + 8, &v.b, 32);
}
PK_INLINE Vec operator+(Vec x, Vec y) { return {x.a + y.a, x.b + y.b}; }
PK_INLINE Vec operator-(Vec x, Vec y) { return {x.a - y.a, x.b - y.b}; }
PK_INLINE Vec operator*(Vec x, Vec y) { return {x.a * y.a, x.b * y.b}; }
PK_INLINE Vec operator/(Vec x, Vec y) { return {x.a / y.a, x.b / y.b}; }
PK_INLINE VecHalf multiply_add(VecHalf x, VecHalf y, VecHalf z) {
#if defined(__FMA__)
  return (VecHalf)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  return x * y + z;
#endif
}
PK_INLINE Vec multiply_add(Vec x, Vec y, Vec z) { return {multiply_add(x.a, y.a, z.a), multiply_add(x.b, y.b, z.b)}; }
PK_INLINE float vec_sum(Vec v) {
  const VecHalf s = v.a + v.b;
  return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

PK_INLINE float vec_max(Vec v) {
  const VecHalf m = v.a > v.b ? v.a : v.b;
  float most = m[0];
  for (int i = 1; i < 8; ++i) most = most > m[i] ? most : m[i];
  return most;
}

// Lane by lane, the first where it is larger.
PK_INLINE Vec vec_larger(Vec x, Vec y) { return {x.a > y.a ? x.a : y.a, x.b > y.b ? x.b : y.b}; }

// The first `count` lanes, `other` in the others.
PK_INLINE Vec vec_first(Vec v, int64_t count, float other = 0) {
  float values[kVec];
  vec_store(values, v);
  for (int64_t lane = count < 0 ? 0 : count; lane < kVec; ++lane) values[lane] = other;
  return vec_load(values);
}

PK_INLINE Vec vec_load(const void* data, DType dtype, int64_t i, int64_t count = kVec) {
  if (dtype == DType::F32 && count >= kVec) return vec_load((const float*)data + i);
  float values[kVec] = {};
  for (int64_t lane = 0; lane < min64(count, kVec); ++lane) values[lane] = load_f32(data, i + lane, dtype);
  return vec_load(values);
}

PK_INLINE void vec_store(void* data, DType dtype, int64_t i, Vec v, int64_t count = kVec) {
  if (dtype == DType::F32 && count >= kVec) return vec_store((float*)data + i, v);
  float values[kVec];
  vec_store(values, v);
  for (int64_t lane = 0; lane < min64(count, kVec); ++lane) store_f32(data, i + lane, dtype, values[lane]);
}

PK_INLINE void vec_transpose(Vec (&v)[16]) {
  float rows[16][16], columns[16][16];
  for (int i = 0; i < 16; ++i) vec_store(rows[i], v[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) columns[j][i] = rows[i][j];
  for (int i = 0; i < 16; ++i) v[i] = vec_load(columns[i]);
}

#endif

}  // namespace
}  // namespace peft_kernels

// Sixteen float32 as one value on every instruction set, for kernels that are written once.
//
// Internal linkage and always inlined: see cpu/inline.h. Loads and stores of `count` elements touch nothing beyond
// them; a load fills the rest with zeros.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

#if defined(__AVX512F__)
#include "cpu/transpose_avx512.h"
#elif defined(__AVX2__)
#include <immintrin.h>
#endif

namespace peft_kernels {
namespace {

constexpr int64_t kVec = 16;

PK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }  // no std templates: see cpu/inline.h

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
constexpr int kVecRegisters = 32;

PK_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1);
}

PK_INLINE Vec vec_zero() { return {_mm512_setzero_ps()}; }
PK_INLINE Vec vec_set(float value) { return {_mm512_set1_ps(value)}; }
PK_INLINE Vec vec_load(const float* p) { return {_mm512_loadu_ps(p)}; }
PK_INLINE void vec_store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
PK_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
PK_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
PK_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
PK_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
PK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PK_INLINE float vec_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
PK_INLINE Vec vec_first(Vec a, int64_t count) { return {_mm512_maskz_mov_ps(first_lanes(count), a.v)}; }

PK_INLINE Vec vec_load(const void* data, DType dtype, int64_t i, int64_t count = kVec) {
  const __mmask16 lanes = first_lanes(count);
  if (dtype == DType::F32) {
    const float* from = (const float*)data + i;
    return {count >= kVec ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(lanes, from)};
  }
  const uint16_t* from = (const uint16_t*)data + i;
  const __m256i half = count >= kVec ? _mm256_loadu_si256((const __m256i*)from) : _mm256_maskz_loadu_epi16(lanes, from);
  if (dtype == DType::F16) return {_mm512_cvtph_ps(half)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

PK_INLINE __m256i round_bf16(__m512 value) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value), low = _mm512_set1_epi32(0x7fff);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, low));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}

// Masked stores are several times as slow as whole ones (Zen 4).
PK_INLINE void vec_store(void* data, DType dtype, int64_t i, Vec a, int64_t count = kVec) {
  const __mmask16 lanes = first_lanes(count);
  if (dtype == DType::F32) {
    float* to = (float*)data + i;
    return count >= kVec ? _mm512_storeu_ps(to, a.v) : _mm512_mask_storeu_ps(to, lanes, a.v);
  }
  uint16_t* to = (uint16_t*)data + i;
  const __m256i half = dtype == DType::BF16 ? round_bf16(a.v) : _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
  count >= kVec ? _mm256_storeu_si256((__m256i*)to, half) : _mm256_mask_storeu_epi16(to, lanes, half);
}

PK_INLINE void vec_transpose(Vec (&v)[16]) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castps_si512(v[i].v);
  transpose16(rows);
  for (int i = 0; i < 16; ++i) v[i].v = _mm512_castsi512_ps(rows[i]);
}

#else

#pragma GCC diagnostic ignored "-Wpsabi"  // by value, but never across a call
typedef float VecHalf __attribute__((vector_size(32)));  // GCC and Clang lower it to what the machine has

struct Vec {
  VecHalf a, b;
};
constexpr int kVecRegisters = 16;

PK_INLINE Vec vec_zero() { return {VecHalf{}, VecHalf{}}; }
PK_INLINE Vec vec_set(float value) { return {VecHalf{} + value, VecHalf{} + value}; }
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
PK_INLINE Vec multiply_add(Vec x, Vec y, Vec z) {
#if defined(__FMA__)
  return {(VecHalf)_mm256_fmadd_ps((__m256)x.a, (__m256)y.a, (__m256)z.a),
          (VecHalf)_mm256_fmadd_ps((__m256)x.b, (__m256)y.b, (__m256)z.b)};
#else
  return {x.a * y.a + z.a, x.b * y.b + z.b};
#endif
}
PK_INLINE float vec_sum(Vec v) {
  const VecHalf s = v.a + v.b;
  return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

// The first `count` lanes, zeros in the others.
PK_INLINE Vec vec_first(Vec v, int64_t count) {
  float values[kVec];
  vec_store(values, v);
  for (int64_t lane = count < 0 ? 0 : count; lane < kVec; ++lane) values[lane] = 0;
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

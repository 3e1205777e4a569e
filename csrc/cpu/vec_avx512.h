// Sixteen elements from and to memory, and 16 x 16 of them transposed. Included by AVX-512 files only; internal
// linkage, see cpu/inline.h.
#pragma once

#include <immintrin.h>

#include "cpu/dtype.h"

namespace peft_kernels {
namespace {

inline __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1); }

inline __m512 widen_bf16(__m256i raw) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)); }

PK_INLINE __m512 load16(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::F32) return _mm512_loadu_ps((const float*)data + i);
  const __m256i raw = _mm256_loadu_si256((const __m256i*)((const uint16_t*)data + i));
  return dtype == DType::F16 ? _mm512_cvtph_ps(raw) : widen_bf16(raw);
}

// Reads nothing outside of the mask: zeros.
PK_INLINE __m512 load16(const void* data, DType dtype, int64_t i, __mmask16 m) {
  if (m == 0xffff) return load16(data, dtype, i);
  if (dtype == DType::F32) return _mm512_maskz_loadu_ps(m, (const float*)data + i);
  const __m256i raw = _mm256_maskz_loadu_epi16(m, (const uint16_t*)data + i);
  return dtype == DType::F16 ? _mm512_cvtph_ps(raw) : widen_bf16(raw);
}

PK_INLINE __m256i round_bf16(__m512 v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v), low = _mm512_set1_epi32(0x7fff);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, low));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}

// A whole vector is not stored through a mask: Zen 4 splits masked stores into many operations.
PK_INLINE void store16(void* data, DType dtype, int64_t i, __m512 v, __mmask16 m) {
  if (dtype == DType::F32) {
    float* to = (float*)data + i;
    return m == 0xffff ? _mm512_storeu_ps(to, v) : _mm512_mask_storeu_ps(to, m, v);
  }
  const __m256i raw =
      dtype == DType::F16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : round_bf16(v);
  uint16_t* to = (uint16_t*)data + i;
  m == 0xffff ? _mm256_storeu_si256((__m256i*)to, raw) : _mm256_mask_storeu_epi16(to, m, raw);
}

// Transposes 16 x 16 dwords in place.
inline void transpose16(__m512i v[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

inline void transpose16(__m512 (&v)[16]) {
  __m512i bits[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(v[i]);
  transpose16(bits);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_castsi512_ps(bits[i]);
}

}  // namespace
}  // namespace peft_kernels

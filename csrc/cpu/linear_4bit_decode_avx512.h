// Shifts and tables of the AVX-512 kernels.
#pragma once

#include "cpu/linear_4bit_decode.h"

namespace peft_kernels {
namespace {

// How far the dwords, repeated in both halves, are shifted so that their lowest nibbles are positions 16 t to 16 t
// + 15.
inline __m512i nibble_shifts(int t) {
  return _mm512_inserti64x4(_mm512_set1_epi32(8 * t), _mm256_set1_epi32(8 * t + 4), 1);
}

// The 16 scaled codes rounded to the dtype that weights have.
inline __m512 rounded_table(__m512 code, float scale, DType dtype) {
  const __m512 product = _mm512_mul_ps(code, _mm512_set1_ps(scale));
  if (dtype == DType::F32) return product;
  if (dtype == DType::F16)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const __m512i bits = _mm512_castps_si512(product);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb);
  const __m512 rounded = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000u))));
  return _mm512_mask_mov_ps(rounded, _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q), product);
}

}  // namespace
}  // namespace peft_kernels

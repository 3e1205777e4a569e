// Tables and look-ups of the AVX2 kernels.
#pragma once

#include "cpu/linear_4bit_decode.h"

namespace peft_kernels {
namespace {

struct Table {
  __m256 lower, upper;
};

inline __m256 rounded(__m256 value, DType dtype) {
  if (dtype == DType::F32) return value;
  if (dtype == DType::F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb);
  const __m256 even = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int(0xffff0000u))));
  return _mm256_blendv_ps(even, value, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
}

// The 16 scaled codes rounded to the dtype that weights have.
inline Table rounded_table(const float* code, float scale, DType dtype) {
  const __m256 factor = _mm256_set1_ps(scale);
  return {rounded(_mm256_mul_ps(_mm256_loadu_ps(code), factor), dtype),
          rounded(_mm256_mul_ps(_mm256_loadu_ps(code + 8), factor), dtype)};
}

// Nibble s of each of the 8 dwords at `packed`.
inline __m256 decode8(const Table& table, const uint8_t* packed, int s) {
  const __m256i dwords = _mm256_loadu_si256((const __m256i*)packed);
  const __m256i nibbles = _mm256_srli_epi32(dwords, 4 * s);  // vpermps reads 3 index bits
  const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(dwords, 28 - 4 * s));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lower, nibbles),
                          _mm256_permutevar8x32_ps(table.upper, nibbles), fourth_bit);
}

}  // namespace
}  // namespace peft_kernels

// Tables and look-ups of the AVX2 kernels: 64 weights, eight at a position.
#pragma once

#include "cpu/linear_4bit_decode.h"

namespace peft_kernels {
namespace {

// To bfloat16 in the upper half; the lower is left over.
inline __m256i round_to_upper(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

inline __m256 upper_half(__m256i words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u))));
}

// Two look-ups of three bits, and a choice by the fourth.
struct NibblesAvx2 {
  struct Table {
    __m256 lower, upper;
  };
  const float* code;
  DType dtype;

  NibblesAvx2(const float* code, DType dtype) : code(code), dtype(dtype) {}

  static int element(int position) { return nibble_order(position); }

  // The 16 scaled codes rounded to the dtype; `scale` is canonical().
  Table table(float scale) const {
    const __m256 factor = _mm256_set1_ps(scale);
    const __m256 lower = _mm256_mul_ps(_mm256_loadu_ps(code), factor);
    const __m256 upper = _mm256_mul_ps(_mm256_loadu_ps(code + 8), factor);
    if (dtype == DType::F32) return {lower, upper};
    if (dtype == DType::BF16) return {upper_half(round_to_upper(lower)), upper_half(round_to_upper(upper))};
    return {_mm256_cvtph_ps(_mm256_cvtps_ph(lower, _MM_FROUND_TO_NEAREST_INT)),
            _mm256_cvtph_ps(_mm256_cvtps_ph(upper, _MM_FROUND_TO_NEAREST_INT))};
  }

  // Nibble t of each of the 8 dwords at `packed`.
  __m256 operator()(const Table& table, const uint8_t* packed, int t) const {
    const __m256i dwords = _mm256_loadu_si256((const __m256i*)packed);
    const __m256i nibbles = _mm256_srli_epi32(dwords, 4 * t);  // vpermps reads 3 index bits
    const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(dwords, 28 - 4 * t));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lower, nibbles),
                            _mm256_permutevar8x32_ps(table.upper, nibbles), fourth_bit);
  }
};

// Weights of bfloat16, where all positions are decoded at once: 32 look-ups of their lower bytes, and as many of their
// upper ones. Half the instructions of the other way.
struct WordsAvx2 {
  struct Table {
    __m256i low, high;  // bytes of the 16 scaled codes, in both lanes
  };
  alignas(32) float code[2][8];  // as table() merges them: codes 0 to 3 and 8 to 11, the others

  WordsAvx2(const float* codes, DType) {
    for (int i = 0; i < 16; ++i) code[i / 4 % 2][i / 8 * 4 + i % 4] = codes[i];
  }

  // Dword d of position 4 h + 2 u + e has, in its upper half, nibble h (0: the upper) of byte 16 (d / 4) + 8 u +
  // 2 (d % 4) + e: what unpacking leaves.
  static int element(int position) {
    const int d = position % 8, v = position / 8;
    return 2 * (16 * (d / 4) + 8 * (v / 2 % 2) + 2 * (d % 4) + v % 2) + v / 4;
  }

  Table table(float scale) const {
    const __m256 factor = _mm256_set1_ps(scale);
    const __m256i a = round_to_upper(_mm256_mul_ps(factor, _mm256_load_ps(code[0])));
    const __m256i b = round_to_upper(_mm256_mul_ps(factor, _mm256_load_ps(code[1])));
    const __m256i words = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
    const __m256i lower_then_upper =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15));
    const __m256i bytes = _mm256_shuffle_epi8(words, lower_then_upper);
    return {_mm256_permute4x64_epi64(bytes, 0x88), _mm256_permute4x64_epi64(bytes, 0xdd)};
  }

  __m256 operator()(const Table& table, const uint8_t* packed, int t) const {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)packed);
    const __m256i nibbles = _mm256_and_si256(t < 4 ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(table.low, nibbles), high = _mm256_shuffle_epi8(table.high, nibbles);
    const __m256i words = t / 2 % 2 == 0 ? _mm256_unpacklo_epi8(low, high) : _mm256_unpackhi_epi8(low, high);
    return t % 2 == 0 ? _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)) : upper_half(words);
  }
};

}  // namespace
}  // namespace peft_kernels

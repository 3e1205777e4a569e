// Tables, look-ups and scales of the AVX-512 kernels.
#pragma once

#include "cpu/linear_4bit_decode.h"

namespace peft_kernels {
namespace {

// GCC would make constants anew in every turn of a loop, by instructions of the port that looks nibbles up.
template <typename T>
T kept(T constant) {
  asm("" : "+v"(constant));
  return constant;
}

struct DecodeAvx512 {
  using Table = __m512;
  __m512 code;
  DType dtype;
  const int* rounding;
  __m512i shifts[4];  // of dwords, repeated in both halves, so that their lowest nibbles are positions 16 t and on

  DecodeAvx512(const float* code, DType dtype) : code(_mm512_loadu_ps(code)), dtype(dtype) {
    static constexpr int kRounding[] = {0x8000, 0xffff, int(0xffff0000u), int(0xfffe0000u)};
    rounding = kRounding;
    asm("" : "+r"(rounding));
    for (int t = 0; t < 4; ++t)
      shifts[t] = kept(_mm512_inserti64x4(_mm512_set1_epi32(8 * t), _mm256_set1_epi32(8 * t + 4), 1));
  }

  static int element(int position) { return nibble_order(position); }

  // The 16 scaled codes rounded to the dtype; `scale` is canonical().
  Table table(float scale) const {
    const __m512 product = _mm512_mul_ps(code, _mm512_set1_ps(scale));
    if (dtype == DType::F32) return product;
    if (dtype == DType::F16)
      return _mm512_cvtph_ps(_mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    // To bfloat16: half a step up, then cut; what was a tie has no digits left to cut, and its last bit becomes even.
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(product), _mm512_set1_epi32(rounding[0]));
    const __mmask16 tie = _mm512_testn_epi32_mask(up, _mm512_set1_epi32(rounding[1]));
    const __m512i cut = _mm512_and_si512(up, _mm512_set1_epi32(rounding[2]));
    return _mm512_castsi512_ps(_mm512_mask_and_epi32(cut, tie, up, _mm512_set1_epi32(rounding[3])));
  }

  __m512 operator()(Table table, const uint8_t* packed, int t) const {
    const __m512i dwords = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)packed));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(dwords, shifts[t]), table);  // reads 4 index bits
  }
};

// values[codes[i]] of 256 values: eight look-ups of five bits and a choice by the other three take a third of the time
// of a gather, or of as many loads and stores.
PK_INLINE __m512 look_up256(const float* values, __m128i codes) {
  const __m512i index = _mm512_cvtepu8_epi32(codes);
  __m512 found[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    found[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(values + 32 * i), index, _mm512_loadu_ps(values + 32 * i + 16));
#pragma GCC unroll 3
  for (int bit = 5, step = 1; bit < 8; ++bit, step *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2 * step) found[i] = _mm512_mask_blend_ps(odd, found[i], found[i + step]);
  }
  return found[0];
}

// canonical() scales of blocks [first, first + count).
inline void row_scales(const Weight4& w, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count;) {
    const int64_t group = w.absmax2 ? (first + i) / w.nested_blocksize : 0;
    const int64_t end = w.absmax2 ? min64(count, (group + 1) * w.nested_blocksize - first) : count;
    for (; i < end; i += 16) {
      const __mmask16 present = end - i < 16 ? __mmask16((1 << (end - i)) - 1) : __mmask16(0xffff);
      __m512 scale;
      if (w.absmax2) {
        const __m128i codes = _mm_maskz_loadu_epi8(present, static_cast<const uint8_t*>(w.absmax) + first + i);
        const __m512 product = _mm512_mul_ps(look_up256(w.code2, codes), _mm512_set1_ps(w.absmax2[group]));
        scale = _mm512_add_ps(product, _mm512_set1_ps(*w.offset));
      } else {
        scale = _mm512_maskz_loadu_ps(present, static_cast<const float*>(w.absmax) + first + i);
      }
      const __mmask16 nan = _mm512_cmp_ps_mask(scale, scale, _CMP_UNORD_Q);
      _mm512_mask_storeu_ps(out + i, present, _mm512_mask_mov_ps(scale, nan, _mm512_set1_ps(kNaN)));
    }
    i = end;
  }
}

}  // namespace
}  // namespace peft_kernels

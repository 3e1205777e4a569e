// Decode into pairs of bfloat16: what the dot form and the broadcast form of the bf16 kernels share.
#pragma once

#include "cpu/linear_4bit_decode_avx512.h"
#include "cpu/linear_4bit_finish.h"

namespace peft_kernels {
namespace {

// The 256 values of nested statistics as four planes of bytes, so that vpermi2b looks 64 of them up at once: a third of
// a cycle each where a scalar load and its store take two.
struct CodePlanes {
  __m512i low[4][2], high[4][2];  // plane p: byte p of values 0 to 127, and of 128 to 255

  explicit CodePlanes(const float* code2) {
    for (int p = 0; p < 4; ++p) {
      alignas(64) uint8_t bytes[256];
      for (int i = 0; i < 16; ++i) {
        const __m512i value = _mm512_loadu_si512(code2 + 16 * i);
        const __m512i byte = _mm512_srl_epi32(value, _mm_cvtsi32_si128(8 * p));
        _mm_store_si128((__m128i*)(bytes + 16 * i), _mm512_cvtepi32_epi8(byte));
      }
      for (int i = 0; i < 2; ++i) {
        low[p][i] = _mm512_load_si512(bytes + 64 * i);
        high[p][i] = _mm512_load_si512(bytes + 128 + 64 * i);
      }
    }
  }

  // out[i] = code2[q[i]] * absmax2 + offset for 64 of them.
  void scales64(const uint8_t* q, __m512 absmax2, __m512 offset, float* out) const {
    // the unpacking below takes a 4 x 4 matrix of dwords transposed
    const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i index = _mm512_permutexvar_epi32(transpose, _mm512_loadu_si512(q));
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i plane[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p)
      plane[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(low[p][0], index, low[p][1]),
                                        _mm512_permutex2var_epi8(high[p][0], index, high[p][1]));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto unpack8 = [half](__m512i a, __m512i b) {
        return half ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
      };
      const __m512i words = unpack8(plane[0], plane[1]), upper_words = unpack8(plane[2], plane[3]);
      const __m512 a = _mm512_castsi512_ps(_mm512_unpacklo_epi16(words, upper_words));
      const __m512 b = _mm512_castsi512_ps(_mm512_unpackhi_epi16(words, upper_words));
      _mm512_storeu_ps(out + 32 * half, _mm512_add_ps(_mm512_mul_ps(a, absmax2), offset));
      _mm512_storeu_ps(out + 32 * half + 16, _mm512_add_ps(_mm512_mul_ps(b, absmax2), offset));
    }
  }
};

// float32 scales of 64-element blocks [first, first + count) of the flat weight; a larger blocksize repeats its scale.
inline void block_scales(const Weight4& w, int64_t first, int64_t count, float* out) {
  const int64_t repeat = w.blocksize / 64;
  if (repeat != 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = w.scale((first + i) / repeat);
    return;
  }
  if (!w.absmax2) {
    const float* absmax = static_cast<const float*>(w.absmax) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = absmax[i];
    return;
  }
  const uint8_t* q = static_cast<const uint8_t*>(w.absmax) + first;
  if (count >= 256) {
    const CodePlanes planes(w.code2);
    const __m512 offset = _mm512_set1_ps(*w.offset);
    for (int64_t i = 0; i < count;) {  // runs that share one absmax2
      const int64_t group = (first + i) / w.nested_blocksize;
      const int64_t end = min64(count, (group + 1) * w.nested_blocksize - first);
      const __m512 absmax2 = _mm512_set1_ps(w.absmax2[group]);
      for (; i + 64 <= end; i += 64) planes.scales64(q + i, absmax2, offset, out + i);
      for (; i < end; ++i) out[i] = w.code2[q[i]] * w.absmax2[group] + *w.offset;
    }
    return;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / w.nested_blocksize;
    const int64_t end = min64(count, (group + 1) * w.nested_blocksize - first);
    const float absmax2 = w.absmax2[group];
    for (; i < end; ++i) {
      const float product = w.code2[q[i]] * absmax2;
      out[i] = product + *w.offset;
    }
  }
}

// The 16 scaled codes rounded to bfloat16, twice: vpermw reads 5 index bits, and the fifth is a neighbour's.
inline __m512i bf16_table(__m512 code, float scale) {
  const __m512 product = _mm512_mul_ps(code, _mm512_set1_ps(scale));
  return (__m512i)_mm512_cvtne2ps_pbh(product, product);
}

// 32 packed bytes (64 elements, as 16 words) -> two vectors in "nibble order": word 16 t + j of the pair holds element
// 4 j + t. Four instructions; the order costs nothing where the other operand or the result can be permuted instead.
struct Pair512 {
  __m512i first, second;
};

inline __m512i load64(const uint8_t* packed) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)packed));
}

inline __m512i decode64_first(__m512i table, __m512i packed) {
  const __m512i shifts = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_setzero_si256(), 1);
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(packed, shifts), table);
}

inline __m512i decode64_second(__m512i table, __m512i packed) {
  const __m512i shifts = _mm512_inserti64x4(_mm512_set1_epi16(12), _mm256_set1_epi16(8), 1);
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(packed, shifts), table);
}

inline Pair512 decode64(__m512i table, __m512i packed) {
  return {decode64_first(table, packed), decode64_second(table, packed)};
}

// 16 packed bytes -> 32 elements in natural order, three instructions.
inline __m512i decode32(__m512i table, const uint8_t* packed) {
  const __m512i shifts = _mm512_set1_epi64(0x0008000c00000004);
  const __m512i words = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)packed));
  return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, words), table);
}

}  // namespace
}  // namespace peft_kernels

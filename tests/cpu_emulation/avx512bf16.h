// AVX512-BF16 and VBMI in AVX-512's other instructions, so that the kernels for them are tested on machines without.
// Included before each of their files (PEFT_KERNELS_EMULATE); slow, and unlike the instructions it keeps subnormals.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vec_avx512.h"  // its round_bf16, as long as __AVX512BF16__ is not defined

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

EMULATED __m512 lower(__m512bh pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32((__m512i)pairs, 16)); }

EMULATED __m512 upper(__m512bh pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512((__m512i)pairs, _mm512_set1_epi32(int(0xffff0000u))));
}

EMULATED __m512 dpbf16(__m512 sums, __m512bh a, __m512bh b) {
  return _mm512_fmadd_ps(lower(a), lower(b), _mm512_fmadd_ps(upper(a), upper(b), sums));
}

EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  return (__m512bh)_mm512_inserti64x4(_mm512_castsi256_si512(peft_kernels::round_bf16(low)),
                                      peft_kernels::round_bf16(high), 1);
}

// Byte i of each quadword: eight of its bits, from bit control.byte[i] on.
EMULATED __m512i multishift(__m512i control, __m512i words) {
  const __m512i byte = _mm512_set1_epi64(0xff);
  __m512i out = _mm512_setzero_si512();
  for (int bit = 0; bit < 64; bit += 8) {
    const __m128i place = _mm_cvtsi32_si128(bit);
    const __m512i shifts = _mm512_and_si512(_mm512_srl_epi64(control, place), byte);
    out = _mm512_or_si512(out, _mm512_sll_epi64(_mm512_and_si512(_mm512_rorv_epi64(words, shifts), byte), place));
  }
  return out;
}

EMULATED __m512i permutex2var(__m512i first, __m512i index, __m512i second) {
  alignas(64) uint8_t table[128], from[64], to[64];
  _mm512_store_si512(table, first);
  _mm512_store_si512(table + 64, second);
  _mm512_store_si512(from, index);
  for (int i = 0; i < 64; ++i) to[i] = table[from[i] & 127];
  return _mm512_load_si512(to);
}

}  // namespace emulated

#define _mm512_dpbf16_ps emulated::dpbf16
#define _mm512_cvtneps_pbh peft_kernels::round_bf16
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_multishift_epi64_epi8 emulated::multishift
#define _mm512_permutex2var_epi8 emulated::permutex2var
#define __AVX512BF16__ 1

// Scales and tables of the AVX-512 kernels.
#pragma once

#include <immintrin.h>

#include "cpu/linear_4bit_kernels.h"

namespace peft_kernels {
namespace {

constexpr int64_t kPrefetchRows = 16;  // a strided walk over W outruns the hardware prefetcher

// Scales of the blocks that hold column k in rows [n, n + count).
inline void column_scales(const Weight4& w, int64_t k, int64_t n, int64_t count, float* out) {
  const int64_t step = w.K / w.blocksize;
  int64_t block = n * step + k / w.blocksize;
  if (!w.absmax2 || (w.nested_blocksize & (w.nested_blocksize - 1)) != 0) {
    for (int64_t i = 0; i < count; ++i, block += step) out[i] = w.scale(block);
    return;
  }
  const int shift = __builtin_ctzll(w.nested_blocksize);  // a division would cost as much as decoding 64 weights
  const uint8_t* q = static_cast<const uint8_t*>(w.absmax);
  for (int64_t i = 0; i < count; ++i, block += step) {
    if (i + kPrefetchRows < count) _mm_prefetch((const char*)q + block + kPrefetchRows * step, _MM_HINT_T0);
    const float product = w.code2[q[block]] * w.absmax2[block >> shift];
    out[i] = product + *w.offset;
  }
}

// How far dword i of 32 packed bytes, repeated in both halves, is shifted so that its lowest nibble is element
// nibble_order(t, i) of the 64: one shift and one look-up decode 16 of them, in an order that costs nothing where the
// other operand or the result is put in the same.
inline int nibble_order(int t, int i) { return i < 8 ? 8 * i + 2 * t + 1 : 8 * (i - 8) + 2 * t; }

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

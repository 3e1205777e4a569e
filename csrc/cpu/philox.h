// Counter-based dropout: Philox4x32-10 (Salmon et al., SC'11), so that backward regenerates the mask it never stored.
//
// Element (m, k) of a matrix reads word k & 3 of counter (k >> 2, m, 0, 0) under key (low, high 32 bits of seed) and is
// kept iff word >= uint64(p * 2^32). The compare is 64 bits wide, so p = 1 keeps nothing. The Triton and Python
// definitions are the same, and the tests tie all of them to the published known answers.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Internal linkage throughout: translation units are compiled for different ISAs and must not share these bodies.
namespace peft_kernels {
namespace {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

inline void philox4x32(const uint32_t counter[4], uint64_t seed, uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t(kPhiloxMul0) * c0, product1 = uint64_t(kPhiloxMul1) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// p stays a double: as a float, 0.1 * 2^32 would be 7 too large and the masks of two backends would differ.
inline uint64_t dropout_threshold(double p) { return uint64_t(p * 4294967296.0); }
inline float dropout_scale(double p) { return p < 1.0 ? float(1.0 / (1.0 - p)) : 0.0f; }

// kBlocks groups of eight counters: out[i] = 0 or 1/(1-p) for elements (m, 4 * quad + i), i < 32 * kBlocks.
#if defined(__AVX512F__)
// Counters sit in 64-bit lanes and the upper halves are left dirty, because vpmuludq reads the lower halves only: six
// instructions a round for 32 elements. Lanes 2i and 2i + 1 hold counters i and 4 + i, so that unpacking restores
// order. A round is a chain of three instructions, so four blocks advance together (0.34 ns an element on Zen 4, alone
// 0.46).
template <int kBlocks>
inline void dropout_scale_blocks(uint64_t seed, uint32_t m, uint32_t quad, uint64_t threshold, float scale,
                                 float* out) {
  const __m512i mul0 = _mm512_set1_epi64(kPhiloxMul0), mul1 = _mm512_set1_epi64(kPhiloxMul1);
  const __m512i lane = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  // Words 2 and 3 start at zero: round 0 leaves words 0 and 1 the same in every lane, so round 1 has one vector
  // product.
  const uint64_t uniform = uint64_t(kPhiloxMul0) * (m ^ key0);
  __m512i c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    c3[b] = _mm512_mul_epu32(_mm512_add_epi64(_mm512_set1_epi64(quad + 8 * b), lane), mul0);
    c2[b] = _mm512_xor_si512(_mm512_srli_epi64(c3[b], 32), _mm512_set1_epi64(key1));
  }
  key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1;
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    c1[b] = _mm512_mul_epu32(c2[b], mul1);
    c0[b] = _mm512_xor_si512(_mm512_srli_epi64(c1[b], 32), _mm512_set1_epi64(key0));
    c2[b] = _mm512_xor_si512(c3[b], _mm512_set1_epi64(uint32_t(uniform >> 32) ^ key1));
    c3[b] = _mm512_set1_epi64(uint32_t(uniform));
  }
#pragma GCC unroll 8
  for (int round = 2; round < kPhiloxRounds; ++round) {
    key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1;
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i product0 = _mm512_mul_epu32(c0[b], mul0), product1 = _mm512_mul_epu32(c2[b], mul1);
      c0[b] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[b], _mm512_set1_epi64(key0), 0x96);
      c2[b] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[b], _mm512_set1_epi64(key1), 0x96);
      c1[b] = product1;
      c3[b] = product0;
    }
  }
  const __m512i limit = _mm512_set1_epi32(int(uint32_t(threshold)));
  const __m512 kept = _mm512_set1_ps(scale);
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    const __m512i words01 = _mm512_mask_blend_epi32(0xAAAA, c0[b], _mm512_slli_epi64(c1[b], 32));
    const __m512i words23 = _mm512_mask_blend_epi32(0xAAAA, c2[b], _mm512_slli_epi64(c3[b], 32));
    const __mmask16 first = _mm512_cmpge_epu32_mask(_mm512_unpacklo_epi64(words01, words23), limit);
    const __mmask16 second = _mm512_cmpge_epu32_mask(_mm512_unpackhi_epi64(words01, words23), limit);
    _mm512_storeu_ps(out + 32 * b, _mm512_maskz_mov_ps(first, kept));
    _mm512_storeu_ps(out + 32 * b + 16, _mm512_maskz_mov_ps(second, kept));
  }
}
#else
// Eight counters that advance together: 2.5 ns an element on Zen 4, scalar or AVX2.
inline void dropout_scale32(uint64_t seed, uint32_t m, uint32_t quad, uint64_t threshold, float scale, float* out) {
  uint64_t c0[8], c1[8], c2[8], c3[8];  // with dirty upper halves
  for (int i = 0; i < 8; ++i) c0[i] = quad + i, c1[i] = m, c2[i] = 0, c3[i] = 0;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t product0 = uint64_t(kPhiloxMul0) * uint32_t(c0[i]);
      const uint64_t product1 = uint64_t(kPhiloxMul1) * uint32_t(c2[i]);
      c0[i] = (product1 >> 32) ^ c1[i] ^ key0;
      c2[i] = (product0 >> 32) ^ c3[i] ^ key1;
      c1[i] = product1;
      c3[i] = product0;
    }
    key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1;
  }
  const uint32_t limit = uint32_t(threshold);
  for (int i = 0; i < 8; ++i) {
    out[4 * i] = uint32_t(c0[i]) >= limit ? scale : 0.0f;
    out[4 * i + 1] = uint32_t(c1[i]) >= limit ? scale : 0.0f;
    out[4 * i + 2] = uint32_t(c2[i]) >= limit ? scale : 0.0f;
    out[4 * i + 3] = uint32_t(c3[i]) >= limit ? scale : 0.0f;
  }
}

template <int kBlocks>
inline void dropout_scale_blocks(uint64_t seed, uint32_t m, uint32_t quad, uint64_t threshold, float scale,
                                 float* out) {
  for (int b = 0; b < kBlocks; ++b) dropout_scale32(seed, m, quad + 8 * b, threshold, scale, out + 32 * b);
}
#endif

// out[i] = 0 or `kept` for element (m, k0 + i), i < n. Any k0; multiples of 4 with n a multiple of 128 are fastest.
inline void dropout_row(uint64_t seed, uint64_t m, int64_t k0, int64_t n, double p, float kept, float* out) {
  const uint64_t threshold = dropout_threshold(p);
  if (threshold == 0 || threshold >> 32) {
    for (int64_t i = 0; i < n; ++i) out[i] = threshold == 0 ? kept : 0.0f;
    return;
  }
  int64_t i = 0;
  for (; (k0 & 3) == 0 && i + 128 <= n; i += 128)
    dropout_scale_blocks<4>(seed, uint32_t(m), uint32_t((k0 + i) >> 2), threshold, kept, out + i);
  for (; (k0 & 3) == 0 && i + 32 <= n; i += 32)
    dropout_scale_blocks<1>(seed, uint32_t(m), uint32_t((k0 + i) >> 2), threshold, kept, out + i);
  while (i < n) {
    float block[32];
    const int64_t quad = (k0 + i) >> 2, skip = (k0 + i) & 3;
    const int64_t count = n - i < 32 - skip ? n - i : 32 - skip;
    dropout_scale_blocks<1>(seed, uint32_t(m), uint32_t(quad), threshold, kept, block);
    for (int64_t j = 0; j < count; ++j) out[i + j] = block[skip + j];
    i += count;
  }
}

// The same with the factor that keeps the mean: 0 or 1/(1-p).
inline void dropout_scale_row(uint64_t seed, uint64_t m, int64_t k0, int64_t n, double p, float* out) {
  dropout_row(seed, m, k0, n, p, dropout_scale(p), out);
}

}  // namespace
}  // namespace peft_kernels

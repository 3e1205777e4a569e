// Code search by bisection over the 15 bounds: four permute-compare steps for 16 elements, each exact.
#include <immintrin.h>

#include "cpu/nf4_kernels.h"

namespace peft_kernels {
namespace {

template <DType dtype>
inline __m512 load16(const void* x, int64_t i) {
  if (dtype == DType::F32) return _mm512_loadu_ps(static_cast<const float*>(x) + i);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + i));
  if (dtype == DType::F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

struct Search {
  __m512 bound[4];  // bound[s][rank so far]: the bound that step s compares with
  __m512i order;

  explicit Search(const CodeBook& book) {
    int order_words[16];
    for (int i = 0; i < 16; ++i) order_words[i] = book.order[i];
    order = _mm512_loadu_si512(order_words);
    for (int s = 0; s < 4; ++s) {
      float values[16] = {};
      for (int rank = 0; rank + (8 >> s) < 16; rank += 16 >> s) values[rank] = book.bound(rank + (8 >> s) - 1);
      bound[s] = _mm512_loadu_ps(values);
    }
  }

  inline __m512i codes(__m512 v) const {
    // "Not at most" rather than "above": a NaN ranks last, as in the scalar code.
    const __mmask16 upper = _mm512_cmp_ps_mask(v, _mm512_broadcastss_ps(_mm512_castps512_ps128(bound[0])), _CMP_NLE_UQ);
    __m512i rank = _mm512_maskz_set1_epi32(upper, 8);
    for (int s = 1; s < 4; ++s) {
      const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(rank, bound[s]), _CMP_NLE_UQ);
      rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(8 >> s));
    }
    return _mm512_permutexvar_epi32(rank, order);
  }
};

template <DType dtype>
void quantize_as(const QuantizeJob& job, int64_t first, int64_t last) {
  const Search search(*job.book);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.blocksize, end = begin + job.blocksize;
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = begin; i < end; i += 16)
      top = _mm512_max_epi32(top, _mm512_and_si512(magnitude, _mm512_castps_si512(load16<dtype>(job.x, i))));
    const float absmax = bits_float(uint32_t(_mm512_reduce_max_epi32(top)));
    job.absmax[block] = absmax;
    const __m512 inverse = _mm512_set1_ps(1.0f / (absmax < kTinyAbsmax ? kTinyAbsmax : absmax));
    for (int64_t i = begin; i < end; i += 16) {
      const __m512i codes = search.codes(_mm512_mul_ps(load16<dtype>(job.x, i), inverse));
      const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(job.packed + i / 2), _mm512_cvtepi64_epi8(pairs));
    }
  }
}

}  // namespace

void quantize_blocks_avx512(const QuantizeJob& job, int64_t first, int64_t last) {
  if (job.dtype == DType::F32) return quantize_as<DType::F32>(job, first, last);
  if (job.dtype == DType::F16) return quantize_as<DType::F16>(job, first, last);
  quantize_as<DType::BF16>(job, first, last);
}

}  // namespace peft_kernels

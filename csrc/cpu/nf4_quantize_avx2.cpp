// The bisection of nf4_quantize_avx512.cpp in 8 lanes: the bits found so far index the next step's bounds, of which
// there are at most 8.
#include <immintrin.h>

#include "cpu/nf4_kernels.h"

namespace peft_kernels {
namespace {

template <DType dtype>
inline __m256 load8(const void* x, int64_t i) {
  if (dtype == DType::F32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
  if (dtype == DType::F16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

struct Search {
  __m256 bound[4];
  __m256i order;  // rank -> index, a byte each, in both halves

  explicit Search(const CodeBook& book) {
    order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.order)));
    for (int s = 0; s < 4; ++s) {
      float values[8] = {};
      for (int prefix = 0; prefix < 1 << s; ++prefix) values[prefix] = book.bound((2 * prefix + 1) * (8 >> s) - 1);
      bound[s] = _mm256_loadu_ps(values);
    }
  }

  inline __m256i ranks(__m256 v) const {
    __m256i rank = _mm256_setzero_si256();
    for (int s = 0; s < 4; ++s) {
      // "Not at most" rather than "above": a NaN ranks last, as in the scalar code.
      const __m256 above = _mm256_cmp_ps(v, _mm256_permutevar8x32_ps(bound[s], rank), _CMP_NLE_UQ);
      rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), _mm256_castps_si256(above));
    }
    return rank;
  }
};

inline uint32_t highest(__m256i values) {
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1))));
}

template <DType dtype>
void quantize_as(const QuantizeJob& job, int64_t first, int64_t last) {
  const Search search(*job.book);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  // Within each half: 8 codes as words become 4 bytes, 16 * even + odd, each in a word.
  const __m256i weights = _mm256_set1_epi16(0x0110);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.blocksize, end = begin + job.blocksize;
    __m256i top = _mm256_setzero_si256();
    for (int64_t i = begin; i < end; i += 8)
      top = _mm256_max_epi32(top, _mm256_and_si256(magnitude, _mm256_castps_si256(load8<dtype>(job.x, i))));
    const float absmax = bits_float(highest(top));
    job.absmax[block] = absmax;
    const __m256 inverse = _mm256_set1_ps(1.0f / (absmax < kTinyAbsmax ? kTinyAbsmax : absmax));
    for (int64_t i = begin; i < end; i += 16) {
      const __m256i a = search.ranks(_mm256_mul_ps(load8<dtype>(job.x, i), inverse));
      const __m256i b = search.ranks(_mm256_mul_ps(load8<dtype>(job.x, i + 8), inverse));
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);  // natural order again
      const __m256i bytes = _mm256_packus_epi16(words, words);                          // 0-7 twice, 8-15 twice
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_shuffle_epi8(search.order, bytes), weights);
      const __m256i packed = _mm256_packus_epi16(pairs, pairs);
      const int lower = _mm256_extract_epi32(packed, 0), upper = _mm256_extract_epi32(packed, 4);
      std::memcpy(job.packed + i / 2, &lower, 4);
      std::memcpy(job.packed + i / 2 + 4, &upper, 4);
    }
  }
}

}  // namespace

void quantize_blocks_avx2(const QuantizeJob& job, int64_t first, int64_t last) {
  if (job.dtype == DType::F32) return quantize_as<DType::F32>(job, first, last);
  if (job.dtype == DType::F16) return quantize_as<DType::F16>(job, first, last);
  quantize_as<DType::BF16>(job, first, last);
}

}  // namespace peft_kernels

// y = x W' for few rows with AVX-512 float32 FMA.
#include <immintrin.h>

#include "cpu/linear_4bit_kernels.h"

namespace peft_kernels {
namespace {

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

template <int MR, int NR>
void dot(const Linear4SmallTile& tile, const float* scales, int64_t m, int64_t n, float* sums) {
  const Weight4& w = *tile.weight;
  const __m512 code = _mm512_loadu_ps(w.book().code);
  const int64_t per_row = w.K / w.blocksize;
  __m512 acc[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_setzero_ps();
  const float* x = tile.x + m * w.K;
  for (int64_t block = 0; block < per_row; ++block) {
    __m512 table[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) table[j] = rounded_table(code, scales[j * per_row + block], tile.dtype);
    for (int64_t k = block * w.blocksize; k < (block + 1) * w.blocksize; k += 64) {
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const __m512i shifts = _mm512_inserti64x4(_mm512_set1_epi32(8 * t), _mm256_set1_epi32(8 * t + 4), 1);
        __m512 decoded[NR];
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) {
          const __m256i packed = _mm256_loadu_si256((const __m256i*)(w.packed + ((n + j) * w.K + k) / 2));
          const __m512i nibbles = _mm512_srlv_epi32(_mm512_broadcast_i64x4(packed), shifts);
          decoded[j] = _mm512_permutexvar_ps(nibbles, table[j]);  // reads 4 index bits
        }
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
          const __m512 v = _mm512_loadu_ps(x + i * w.K + k + 16 * t);
#pragma GCC unroll 4
          for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_fmadd_ps(v, decoded[j], acc[i][j]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) sums[(m + i) * kLinear4SmallLanes + j] = _mm512_reduce_add_ps(acc[i][j]);
}

template <int NR>
void dot_rows(const Linear4SmallTile& tile, const float* scales, int64_t n, float* sums) {
  int64_t m = 0;
  for (; m + 4 <= tile.M; m += 4) dot<4, NR>(tile, scales, m, n, sums);
  if (tile.M - m == 3) dot<3, NR>(tile, scales, m, n, sums);
  if (tile.M - m == 2) dot<2, NR>(tile, scales, m, n, sums);
  if (tile.M - m == 1) dot<1, NR>(tile, scales, m, n, sums);
}

}  // namespace

void linear4_small_avx512(const Linear4SmallTile& tile, int64_t n0, int64_t n1, float* sums) {
  const int64_t per_row = tile.weight->K / tile.weight->blocksize;
  int64_t n = n0;
  for (; n + 4 <= n1; n += 4) dot_rows<4>(tile, tile.scales + (n - n0) * per_row, n, sums + n - n0);
  for (; n < n1; ++n) dot_rows<1>(tile, tile.scales + (n - n0) * per_row, n, sums + n - n0);
}

}  // namespace peft_kernels

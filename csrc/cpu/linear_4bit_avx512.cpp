// y = x W' for few rows with AVX-512 float32 FMA.
#include "cpu/linear_4bit_decode_avx512.h"

namespace peft_kernels {
namespace {

template <DType dtype, int MR, int NR>
void dot(const Linear4SmallTile& tile, const float* scales, int64_t m, int64_t n, float* sums) {
  const Weight4& w = *tile.weight;
  const int64_t blocks = w.K / w.blocksize, row_bytes = w.K / 2, block_bytes = w.blocksize / 2;
  const uint8_t* packed = w.packed + n * row_bytes;
  const float* x = tile.x + m * w.K;
  const __m512 code = _mm512_loadu_ps(w.book().code);
  const __m512i shifts[4] = {nibble_shifts(0), nibble_shifts(1), nibble_shifts(2), nibble_shifts(3)};
  __m512 acc[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block) {
    __m512 table[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) table[j] = rounded_table(code, scales[j * blocks + block], dtype);
    for (const uint8_t* end = packed + block_bytes; packed < end; packed += 32, x += 64) {
      // The rows that are next: each is too short for the hardware prefetcher to catch up (M = 1 takes 20 % less time).
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) _mm_prefetch((const char*)packed + (NR + j) * row_bytes, _MM_HINT_T0);
      __m512i dwords[NR];
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j)
        dwords[j] = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(packed + j * row_bytes)));
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        __m512 decoded[NR];
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j)
          decoded[j] = _mm512_permutexvar_ps(_mm512_srlv_epi32(dwords[j], shifts[t]), table[j]);  // 4 index bits count
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
          const __m512 v = _mm512_loadu_ps(x + i * w.K + 16 * t);
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

template <DType dtype, int NR>
void dot_rows(const Linear4SmallTile& tile, const float* scales, int64_t n, float* sums) {
  int64_t m = 0;
  for (; m + 4 <= tile.M; m += 4) dot<dtype, 4, NR>(tile, scales, m, n, sums);
  if (tile.M - m == 3) dot<dtype, 3, NR>(tile, scales, m, n, sums);
  if (tile.M - m == 2) dot<dtype, 2, NR>(tile, scales, m, n, sums);
  if (tile.M - m == 1) dot<dtype, 1, NR>(tile, scales, m, n, sums);
}

template <DType dtype>
void dot_columns(const Linear4SmallTile& tile, int64_t n0, int64_t n1, float* sums) {
  const int64_t per_row = tile.weight->K / tile.weight->blocksize;
  int64_t n = n0;
  for (; n + 4 <= n1; n += 4) dot_rows<dtype, 4>(tile, tile.scales + (n - n0) * per_row, n, sums + n - n0);
  for (; n < n1; ++n) dot_rows<dtype, 1>(tile, tile.scales + (n - n0) * per_row, n, sums + n - n0);
}

}  // namespace

void linear4_small_avx512(const Linear4SmallTile& tile, int64_t n0, int64_t n1, float* sums) {
  if (tile.dtype == DType::BF16) return dot_columns<DType::BF16>(tile, n0, n1, sums);
  if (tile.dtype == DType::F16) return dot_columns<DType::F16>(tile, n0, n1, sums);
  dot_columns<DType::F32>(tile, n0, n1, sums);
}

}  // namespace peft_kernels

// y = x W' for few rows with AVX2 float32 FMA.
#include "cpu/linear_4bit_decode_avx2.h"

namespace peft_kernels {
namespace {

inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

constexpr int64_t kRun = 1024;  // products summed apart: one long sum errs more than twice as much as eager's blocks

template <int MR, int NR>
void dot(const Linear4SmallTile& tile, const float* scales, int64_t m, int64_t n, float* sums) {
  const Weight4& w = *tile.weight;
  const float* code = w.book().code;
  const int64_t per_row = w.K / w.blocksize;
  __m256 acc[MR][NR], total[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[i][j] = total[i][j] = _mm256_setzero_ps();
  const float* x = tile.x + m * w.K;
  for (int64_t block = 0; block < per_row; ++block) {
    Table table[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) table[j] = rounded_table(code, scales[j * per_row + block], tile.dtype);
    for (int64_t k = block * w.blocksize; k < (block + 1) * w.blocksize; k += 64) {
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s) {
        __m256 decoded[NR];
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) decoded[j] = decode8(table[j], w.packed + ((n + j) * w.K + k) / 2, s);
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
          const __m256 v = _mm256_loadu_ps(x + i * w.K + k + 8 * s);
#pragma GCC unroll 4
          for (int j = 0; j < NR; ++j) acc[i][j] = _mm256_fmadd_ps(v, decoded[j], acc[i][j]);
        }
      }
      if ((k + 64) % kRun != 0) continue;
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) {
          total[i][j] = _mm256_add_ps(total[i][j], acc[i][j]);
          acc[i][j] = _mm256_setzero_ps();
        }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) sums[(m + i) * kLinear4SmallLanes + j] = sum(_mm256_add_ps(total[i][j], acc[i][j]));
}

}  // namespace

void linear4_small_avx2(const Linear4SmallTile& tile, int64_t n0, int64_t n1, float* sums) {
  for (int64_t n = n0; n < n1; ++n) {
    const float* scales = tile.scales + (n - n0) * (tile.weight->K / tile.weight->blocksize);
    int64_t m = 0;
    for (; m + 4 <= tile.M; m += 4) dot<4, 1>(tile, scales, m, n, sums + n - n0);
    for (; m + 2 <= tile.M; m += 2) dot<2, 1>(tile, scales, m, n, sums + n - n0);
    if (m < tile.M) dot<1, 1>(tile, scales, m, n, sums + n - n0);
  }
}

}  // namespace peft_kernels

// The epilogue of the AVX-512 kernels: float32 sums + bias + LoRA terms -> the result's dtype, rounded once.
#pragma once

#include <immintrin.h>

#include "cpu/linear_4bit_kernels.h"
#include "cpu/philox.h"
#include "cpu/vec_avx512.h"

namespace peft_kernels {
namespace {

constexpr int64_t kGroups = kLinear4Lanes / 16;
constexpr int64_t kTermRun = 64;  // ranks summed apart: a longer sum of float32 would err more than eager's

// The right operands of the terms for lanes [lane0, lane0 + 64), float32, scaled: [sum of r][64], zeros past `limit`.
// `right_is_lane_major`: stored [lanes, r] (B, forward) rather than [r, lanes] (A, backward).
inline const float* pack_terms(const Linear4Job& job, int64_t lane0, int64_t limit, bool right_is_lane_major) {
  if (job.rank_sum == 0) return nullptr;
  float* packed = (float*)linear4_scratch(Linear4Scratch::Terms, size_t(job.rank_sum) * kLinear4Lanes * sizeof(float));
  float* to = packed;
  for (int64_t t = 0; t < job.term_count; ++t) {
    const Linear4Term& term = job.terms[t];
    const __m512 scaling = _mm512_set1_ps(term.scaling);
    for (int64_t g = 0; g < kGroups; ++g) {
      const int64_t lane = lane0 + 16 * g;
      if (right_is_lane_major) {
        for (int64_t j = 0; j < term.r; j += 16) {
          __m512i v[16];
          for (int64_t i = 0; i < 16; ++i)
            v[i] =
                lane + i < limit
                    ? _mm512_castps_si512(load16(term.right, term.dtype, (lane + i) * term.r + j, first16(term.r - j)))
                    : _mm512_setzero_si512();
          transpose16(v);
          for (int64_t i = 0; i < min64(16, term.r - j); ++i)
            _mm512_storeu_ps(to + (j + i) * kLinear4Lanes + 16 * g, _mm512_mul_ps(_mm512_castsi512_ps(v[i]), scaling));
        }
      } else {
        const __mmask16 lanes = lane < limit ? first16(limit - lane) : 0;
        for (int64_t j = 0; j < term.r; ++j)
          _mm512_storeu_ps(to + j * kLinear4Lanes + 16 * g,
                           _mm512_mul_ps(load16(term.right, term.dtype, j * limit + lane, lanes), scaling));
      }
    }
    to += term.r * kLinear4Lanes;
  }
  return packed;
}

struct FinishTile {
  const float* sums;  // [rows][64]
  int64_t m, lane0, lanes;
  const float* packed_terms;
};

template <int ROWS>
inline void store_rows(const __m512 (&c)[ROWS][kGroups], void* matrix, const Linear4Job& job, const FinishTile& tile) {
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
      if (tile.lanes > 16 * g)
        store16(matrix, job.dtype, (tile.m + i) * job.ld_out + tile.lane0 + 16 * g, c[i][g],
                first16(tile.lanes - 16 * g));
}

template <int ROWS>
inline void finish_rows(const Linear4Job& job, const FinishTile& tile) {
  __m512 c[ROWS][kGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    const int64_t left = tile.lanes - 16 * g;
    const __m512 bias = job.bias && left > 0 ? load16(job.bias, job.bias_dtype, tile.lane0 + 16 * g, first16(left))
                                             : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
      c[i][g] = _mm512_add_ps(_mm512_loadu_ps(tile.sums + i * kLinear4Lanes + 16 * g), bias);
  }
  const float* right = tile.packed_terms;
  for (int64_t t = 0; t < job.term_count; ++t) {
    const Linear4Term& term = job.terms[t];
    alignas(64) float mask[ROWS][kLinear4Lanes];
    for (int i = 0; term.p != 0 && i < ROWS; ++i)
      dropout_scale_row(term.seed, tile.m + i, tile.lane0, kLinear4Lanes, term.p, mask[i]);
    const float* left = term.left + tile.m * term.ld;
    for (int64_t j0 = 0; j0 < term.r; j0 += kTermRun) {
      __m512 d[ROWS][kGroups];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) d[i][g] = _mm512_setzero_ps();
      for (int64_t j = j0; j < min64(term.r, j0 + kTermRun); ++j, right += kLinear4Lanes) {
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
          const __m512 s = _mm512_set1_ps(left[i * term.ld + j]);
#pragma GCC unroll 4
          for (int g = 0; g < kGroups; ++g) d[i][g] = _mm512_fmadd_ps(s, _mm512_loadu_ps(right + 16 * g), d[i][g]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
          const __m512 product = term.p != 0 ? _mm512_mul_ps(d[i][g], _mm512_load_ps(mask[i] + 16 * g)) : d[i][g];
          c[i][g] = _mm512_add_ps(c[i][g], product);
        }
    }
  }
  if (job.out_scale) {
    if (job.unscaled) store_rows<ROWS>(c, job.unscaled, job, tile);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const int64_t lane = tile.lane0 + 16 * g, left = tile.lanes - 16 * g;
      const __m512 scale = left > 0 ? _mm512_maskz_loadu_ps(first16(left), job.out_scale + lane) : _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) c[i][g] = _mm512_mul_ps(c[i][g], scale);
    }
  }
  store_rows<ROWS>(c, job.out, job, tile);
}

// out[m : m + rows, lane0 : lane0 + lanes] from sums [rows][64]; lanes <= 64.
inline void finish(const Linear4Job& job, FinishTile tile, int64_t rows) {
  for (; rows >= 4; rows -= 4, tile.m += 4, tile.sums += 4 * kLinear4Lanes) finish_rows<4>(job, tile);
  if (rows == 3) return finish_rows<3>(job, tile);
  if (rows == 2) return finish_rows<2>(job, tile);
  if (rows == 1) return finish_rows<1>(job, tile);
}

}  // namespace
}  // namespace peft_kernels

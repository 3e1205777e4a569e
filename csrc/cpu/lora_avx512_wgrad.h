// out = alpha * drop(x)' P with lanes along the columns of x: 8 ranks x 32 columns of accumulators over a block of
// rows.
#pragma once

#include "cpu/lora_avx512_common.h"

namespace peft_kernels {
namespace {

template <class Loader, int NR, bool kWhole>
inline void wgrad_tile(const typename Loader::type* x, int64_t ldx, int64_t rows, __mmask32 lanes, const float* P,
                       int64_t ldP, float* tile, bool prefetch) {
  __m512 c[NR][2];
#pragma GCC unroll 8
  for (int j = 0; j < NR; ++j) c[j][0] = c[j][1] = _mm512_setzero_ps();
  for (int64_t m = 0; m < rows; ++m, x += ldx, P += ldP) {
    if (prefetch)  // the next tile of columns
      for (size_t at = 0; at < kTile * sizeof(*x); at += 64) _mm_prefetch((const char*)(x + kTile) + at, _MM_HINT_T0);
    Pair v;
    if constexpr (kWhole)
      v = load32<Loader>(x);
    else
      v = Loader::load(x, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      const __m512 p = _mm512_set1_ps(P[j]);
      c[j][0] = _mm512_fmadd_ps(v.v[0], p, c[j][0]);
      c[j][1] = _mm512_fmadd_ps(v.v[1], p, c[j][1]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < NR; ++j) {
    Pair sum = {{c[j][0], c[j][1]}};
    if (Loader::kSplit) sum = interleave(sum);
    float* to = tile + j * kTile;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum.v[0]));
    _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), sum.v[1]));
  }
}

template <class Loader, int NR>
void wgrad_ranks(const typename Loader::type* x, int64_t ldx, int64_t rows, int64_t columns, const float* P,
                 int64_t ldP, float* tile, bool prefetch) {
  const __mmask32 lanes = first_lanes(columns);
  if (columns >= kTile)
    wgrad_tile<Loader, NR, true>(x, ldx, rows, lanes, P, ldP, tile, prefetch);
  else
    wgrad_tile<Loader, NR, false>(x, ldx, rows, lanes, P, ldP, tile, false);
}

template <class Loader>
void wgrad_columns(const typename Loader::type* x, int64_t ldx, int64_t rows, int64_t columns, const float* P,
                   int64_t ldP, int64_t r, float* tile) {
  for (int64_t j = 0; j < r;) {
    const int64_t left = r - j, count = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto run = count == 8   ? wgrad_ranks<Loader, 8>
                     : count == 4 ? wgrad_ranks<Loader, 4>
                     : count == 2 ? wgrad_ranks<Loader, 2>
                                  : wgrad_ranks<Loader, 1>;
    run(x, ldx, rows, columns, P + j, ldP, tile + j * kTile, j == 0);
    j += count;
  }
}

// Columns that drop(x) is made for at a time: whole groups of Philox blocks, and 80 KB for 128 rows.
constexpr int64_t kDroppedColumns = 4 * kTile, kDroppedLd = kDroppedColumns + 16;

void wgrad(const Matrix& x, const Dropout& dropout, int64_t m0, int64_t m1, int64_t i0, int64_t i1, const float* P,
           int64_t ldP, int64_t r, float* tiles) {
  const int64_t rows = m1 - m0;
  float* dropped = dropout.active() ? (float*)lora_scratch(2, size_t(rows) * kDroppedLd * sizeof(float)) : nullptr;
  P += m0 * ldP;
  for (int64_t i = i0; i < i1; i += kTile, tiles += r * kTile) {
    const int64_t columns = min64(kTile, i1 - i), offset = (i - i0) % kDroppedColumns;
    if (dropped) {
      for (int64_t m = 0; offset == 0 && m < rows; ++m)
        load_dropped(x, dropout, m0 + m, i, min64(kDroppedColumns, i1 - i), dropped + m * kDroppedLd);
      wgrad_columns<LoadF32>(dropped + offset, kDroppedLd, rows, columns, P, ldP, r, tiles);
    } else {
      with_loader<LoadBf16Split>(x.dtype, [&](auto loader) {
        using Loader = decltype(loader);
        const auto* column = (const typename Loader::type*)x.data + m0 * x.ld + i;
        wgrad_columns<Loader>(column, x.ld, rows, columns, P, ldP, r, tiles);
      });
    }
  }
}

void wgrad_store(const float* tiles, int64_t r, int64_t i0, int64_t i1, int64_t I, float alpha, void* out,
                 DType out_dtype, bool out_is_ri) {
  const __m512 factor = _mm512_set1_ps(alpha);
  for (int64_t i = i0; i < i1; i += 16) {
    const float* tile = tiles + (i - i0) / kTile * r * kTile + (i - i0) % kTile;
    const int64_t columns = min64(16, i1 - i);
    for (int64_t j = 0; j < r; j += 16) {
      const int64_t ranks = min64(16, r - j);
      __m512 v[16];
      for (int64_t n = 0; n < 16; ++n)
        v[n] = n < ranks ? _mm512_mul_ps(_mm512_loadu_ps(tile + (j + n) * kTile), factor) : _mm512_setzero_ps();
      if (out_is_ri) {
        for (int64_t n = 0; n < ranks; ++n) store16(out, out_dtype, (j + n) * I + i, v[n], first_lanes(columns));
      } else {
        transpose16(v);
        for (int64_t n = 0; n < columns; ++n) store16(out, out_dtype, (i + n) * r + j, v[n], first_lanes(ranks));
      }
    }
  }
}

}  // namespace
}  // namespace peft_kernels

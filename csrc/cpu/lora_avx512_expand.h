// out += sum of mask (.) alpha * S P' with lanes along the columns of out, 8 rows x 32 columns at a time.
#pragma once

#include "cpu/lora_avx512_common.h"

namespace peft_kernels {
namespace {

struct ExpandTile {
  void* out;
  DType dtype;
  int64_t index, ldo;  // of the tile's first element
  __mmask32 lanes;
  float* sum;  // [8][kTile]: what came before the last product
};

// One term's product, or that of 64 of its ranks; stored in tile.sum, or, for the last term, added to out.
template <int MR>
inline void expand_tile(const ExpandTile& tile, const float* p, const float* s, int64_t lds, int64_t r,
                        const float* mask, bool first, bool last) {
  __m512 c[MR][2];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) c[i][0] = c[i][1] = _mm512_setzero_ps();
  for (int64_t j = 0; j < r; ++j) {
    const __m512 p0 = _mm512_loadu_ps(p + j * kTile), p1 = _mm512_loadu_ps(p + j * kTile + 16);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const __m512 b = _mm512_set1_ps(s[i * lds + j]);
      c[i][0] = _mm512_fmadd_ps(b, p0, c[i][0]);
      c[i][1] = _mm512_fmadd_ps(b, p1, c[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 v = c[i][half];
      const int64_t at = i * kTile + 16 * half;
      if (mask) v = _mm512_mul_ps(v, _mm512_loadu_ps(mask + at));
      if (!first) v = _mm512_add_ps(v, _mm512_loadu_ps(tile.sum + at));
      if (last) {
        const __mmask16 lanes = __mmask16(tile.lanes >> (16 * half));
        const int64_t index = tile.index + i * tile.ldo + 16 * half;
        store16(tile.out, tile.dtype, index, _mm512_add_ps(load16(tile.out, tile.dtype, index, lanes), v), lanes);
      } else {
        _mm512_storeu_ps(tile.sum + at, v);
      }
    }
  }
}

template <int MR>
void expand_rows(void* out, DType dtype, int64_t ldo, int64_t m, int64_t n0, int64_t n1, const ExpandTerm* terms,
                 int64_t count, const float* packed) {
  alignas(64) float sum[MR * kTile], mask[MR * kTile];
  const int64_t size = dtype == DType::F32 ? 4 : 2;
  for (int64_t n = n0; n < n1; n += kTile) {
    const ExpandTile tile = {out, dtype, m * ldo + n, ldo, first_lanes(n1 - n), sum};
    for (int i = 0; i < MR; ++i) _mm_prefetch((const char*)out + ((m + MR + i) * ldo + n) * size, _MM_HINT_T0);
    for (int64_t t = 0; t < count; ++t) {
      const ExpandTerm& term = terms[t];
      if (term.dropout.active())
        for (int i = 0; i < MR; ++i)
          dropout_scale_row(term.dropout.seed, m + i, n, kTile, term.dropout.p, mask + i * kTile);
      for (int64_t j = 0; j < term.rank; j += kExpandRanks) {
        const int64_t ranks = min64(kExpandRanks, term.rank - j);
        const bool last = t + 1 == count && j + ranks == term.rank;
        expand_tile<MR>(tile, packed, term.s + m * term.lds + j, term.lds, ranks,
                        term.dropout.active() ? mask : nullptr, t == 0 && j == 0, last);
        packed += ranks * kTile;
      }
    }
  }
}

void expand_add(void* out, DType dtype, int64_t ldo, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                const ExpandTerm* terms, int64_t count) {
  int64_t ranks = 0;
  for (int64_t t = 0; t < count; ++t) ranks += terms[t].rank;
  float* packed = (float*)lora_scratch(1, size_t((n1 - n0 + kTile - 1) / kTile) * ranks * kTile * sizeof(float));
  float* to = packed;  // [tile][term][rank][kTile], scaled by alpha
  for (int64_t n = n0; n < n1; n += kTile) {
    for (int64_t t = 0; t < count; ++t) {
      const ExpandTerm& term = terms[t];
      const int64_t columns = min64(kTile, n1 - n);
      if (term.p_is_nr)
        transpose_block(term.p, n, columns, 0, term.rank, term.alpha, to, kTile);
      else
        copy_block(term.p, 0, term.rank, n, columns, term.alpha, false, to, kTile);
      to += term.rank * kTile;
    }
  }
  int64_t m = m0;
  for (; m + 8 <= m1; m += 8) expand_rows<8>(out, dtype, ldo, m, n0, n1, terms, count, packed);
  for (; m + 4 <= m1; m += 4) expand_rows<4>(out, dtype, ldo, m, n0, n1, terms, count, packed);
  for (; m < m1; ++m) expand_rows<1>(out, dtype, ldo, m, n0, n1, terms, count, packed);
}

void dropout_rows(uint64_t seed, int64_t m0, int64_t m1, int64_t K, double p, float* out) {
  for (int64_t m = m0; m < m1; ++m) dropout_scale_row(seed, m, 0, K, p, out + m * K);
}

}  // namespace
}  // namespace peft_kernels

// out += sum of mask (.) alpha * S P' with lanes along the columns of out, 8 rows x 32 columns at a time.
#pragma once

#include "cpu/lora_avx512_common.h"

namespace peft_kernels {
namespace {

// What becomes of one product of a tile: [MR, r] x [r, kTile] for one term, or for 64 of its ranks.
template <class T>
struct ExpandTile {
  T* out;
  int64_t ldo;
  __mmask32 lanes;
  const float* mask;  // [MR][kTile], or null
  float* sum;         // [MR][kTile]: the products before this one
  bool first, last;   // the last goes to out, the others to sum
};

template <class Loader, int MR>
inline void expand_tile(const ExpandTile<typename Loader::type>& tile, const float* p, const float* s, int64_t lds,
                        int64_t r) {
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
    Pair v = {{c[i][0], c[i][1]}};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i * kTile + 16 * half;
      if (tile.mask) v.v[half] = _mm512_mul_ps(v.v[half], _mm512_loadu_ps(tile.mask + at));
      if (!tile.first) v.v[half] = _mm512_add_ps(v.v[half], _mm512_loadu_ps(tile.sum + at));
      if (!tile.last) _mm512_storeu_ps(tile.sum + at, v.v[half]);
    }
    if (!tile.last) continue;
    auto* out = tile.out + i * tile.ldo;
    if (tile.lanes == first_lanes(kTile)) {
      const Pair old = load32<Loader>(out);
      store32<Loader>(out, {{_mm512_add_ps(old.v[0], v.v[0]), _mm512_add_ps(old.v[1], v.v[1])}});
    } else {
      const Pair old = Loader::load(out, tile.lanes);
      for (int half = 0; half < 2; ++half)
        store16(out, Loader::kDtype, 16 * half, _mm512_add_ps(old.v[half], v.v[half]),
                __mmask16(tile.lanes >> (16 * half)));
    }
  }
}

template <class Loader, int MR>
void expand_rows(typename Loader::type* out, int64_t ldo, int64_t m, int64_t n0, int64_t n1, const ExpandTerm* terms,
                 int64_t count, const float* packed) {
  alignas(64) float sum[MR * kTile], mask[MR * kTile];
  for (int64_t n = n0; n < n1; n += kTile) {
    ExpandTile<typename Loader::type> tile = {out + m * ldo + n, ldo, first_lanes(n1 - n), nullptr, sum, true, false};
    for (int i = 0; i < MR; ++i)
      for (size_t at = 0; at < kTile * sizeof(*out); at += 64)
        _mm_prefetch((const char*)(out + (m + MR + i) * ldo + n) + at, _MM_HINT_T0);
    for (int64_t t = 0; t < count; ++t) {
      const ExpandTerm& term = terms[t];
      tile.mask = term.dropout.active() ? mask : nullptr;
      if (tile.mask)
        for (int i = 0; i < MR; ++i)
          dropout_scale_row(term.dropout.seed, m + i, n, kTile, term.dropout.p, mask + i * kTile);
      for (int64_t j = 0; j < term.rank; j += kExpandRanks) {
        const int64_t ranks = min64(kExpandRanks, term.rank - j);
        tile.last = t + 1 == count && j + ranks == term.rank;
        expand_tile<Loader, MR>(tile, packed, term.s + m * term.lds + j, term.lds, ranks);
        tile.first = false;
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
        copy_block(term.p, 0, term.rank, n, columns, term.alpha, to, kTile);
      to += term.rank * kTile;
    }
  }
  with_loader<LoadBf16>(dtype, [&](auto loader) {
    using Loader = decltype(loader);
    auto* to_rows = (typename Loader::type*)out;
    int64_t m = m0;
    for (; m + 8 <= m1; m += 8) expand_rows<Loader, 8>(to_rows, ldo, m, n0, n1, terms, count, packed);
    for (; m + 4 <= m1; m += 4) expand_rows<Loader, 4>(to_rows, ldo, m, n0, n1, terms, count, packed);
    for (; m < m1; ++m) expand_rows<Loader, 1>(to_rows, ldo, m, n0, n1, terms, count, packed);
  });
}

void dropout_rows(uint64_t seed, int64_t m0, int64_t m1, int64_t K, double p, float* out) {
  for (int64_t m = m0; m < m1; ++m) dropout_scale_row(seed, m, 0, K, p, out + m * K);
}

}  // namespace
}  // namespace peft_kernels

// Broadcast form: a panel of W, 64 lanes wide, is decoded once into pairs along the summed index and multiplied by
// every row of `in`. 6 rows x 64 lanes of float32 sums stay in registers: 10 loads for 24 vdpbf16ps.
#include "cpu/linear_4bit_finish_bf16.h"

namespace peft_kernels {
namespace {

constexpr int64_t kLanes = kLinear4Lanes;
constexpr int kMaxRows = 6;
constexpr int64_t kChunk = 2048;  // summed elements per panel: 256 KB, a quarter of a core's L2

// Rows [lane0, lane0 + 64) of W, columns [k0, k0 + kn) -> panel[k / 2][lane] pairs; rows past N are zero.
void forward_panel(const Weight4& w, int64_t lane0, int64_t k0, int64_t kn, uint32_t* panel, float* scales) {
  const __m512 code = _mm512_loadu_ps(w.book().code);
  const int64_t blocks = kn / 64;
  for (int64_t g = 0; g < kLanes; g += 16) {
    const int64_t n0 = lane0 + g, rows = min64(16, w.N - n0);
    if (rows <= 0) {
      for (int64_t i = 0; i < 16 * blocks; ++i) scales[i] = 0;
    } else if (kn == w.K) {
      block_scales(w, n0 * blocks, rows * blocks, scales);
    } else {
      for (int64_t i = 0; i < rows; ++i) block_scales(w, (n0 + i) * (w.K / 64) + k0 / 64, blocks, scales + i * blocks);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      alignas(64) __m512i table[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) table[i] = bf16_table(code, scales[i * blocks + b]);
      for (int half = 0; half < 2; ++half) {
        const uint8_t* packed = w.packed + (n0 * w.K + k0 + 64 * b + 32 * half) / 2;
        __m512i v[16];
        if (rows >= 16) {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) v[i] = decode32(table[i], packed + i * (w.K / 2));
        } else {
          for (int i = 0; i < 16; ++i)
            v[i] = i < rows ? decode32(table[i], packed + i * (w.K / 2)) : _mm512_setzero_si512();
        }
        transpose16(v);
        uint32_t* to = panel + (32 * b + 16 * half) * kLanes + g;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kLanes, v[i]);
      }
    }
  }
}

// Rows [n0, n0 + nn) of W, columns [lane0, lane0 + 64) -> panel[n / 2][lane] pairs, lanes in the order of unpacked
// nibble order (see natural_order); an odd last row is paired with zeros.
void backward_panel(const Weight4& w, int64_t lane0, int64_t n0, int64_t nn, uint32_t* panel, float* scales) {
  const __m512 code = _mm512_loadu_ps(w.book().code);
  const int64_t row_bytes = w.K / 2;
  const uint8_t* packed = w.packed + (n0 * w.K + lane0) / 2;
  column_scales(w, lane0, n0, nn, scales);
  for (int64_t n = 0; n < nn; n += 2, panel += kLanes, packed += 2 * row_bytes) {
    const bool both = n + 1 < nn;
    _mm_prefetch((const char*)packed + kPrefetchRows * row_bytes, _MM_HINT_T0);
    _mm_prefetch((const char*)packed + (kPrefetchRows + 1) * row_bytes, _MM_HINT_T0);
    const Pair512 even = decode64(bf16_table(code, scales[n]), load64(packed));
    Pair512 odd = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    if (both) odd = decode64(bf16_table(code, scales[n + 1]), load64(packed + row_bytes));
    _mm512_store_si512(panel, _mm512_unpacklo_epi16(even.first, odd.first));
    _mm512_store_si512(panel + 16, _mm512_unpackhi_epi16(even.first, odd.first));
    _mm512_store_si512(panel + 32, _mm512_unpacklo_epi16(even.second, odd.second));
    _mm512_store_si512(panel + 48, _mm512_unpackhi_epi16(even.second, odd.second));
  }
}

// Lanes of a backward panel -> natural order.
inline void natural_order(float* sums, int64_t rows) {
  const __m512i even = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
  for (; rows > 0; --rows, sums += kLanes) {
    const __m512 c0 = _mm512_load_ps(sums), c1 = _mm512_load_ps(sums + 16);
    const __m512 c2 = _mm512_load_ps(sums + 32), c3 = _mm512_load_ps(sums + 48);
    _mm512_store_ps(sums, _mm512_permutex2var_ps(c0, even, c2));
    _mm512_store_ps(sums + 16, _mm512_permutex2var_ps(c1, even, c3));
    _mm512_store_ps(sums + 32, _mm512_permutex2var_ps(c0, odd, c2));
    _mm512_store_ps(sums + 48, _mm512_permutex2var_ps(c1, odd, c3));
  }
}

// sums[MR][64] (+)= in[MR][2 pairs] panel[pairs][64].
template <int MR>
void multiply(const uint16_t* in, int64_t ld, const uint32_t* panel, int64_t pairs, float* sums, bool add) {
  __m512 acc[MR][4];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) acc[i][g] = add ? _mm512_load_ps(sums + i * kLanes + 16 * g) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, panel += kLanes, in += 2) {
    __m512bh w[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) w[g] = (__m512bh)_mm512_load_si512(panel + 16 * g);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const __m512bh a = (__m512bh)_mm512_castps_si512(
          _mm512_set1_ps(*(const float __attribute__((aligned(2), may_alias))*)(in + i * ld)));
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) acc[i][g] = _mm512_dpbf16_ps(acc[i][g], a, w[g]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) _mm512_store_ps(sums + i * kLanes + 16 * g, acc[i][g]);
}

using Multiply = void (*)(const uint16_t*, int64_t, const uint32_t*, int64_t, float*, bool);
constexpr Multiply kMultiply[kMaxRows] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

// One panel of lanes for rows [m0, m1); `total` summed elements.
template <bool forward>
void run_panel(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  const Weight4& w = *job.weight;
  const int64_t total = forward ? w.K : w.N, limit = forward ? w.N : w.K;
  const int64_t chunks = (total + kChunk - 1) / kChunk;
  const int64_t chunk = ((total + chunks - 1) / chunks + 63) / 64 * 64;
  uint32_t* panel = (uint32_t*)linear4_scratch(Linear4Scratch::Panel, size_t(chunk) * (kLanes * 2 + 4));
  float* scales = (float*)(panel + chunk / 2 * kLanes);
  float* sums = (float*)linear4_scratch(Linear4Scratch::Sums, size_t(m1 - m0) * kLanes * sizeof(float));
  const float* terms = pack_terms(job, lane0, limit, forward);
  const int64_t tiles = (m1 - m0 + kMaxRows - 1) / kMaxRows;
  for (int64_t from = 0; from < total; from += chunk) {
    const int64_t count = min64(chunk, total - from);
    if (forward) {
      forward_panel(w, lane0, from, count, panel, scales);
    } else {
      backward_panel(w, lane0, from, count, panel, scales);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = m0 + (m1 - m0) * t / tiles, rows = m0 + (m1 - m0) * (t + 1) / tiles - m;
      const uint16_t* in = (const uint16_t*)job.in + m * job.ld_in + from;
      int64_t ld = job.ld_in;
      if (count % 2 != 0) {  // the last pair must not read past the row
        const int64_t padded = count + 1;
        uint16_t* copy = (uint16_t*)linear4_scratch(Linear4Scratch::Input, size_t(rows) * padded * 2);
        for (int64_t i = 0; i < rows; ++i) {
          __builtin_memcpy(copy + i * padded, in + i * ld, size_t(count) * 2);
          copy[i * padded + count] = 0;
        }
        in = copy;
        ld = padded;
      }
      float* tile = sums + (m - m0) * kLanes;
      kMultiply[rows - 1](in, ld, panel, (count + 1) / 2, tile, from > 0);
      if (from + count < total) continue;
      if (!forward) natural_order(tile, rows);
      finish(job, {tile, m, lane0, min64(kLanes, limit - lane0), terms}, rows);
    }
  }
}

}  // namespace

void linear4_forward_panel_avx512bf16(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  run_panel<true>(job, lane0, m0, m1);
}

void linear4_backward_panel_avx512bf16(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  run_panel<false>(job, lane0, m0, m1);
}

}  // namespace peft_kernels

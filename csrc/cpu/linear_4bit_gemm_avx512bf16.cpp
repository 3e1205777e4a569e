// Broadcast form: a panel of W, 64 lanes wide, is decoded once into pairs along the summed index and multiplied by
// every row of `in`. 6 rows x 64 lanes of float32 sums stay in registers: 10 loads for 24 vdpbf16ps.
#include "cpu/linear_4bit_bf16.h"

namespace peft_kernels {
namespace {

constexpr int64_t kLanes = kLinear4Lanes;
constexpr int kMaxRows = 6;
// Summed elements per panel. Forward 256 KB, a quarter of a core's L2. Backward two panels of 128 KB: the first chunk
// has no multiplication to hide its decode behind.
constexpr int64_t kForwardChunk = 2048, kBackwardChunk = 1024;

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
void backward_panel(const Weight4& w, int64_t lane0, int64_t n0, int64_t nn, uint32_t* panel, const float* scales) {
  const __m512 code = _mm512_loadu_ps(w.book().code);
  const int64_t row_bytes = w.K / 2;
  const uint8_t* packed = w.packed + (n0 * w.K + lane0) / 2;
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

// Whole pairs of rows of a backward panel that are still to be decoded, a pair per four steps of a multiplication.
struct Pending {
  const uint8_t* packed;
  int64_t row_bytes;
  const float* scales;
  uint32_t* panel;
  int64_t pairs;
  const CodeBook* book;
  __m512i* tables;  // of the current pair
};

inline void decode_half(const Pending& pending, bool second, int part, __m512i& even, __m512i& odd) {
  if (part == 0) {
    const __m512i q = load64(pending.packed);
    even = second ? decode64_second(pending.tables[0], q) : decode64_first(pending.tables[0], q);
  } else if (part == 1) {
    const __m512i q = load64(pending.packed + pending.row_bytes);
    odd = second ? decode64_second(pending.tables[1], q) : decode64_first(pending.tables[1], q);
  } else if (part == 2) {
    _mm512_store_si512(pending.panel + (second ? 32 : 0), _mm512_unpacklo_epi16(even, odd));
  } else if (part == 3) {
    _mm512_store_si512(pending.panel + (second ? 48 : 16), _mm512_unpackhi_epi16(even, odd));
  }
}

inline void decode_step(Pending& pending, int step, int part, __m512i& even, __m512i& odd) {
  if (step == 0 && part == 0) {
    _mm_prefetch((const char*)pending.packed + kPrefetchRows * pending.row_bytes, _MM_HINT_T0);
    pending.tables[0] = bf16_table(_mm512_loadu_ps(pending.book->code), pending.scales[0]);
  } else if (step == 0 && part == 1) {
    _mm_prefetch((const char*)pending.packed + (kPrefetchRows + 1) * pending.row_bytes, _MM_HINT_T0);
    pending.tables[1] = bf16_table(_mm512_loadu_ps(pending.book->code), pending.scales[1]);
  } else if (step == 1 || step == 2) {
    decode_half(pending, step == 2, part, even, odd);
  } else if (step == 3 && part == 0) {
    pending.packed += 2 * pending.row_bytes;
    pending.scales += 2;
    pending.panel += kLanes;
    --pending.pairs;
  }
}

typedef float PairBits __attribute__((aligned(2), may_alias));  // two bf16 of a row, read as one broadcast operand

template <int MR>
inline void multiply_pair(__m512 (&acc)[MR][4], const uint16_t* in, int64_t ld, const uint32_t* panel, Pending* pending,
                          int step) {
  __m512bh w[4];
  __m512i even, odd;
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) w[g] = (__m512bh)_mm512_load_si512(panel + 16 * g);
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
    const __m512bh a = (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*(const PairBits*)(in + i * ld)));
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) acc[i][g] = _mm512_dpbf16_ps(acc[i][g], a, w[g]);
    if (pending) decode_step(*pending, step, i, even, odd);
  }
  if (pending) {
#pragma GCC unroll 4
    for (int part = MR; part < 4; ++part) decode_step(*pending, step, part, even, odd);
  }
}

// sums[MR][64] (+)= in[MR][2 pairs] panel[pairs][64]. Meanwhile pending pairs are decoded, between the products: the
// shuffles and stores have pipes of their own, and dx at M = 16 takes 8 % less time (Zen 4).
template <int MR>
void multiply(const uint16_t* in, int64_t ld, const uint32_t* panel, int64_t pairs, float* sums, bool add,
              Pending& shared) {
  __m512 acc[MR][4];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) acc[i][g] = add ? _mm512_load_ps(sums + i * kLanes + 16 * g) : _mm512_setzero_ps();
  int64_t p = 0;
  if (shared.pairs > 0) {
    alignas(64) __m512i tables[2];
    Pending pending = shared;
    pending.tables = tables;
    for (; p + 4 <= pairs && pending.pairs > 0; p += 4, panel += 4 * kLanes, in += 8) {
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step)
        multiply_pair<MR>(acc, in + 2 * step, ld, panel + step * kLanes, &pending, step);
    }
    shared = pending;
  }
  for (; p < pairs; ++p, panel += kLanes, in += 2) multiply_pair<MR>(acc, in, ld, panel, nullptr, 0);
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) _mm512_store_ps(sums + i * kLanes + 16 * g, acc[i][g]);
}

using Multiply = void (*)(const uint16_t*, int64_t, const uint32_t*, int64_t, float*, bool, Pending&);
constexpr Multiply kMultiply[kMaxRows] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

// An odd number of summed elements: a copy of the rows with a zero after each, since the last pair must not read on.
const uint16_t* pad_rows(const uint16_t* in, int64_t ld, int64_t rows, int64_t count) {
  uint16_t* copy = (uint16_t*)linear4_scratch(Linear4Scratch::Input, size_t(rows) * (count + 1) * 2);
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_memcpy(copy + i * (count + 1), in + i * ld, size_t(count) * 2);
    copy[i * (count + 1) + count] = 0;
  }
  return copy;
}

// Scales of rows [n, n + count) of a backward panel; what scales dy's columns comes with them.
inline void row_scales(const Linear4Job& job, int64_t lane0, int64_t n, int64_t count, float* out) {
  column_scales(*job.weight, lane0, n, count, out);
  for (int64_t i = 0; job.in_scale && i < count; ++i) out[i] *= job.in_scale[n + i];
}

// One panel of lanes for rows [m0, m1), the summed index in chunks.
template <bool forward>
void run_panel(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  const Weight4& w = *job.weight;
  const int64_t total = forward ? w.K : w.N, limit = forward ? w.N : w.K;
  const int64_t longest = forward ? kForwardChunk : kBackwardChunk, chunks = (total + longest - 1) / longest;
  const int64_t chunk = ((total + chunks - 1) / chunks + 63) / 64 * 64;
  uint32_t* panel = (uint32_t*)linear4_scratch(Linear4Scratch::Panel, size_t(chunk) * (kLanes * 2 + 4) * 2);
  uint32_t* next_panel = panel + chunk / 2 * kLanes;
  float* scales = (float*)(next_panel + chunk / 2 * kLanes);
  float* sums = (float*)linear4_scratch(Linear4Scratch::Sums, size_t(m1 - m0) * kLanes * sizeof(float));
  const float* terms = pack_terms(job, lane0, limit, forward);
  const int64_t tiles = (m1 - m0 + kMaxRows - 1) / kMaxRows;
  Pending pending{};
  int64_t decoded = 0;  // rows of the current chunk that the previous one has decoded
  for (int64_t from = 0; from < total; from += chunk) {
    const int64_t count = min64(chunk, total - from);
    if (forward) {
      forward_panel(w, lane0, from, count, panel, scales);
    } else {
      if (from == 0) row_scales(job, lane0, 0, count, scales);
      backward_panel(w, lane0, from + decoded, count - decoded, panel + decoded / 2 * kLanes, scales + decoded);
      const int64_t ahead = min64(chunk, total - from - count);
      if (ahead > 0) row_scales(job, lane0, from + count, ahead, scales);
      pending = {
          w.packed + ((from + count) * w.K + lane0) / 2, w.K / 2, scales, next_panel, ahead / 2, &w.book(), nullptr};
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = m0 + (m1 - m0) * t / tiles, rows = m0 + (m1 - m0) * (t + 1) / tiles - m;
      const uint16_t* in = (const uint16_t*)job.in + m * job.ld_in + from;
      const bool odd = count % 2 != 0;
      float* tile = sums + (m - m0) * kLanes;
      kMultiply[rows - 1](odd ? pad_rows(in, job.ld_in, rows, count) : in, odd ? count + 1 : job.ld_in, panel,
                          (count + 1) / 2, tile, from > 0, pending);
      if (from + count < total) continue;
      if (!forward) natural_order(tile, rows);
      finish(job, {tile, m, lane0, min64(kLanes, limit - lane0), terms}, rows);
    }
    if (!forward) {
      decoded = min64(chunk, total - from - count) / 2 * 2 - 2 * pending.pairs;
      uint32_t* done = panel;
      panel = next_panel;
      next_panel = done;
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

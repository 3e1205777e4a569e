// Broadcast form in float32, for every dtype: 64 x 64 weights at a time are decoded into the first-level cache and
// multiplied by every row of `in`. 6 rows x 64 lanes of sums stay in registers: 10 loads for 24 multiply-adds.
#include "cpu/linear_4bit_decode.h"
#include "cpu/linear_4bit_finish.h"

namespace peft_kernels {
namespace {

constexpr int64_t kLanes = kLinear4Lanes;
constexpr int64_t kChunk = 64;   // summed elements of a panel, which is half as large as Skylake's L1
constexpr int64_t kF32Run = 32;  // products summed apart where the result keeps all digits of the sums
constexpr int kMaxRows = 6;

inline __m512 decode16(__m512 table, const uint8_t* packed, int t) {
  const __m512i dwords = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)packed));
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(dwords, nibble_shifts(t)), table);  // reads 4 index bits
}

// Rows [lane0, lane0 + 64) of W, columns [k0, k0 + 64) -> panel[k][lane]; rows past N are zero.
void forward_panel(const Weight4& w, DType dtype, int64_t lane0, int64_t k0, float* panel) {
  const __m512 code = _mm512_loadu_ps(w.book().code);
  const int64_t row_bytes = w.K / 2, rows = min64(kLanes, w.N - lane0);
  alignas(64) float scales[kLanes];
  column_scales(w, k0, lane0, rows, scales);
  for (int64_t g = 0; g < kLanes; g += 16) {
    const uint8_t* packed = w.packed + ((lane0 + g) * w.K + k0) / 2;
    const int64_t present = min64(16, rows - g);
    alignas(64) __m512 table[16];
    for (int64_t i = 0; i < present; ++i) {
      table[i] = rounded_table(code, scales[g + i], dtype);
      _mm_prefetch((const char*)packed + i * row_bytes + 64, _MM_HINT_T0);
    }
    for (int t = 0; t < 4; ++t) {
      __m512 v[16];
      if (present == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = decode16(table[i], packed + i * row_bytes, t);
      } else {
        for (int i = 0; i < 16; ++i)
          v[i] = i < present ? decode16(table[i], packed + i * row_bytes, t) : _mm512_setzero_ps();
      }
      transpose16(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_ps(panel + nibble_order(t, i) * kLanes + g, v[i]);
    }
  }
}

// Rows [n0, n0 + count) of W, columns [lane0, lane0 + 64) -> panel[n][lane], lanes in nibble order.
void backward_panel(const Linear4Job& job, int64_t lane0, int64_t n0, int64_t count, float* panel) {
  const Weight4& w = *job.weight;
  const __m512 code = _mm512_loadu_ps(w.book().code);
  const int64_t row_bytes = w.K / 2;
  alignas(64) float scales[kChunk];
  column_scales(w, lane0, n0, count, scales);
  for (int64_t i = 0; job.in_scale && i < count; ++i) scales[i] *= job.in_scale[n0 + i];
  const uint8_t* packed = w.packed + (n0 * w.K + lane0) / 2;
  for (int64_t n = 0; n < count; ++n, panel += kLanes, packed += row_bytes) {
    _mm_prefetch((const char*)packed + kPrefetchRows * row_bytes, _MM_HINT_T0);
    const __m512 table = rounded_table(code, scales[n], job.dtype);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) _mm512_store_ps(panel + 16 * t, decode16(table, packed, t));
  }
}

// Lanes of a backward panel -> natural order.
inline void natural_order(float* sums, int64_t rows) {
  for (; rows > 0; --rows, sums += kLanes) {
    alignas(64) float natural[kLanes];
    for (int t = 0; t < 4; ++t)
      for (int i = 0; i < 16; ++i) natural[nibble_order(t, i)] = sums[16 * t + i];
    __builtin_memcpy(sums, natural, sizeof natural);
  }
}

// sums[MR][64] (+)= in[MR][count] panel[count][64].
template <int MR>
void multiply(const float* in, int64_t ld, const float* panel, int64_t count, float* sums, bool add) {
  __m512 acc[MR][4];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) acc[i][g] = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; ++k, panel += kLanes) {
    __m512 w[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) w[g] = _mm512_load_ps(panel + 16 * g);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const __m512 a = _mm512_set1_ps(in[i * ld + k]);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) acc[i][g] = _mm512_fmadd_ps(a, w[g], acc[i][g]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      float* to = sums + i * kLanes + 16 * g;
      _mm512_store_ps(to, add ? _mm512_add_ps(_mm512_load_ps(to), acc[i][g]) : acc[i][g]);
    }
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, float*, bool);
constexpr Multiply kMultiply[kMaxRows] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

// One panel of lanes for rows [m0, m1).
template <bool forward>
void run_panel(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  const Weight4& w = *job.weight;
  const int64_t total = forward ? w.K : w.N, limit = forward ? w.N : w.K;
  float* panel = (float*)linear4_scratch(Linear4Scratch::Panel, size_t(kChunk) * kLanes * sizeof(float));
  float* sums = (float*)linear4_scratch(Linear4Scratch::Sums, size_t(m1 - m0) * kLanes * sizeof(float));
  const float* terms = pack_terms(job, lane0, limit, forward);
  const int64_t tiles = (m1 - m0 + kMaxRows - 1) / kMaxRows, run = job.dtype == DType::F32 ? kF32Run : kChunk;
  for (int64_t from = 0; from < total; from += kChunk) {
    const int64_t count = min64(kChunk, total - from);
    if (forward) {
      forward_panel(w, job.dtype, lane0, from, panel);
    } else {
      backward_panel(job, lane0, from, count, panel);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = m0 + (m1 - m0) * t / tiles, rows = m0 + (m1 - m0) * (t + 1) / tiles - m;
      float* tile = sums + (m - m0) * kLanes;
      const float* in = job.in_f32 + (m - job.first_f32) * job.ld_in_f32 + from;
      for (int64_t k = 0; k < count; k += run)
        kMultiply[rows - 1](in + k, job.ld_in_f32, panel + k * kLanes, min64(run, count - k), tile, from + k > 0);
      if (from + count < total) continue;
      if (!forward) natural_order(tile, rows);
      finish(job, {tile, m, lane0, min64(kLanes, limit - lane0), terms}, rows);
    }
  }
}

}  // namespace

void linear4_widen_avx512(const Linear4Job& job, int64_t m, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += 16)
    _mm512_mask_storeu_ps(out + k, first16(count - k),
                          load16(job.in, job.dtype, m * job.ld_in + k, first16(count - k)));
}

void linear4_forward_panel_avx512(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  run_panel<true>(job, lane0, m0, m1);
}

void linear4_backward_panel_avx512(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  run_panel<false>(job, lane0, m0, m1);
}

}  // namespace peft_kernels

// Broadcast form in float32, for every dtype: 64 x 64 weights at a time are decoded into the first-level cache and
// multiplied by every row of `in`. 6 rows of sums stay in registers, of 64 lanes with AVX-512 (10 loads for 24
// multiply-adds), of 16 lanes with AVX2. Included by the files that decode with one instruction set.
#pragma once

#include "cpu/linear_4bit_decode.h"
#include "cpu/linear_4bit_finish.h"

namespace peft_kernels {
namespace {

constexpr int64_t kLanes = kLinear4Lanes;
constexpr int64_t kChunk = 64;   // summed elements of a panel, which is half as large as Skylake's L1
constexpr int64_t kF32Run = 32;  // products summed apart where the result keeps all digits of the sums
constexpr int kMaxRows = 6;

// kWidth rows of 64 weights, each with its table -> to[k][row]; rows past `present` are zero.
template <typename Decode>
void decode_columns(const Decode& decode, const typename Decode::Table* tables, const uint8_t* packed,
                    int64_t row_bytes, int64_t present, float* to) {
  constexpr int kWidth = Decode::kWidth;
  for (int t = 0; t < kLanes / kWidth; ++t) {
    typename Decode::Values v[kWidth];
    if (present == kWidth) {
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) v[i] = decode(tables[i], packed + i * row_bytes, t);
    } else {
      for (int i = 0; i < kWidth; ++i)
        v[i] = i < present ? decode(tables[i], packed + i * row_bytes, t) : typename Decode::Values{};
    }
    Decode::transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) Decode::store(to + Decode::element(kWidth * t + i) * kLanes, v[i]);
  }
}

// Rows [lane0, lane0 + 64) of W, columns [k0, k0 + 64) -> panel[k][lane]; rows past N are zero.
template <typename Decode>
void forward_panel(const Decode& decode, const Weight4& w, int64_t lane0, int64_t k0, float* panel) {
  constexpr int64_t kWidth = Decode::kWidth;
  const int64_t row_bytes = w.K / 2, rows = min64(kLanes, w.N - lane0);
  alignas(64) float scales[kLanes];
  column_scales(w, k0, lane0, rows, scales);
  for (int64_t g = 0; g < kLanes; g += kWidth) {
    const uint8_t* packed = w.packed + ((lane0 + g) * w.K + k0) / 2;
    const int64_t present = min64(kWidth, rows - g);
    alignas(64) typename Decode::Table tables[kWidth];
    for (int64_t i = 0; i < present; ++i) {
      tables[i] = decode.table(scales[g + i]);
      _mm_prefetch((const char*)packed + i * row_bytes + 64, _MM_HINT_T0);
    }
    decode_columns(decode, tables, packed, row_bytes, present, panel + g);
  }
}

// Rows [n0, n0 + count) of W, columns [lane0, lane0 + 64) -> panel[n][lane], lanes in the order of decoding.
template <typename Decode>
void backward_panel(const Decode& decode, const Linear4Job& job, int64_t lane0, int64_t n0, int64_t count,
                    float* panel) {
  const Weight4& w = *job.weight;
  const int64_t row_bytes = w.K / 2;
  alignas(64) float scales[kChunk];
  column_scales(w, lane0, n0, count, scales);
  for (int64_t i = 0; job.in_scale && i < count; ++i) scales[i] = canonical(scales[i] * job.in_scale[n0 + i]);
  const uint8_t* packed = w.packed + (n0 * w.K + lane0) / 2;
  for (int64_t n = 0; n < count; ++n, panel += kLanes, packed += row_bytes) {
    _mm_prefetch((const char*)packed + kPrefetchRows * row_bytes, _MM_HINT_T0);
    const typename Decode::Table table = decode.table(scales[n]);
#pragma GCC unroll 8
    for (int t = 0; t < kLanes / Decode::kWidth; ++t)
      Decode::store(panel + Decode::kWidth * t, decode(table, packed, t));
  }
}

// Lanes of a backward panel -> natural order.
template <typename Decode>
void natural_order(float* sums, int64_t rows) {
  for (; rows > 0; --rows, sums += kLanes) {
    alignas(64) float natural[kLanes];
    for (int i = 0; i < kLanes; ++i) natural[Decode::element(i)] = sums[i];
    __builtin_memcpy(sums, natural, sizeof natural);
  }
}

// Lanes [0, 16 kTileGroups): sums[MR][64] (+)= in[MR][count] panel[count][64].
template <int MR>
void multiply(const float* in, int64_t ld, const float* panel, int64_t count, float* sums, bool add) {
  Vec acc[MR][kTileGroups];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < kTileGroups; ++g) acc[i][g] = vec_zero();
  for (int64_t k = 0; k < count; ++k, panel += kLanes) {
    Vec w[kTileGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kTileGroups; ++g) w[g] = vec_load(panel + kVec * g);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Vec a = vec_set(in[i * ld + k]);
#pragma GCC unroll 4
      for (int g = 0; g < kTileGroups; ++g) acc[i][g] = multiply_add(a, w[g], acc[i][g]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < kTileGroups; ++g) {
      float* to = sums + i * kLanes + kVec * g;
      vec_store(to, add ? vec_load(to) + acc[i][g] : acc[i][g]);
    }
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, float*, bool);
constexpr Multiply kMultiply[kMaxRows] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

// One panel of lanes for rows [m0, m1). Decode is what an instruction set provides: the Table of a scaled code book;
// vectors of kWidth Values, one of which a call makes of positions kWidth t and on; which of 64 elements is at a
// position; transposition and store.
template <typename Decode, bool forward>
void run_panel(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  const Weight4& w = *job.weight;
  const Decode decode(w.book().code, job.dtype);
  const int64_t total = forward ? w.K : w.N, limit = forward ? w.N : w.K;
  float* panel = (float*)linear4_scratch(Linear4Scratch::Panel, size_t(kChunk) * kLanes * sizeof(float));
  float* sums = (float*)linear4_scratch(Linear4Scratch::Sums, size_t(m1 - m0) * kLanes * sizeof(float));
  const float* terms = pack_terms(job, lane0, limit, forward);
  const int64_t tiles = (m1 - m0 + kMaxRows - 1) / kMaxRows, run = job.dtype == DType::F32 ? kF32Run : kChunk;
  for (int64_t from = 0; from < total; from += kChunk) {
    const int64_t count = min64(kChunk, total - from);
    if (forward) {
      forward_panel(decode, w, lane0, from, panel);
    } else {
      backward_panel(decode, job, lane0, from, count, panel);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = m0 + (m1 - m0) * t / tiles, rows = m0 + (m1 - m0) * (t + 1) / tiles - m;
      float* tile = sums + (m - m0) * kLanes;
      const float* in = job.in_f32 + (m - job.first_f32) * job.ld_in_f32 + from;
      for (int64_t k = 0; k < count; k += run)
        for (int64_t lane = 0; lane < kLanes; lane += kVec * kTileGroups)
          kMultiply[rows - 1](in + k, job.ld_in_f32, panel + k * kLanes + lane, min64(run, count - k), tile + lane,
                              from + k > 0);
      if (from + count < total) continue;
      if (!forward) natural_order<Decode>(tile, rows);
      finish(job, {tile, m, lane0, min64(kLanes, limit - lane0), terms}, rows);
    }
  }
}

inline void widen_row(const Linear4Job& job, int64_t m, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += kVec)
    vec_store(out, DType::F32, k, vec_load(job.in, job.dtype, m * job.ld_in + k, count - k), count - k);
}

}  // namespace
}  // namespace peft_kernels

// Dot form in float32 arithmetic, for few rows: lanes run along k, W is decoded in registers and used by all rows of a
// tile of x. Included by the files that decode with one instruction set.
#pragma once

#include "cpu/linear_4bit_decode.h"
#include "cpu/linear_4bit_finish.h"

namespace peft_kernels {
namespace {

constexpr int64_t kPass = 4096;  // elements of x that columns take in turn: 16 KB, half of L1
constexpr int64_t kAhead = 8;    // rows of W that the prefetch runs ahead: 4 take 7 % longer at M = 4 (Skylake)

// sums[MR][NR], rows kLinear4Lanes apart: MR rows of x by NR rows of W from n on, over blocks [from, to). scales of
// those rows; Decode: see linear_4bit_gemm_f32.h.
template <typename Decode, DType dtype, int MR, int NR>
void dot(const Weight4& w, const float* rows, const float* scales, int64_t n, int64_t from, int64_t to, float* sums) {
  const Decode decode(w.book().code, dtype);
  const int64_t per_row = w.K / w.blocksize, row_bytes = w.K / 2, block_bytes = w.blocksize / 2;
  const uint8_t* packed = w.packed + n * row_bytes + from * block_bytes;
  const float* x[MR];  // a pointer a row: of one pointer and the offsets, GCC keeps every sum, on the stack
  Vec acc[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    x[i] = rows + i * w.K + from * w.blocksize;
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[i][j] = vec_zero();
  }
  for (int64_t block = from; block < to; ++block) {
    typename Decode::Table table[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) table[j] = decode.table(scales[j * per_row + block]);
    for (const uint8_t* end = packed + block_bytes; packed < end; packed += 32) {
      // Each row is too short for the hardware prefetcher to catch up.
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) _mm_prefetch((const char*)packed + (kAhead + j) * row_bytes, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        if (MR > 2) asm("" : "+r"(packed));  // load again rather than keep: registers are short
        Vec decoded[NR];
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) decoded[j] = decode.vec(table[j], packed + j * row_bytes, t);
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
          const Vec v = vec_load(x[i] + kVec * t);
#pragma GCC unroll 4
          for (int j = 0; j < NR; ++j) acc[i][j] = multiply_add(v, decoded[j], acc[i][j]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) x[i] += 64;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      float* sum = sums + i * kLinear4Lanes + j;
      *sum = (from > 0 ? *sum : 0.0f) + vec_sum(acc[i][j]);
    }
}

template <typename Decode, DType dtype, int MR>
void dot_rows(const Weight4& w, const float* x, const float* scales, int64_t n0, int64_t n1, float* sums) {
  constexpr int kColumns = MR == 4 && Decode::kColumns == 4 ? 3 : Decode::kColumns;  // 16 sums leave few registers
  const int64_t per_row = w.K / w.blocksize, step = kPass / MR > w.blocksize ? kPass / MR / w.blocksize : 1;
  for (int64_t from = 0; from < per_row; from += step) {
    const int64_t to = min64(per_row, from + step);
    int64_t n = n0;
    for (; n + kColumns <= n1; n += kColumns)
      dot<Decode, dtype, MR, kColumns>(w, x, scales + (n - n0) * per_row, n, from, to, sums + n - n0);
    for (; n < n1; ++n) dot<Decode, dtype, MR, 1>(w, x, scales + (n - n0) * per_row, n, from, to, sums + n - n0);
  }
}

template <typename Decode, DType dtype>
void run(const Linear4Job& job, const float* x, int64_t n0, int64_t n1) {
  const Weight4& w = *job.weight;
  const int64_t per_row = w.K / w.blocksize, count = (n1 - n0) * per_row;
  float* scales = (float*)linear4_scratch(Linear4Scratch::Scales, size_t(count) * sizeof(float));
  float* sums = (float*)linear4_scratch(Linear4Scratch::Sums, size_t(job.M * kLinear4Lanes) * sizeof(float));
  Decode::row_scales(w, n0 * per_row, count, scales);
  for (int64_t m = 0; m < job.M; m += 4) {
    const float* rows = x + m * w.K;
    float* to = sums + m * kLinear4Lanes;
    if (job.M - m >= 4) dot_rows<Decode, dtype, 4>(w, rows, scales, n0, n1, to);
    if (job.M - m == 3) dot_rows<Decode, dtype, 3>(w, rows, scales, n0, n1, to);
    if (job.M - m == 2) dot_rows<Decode, dtype, 2>(w, rows, scales, n0, n1, to);
    if (job.M - m == 1) dot_rows<Decode, dtype, 1>(w, rows, scales, n0, n1, to);
  }
  finish(job, {sums, 0, n0, n1 - n0, pack_terms(job, n0, w.N, true)}, job.M);
}

}  // namespace
}  // namespace peft_kernels

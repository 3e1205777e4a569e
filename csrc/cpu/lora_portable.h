// The LoRA kernels as plain loops over 32 float32 columns, for the compiler to vectorize with whatever it may use.
// Included by lora_scalar.cpp and lora_avx2.cpp.
#pragma once

#include "cpu/lora_kernels.h"
#include "cpu/philox.h"

namespace peft_kernels {
namespace {

inline float multiply_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;  // without the instruction, fmaf is a library call
#endif
}

// to[i] = drop(x)[m, k0 + i] for i < n, and zero up to `width`.
inline void load_row(const Matrix& x, const Dropout& dropout, int64_t m, int64_t k0, int64_t n, int64_t width,
                     float* to) {
  const int64_t from = m * x.ld + k0;
  if (x.dtype == DType::BF16)
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_f32(((const uint16_t*)x.data)[from + i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = load_f32(x.data, from + i, x.dtype);
  for (int64_t i = n; i < width; ++i) to[i] = 0;
  if (!dropout.active()) return;
  float scale[kTile];
  for (int64_t i = 0; i < n; i += kTile) {  // a product, not a select: a dropped NaN stays NaN as in eager
    const int64_t count = min64(kTile, n - i);
    dropout_scale_row(dropout.seed, m, k0 + i, count, dropout.p, scale);
    for (int64_t j = 0; j < count; ++j) to[i + j] *= scale[j];
  }
}

void pack_panel(const Matrix& p, bool p_is_kr, int64_t r, int64_t k0, int64_t kn, const ShrinkPanels& panels,
                void* block) {
  for (int64_t j = 0; j < r; ++j) {
    float* to = (float*)block + j * panels.ld;
    for (int64_t k = 0; k < (kn + kTile - 1) / kTile * kTile; ++k)
      to[k] = k < kn ? load_f32(p.data, p_is_kr ? (k0 + k) * p.ld + j : j * p.ld + k0 + k, p.dtype) : 0.0f;
  }
}

void shrink(const Matrix& x, const Dropout& dropout, int64_t m0, int64_t m1, int64_t K, const ShrinkPanels& panels,
            int64_t j0, int64_t j1, float alpha, float* S, int64_t ldS) {
  const int64_t width = (panels.block_k + kTile - 1) / kTile * kTile;
  float* row = (float*)lora_scratch(1, size_t(width) * sizeof(float));
  for (int64_t m = m0; m < m1; ++m) {
    float sums[kShrinkRanks][kTile] = {};
    for (int64_t k0 = 0, b = 0; k0 < K; k0 += panels.block_k, ++b) {
      const int64_t kn = min64(panels.block_k, K - k0);
      load_row(x, dropout, m, k0, kn, (kn + kTile - 1) / kTile * kTile, row);
      for (int64_t j = j0; j < j1; ++j) {
        const float* p = (const float*)panels.data + b * panels.block_stride + j * panels.ld;
        float* sum = sums[j - j0];
        for (int64_t k = 0; k < kn; k += kTile)
          for (int64_t i = 0; i < kTile; ++i) sum[i] = multiply_add(row[k + i], p[k + i], sum[i]);
      }
    }
    for (int64_t j = j0; j < j1; ++j) {
      float* sum = sums[j - j0];
      for (int64_t half = kTile / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
      S[m * ldS + j] = alpha * sum[0];
    }
  }
}

void wgrad(const Matrix& x, const Dropout& dropout, int64_t m0, int64_t m1, int64_t i0, int64_t i1, const float* P,
           int64_t ldP, int64_t r, float* tiles) {
  constexpr int64_t kRows = 64;  // summed apart: the rounding error grows with the length of a chain of additions
  float block[kRows][kTile];
  for (int64_t i = i0; i < i1; i += kTile, tiles += r * kTile) {
    for (int64_t m = m0; m < m1; m += kRows) {
      const int64_t rows = min64(kRows, m1 - m);
      for (int64_t n = 0; n < rows; ++n) load_row(x, dropout, m + n, i, min64(kTile, i1 - i), kTile, block[n]);
      for (int64_t j = 0; j < r; ++j) {
        float sum[kTile] = {};
        for (int64_t n = 0; n < rows; ++n) {
          const float p = P[(m + n) * ldP + j];
          for (int64_t c = 0; c < kTile; ++c) sum[c] = multiply_add(block[n][c], p, sum[c]);
        }
        for (int64_t c = 0; c < kTile; ++c) tiles[j * kTile + c] += sum[c];
      }
    }
  }
}

void wgrad_store(const float* tiles, int64_t r, int64_t i0, int64_t i1, int64_t I, float alpha, void* out,
                 DType out_dtype, bool out_is_ri) {
  for (int64_t i = i0; i < i1; ++i)
    for (int64_t j = 0; j < r; ++j) {
      const float value = tiles[((i - i0) / kTile * r + j) * kTile + (i - i0) % kTile];
      store_f32(out, out_is_ri ? j * I + i : i * r + j, out_dtype, alpha * value);
    }
}

void expand_add(void* out, DType dtype, int64_t ldo, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                const ExpandTerm* terms, int64_t count) {
  int64_t ranks = 0;
  for (int64_t t = 0; t < count; ++t) ranks += terms[t].rank;
  float* packed = (float*)lora_scratch(1, size_t(ranks) * kTile * sizeof(float));
  for (int64_t n = n0; n < n1; n += kTile) {
    const int64_t columns = min64(kTile, n1 - n);
    float* to = packed;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = 0; j < terms[t].rank; ++j, to += kTile)
        for (int64_t i = 0; i < kTile; ++i) {
          const Matrix& p = terms[t].p;
          const int64_t index = terms[t].p_is_nr ? (n + i) * p.ld + j : j * p.ld + n + i;
          to[i] = i < columns ? terms[t].alpha * load_f32(p.data, index, p.dtype) : 0.0f;
        }
    for (int64_t m = m0; m < m1; ++m) {
      float total[kTile] = {};
      const float* p = packed;
      for (int64_t t = 0; t < count; ++t) {
        const ExpandTerm& term = terms[t];
        float scale[kTile];
        if (term.dropout.active()) dropout_scale_row(term.dropout.seed, m, n, kTile, term.dropout.p, scale);
        for (int64_t j0 = 0; j0 < term.rank; j0 += kExpandRanks) {
          float sum[kTile] = {};
          for (int64_t j = j0; j < min64(term.rank, j0 + kExpandRanks); ++j, p += kTile) {
            const float s = term.s[m * term.lds + j];
            for (int64_t i = 0; i < kTile; ++i) sum[i] = multiply_add(s, p[i], sum[i]);
          }
          for (int64_t i = 0; i < kTile; ++i) total[i] += term.dropout.active() ? sum[i] * scale[i] : sum[i];
        }
      }
      for (int64_t i = 0; i < columns; ++i)
        store_f32(out, m * ldo + n + i, dtype, load_f32(out, m * ldo + n + i, dtype) + total[i]);
    }
  }
}

void dropout_rows(uint64_t seed, int64_t m0, int64_t m1, int64_t K, double p, float* out) {
  for (int64_t m = m0; m < m1; ++m) dropout_scale_row(seed, m, 0, K, p, out + m * K);
}

}  // namespace
}  // namespace peft_kernels

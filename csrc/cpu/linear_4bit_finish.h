// The epilogue of the GEMM kernels: float32 sums + bias + LoRA terms -> the result's dtype, rounded once.
#pragma once

#include "cpu/linear_4bit_kernels.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace peft_kernels {
namespace {

constexpr int64_t kTermRun = 32;  // ranks summed apart: a longer sum of float32 would err more than eager's
// Groups of 16 lanes whose sums, for a few rows, stay in registers.
constexpr int kTileGroups = kVecRegisters == 32 ? kLinear4Lanes / kVec : 1;

// The right operands of the terms for lanes [lane0, lane0 + 64), float32, scaled: [sum of r][64], zeros past `limit`.
// `right_is_lane_major`: stored [lanes, r] (B, forward) rather than [r, lanes] (A, backward).
inline const float* pack_terms(const Linear4Job& job, int64_t lane0, int64_t limit, bool right_is_lane_major) {
  if (job.rank_sum == 0) return nullptr;
  float* packed = (float*)linear4_scratch(Linear4Scratch::Terms, size_t(job.rank_sum) * kLinear4Lanes * sizeof(float));
  float* to = packed;
  for (int64_t t = 0; t < job.term_count; ++t) {
    const Linear4Term& term = job.terms[t];
    const Vec scaling = vec_set(term.scaling);
    for (int64_t g = 0; g < kLinear4Lanes; g += kVec) {
      const int64_t lane = lane0 + g;
      if (right_is_lane_major) {
        for (int64_t j = 0; j < term.r; j += kVec) {
          Vec v[kVec];
          for (int64_t i = 0; i < kVec; ++i)
            v[i] =
                lane + i < limit ? vec_load(term.right, term.dtype, (lane + i) * term.r + j, term.r - j) : vec_zero();
          vec_transpose(v);
          for (int64_t i = 0; i < min64(kVec, term.r - j); ++i)
            vec_store(to + (j + i) * kLinear4Lanes + g, v[i] * scaling);
        }
      } else {
        for (int64_t j = 0; j < term.r; ++j)
          vec_store(
              to + j * kLinear4Lanes + g,
              lane < limit ? vec_load(term.right, term.dtype, j * limit + lane, limit - lane) * scaling : vec_zero());
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
inline void store_rows(const Vec (&c)[ROWS][kTileGroups], void* matrix, const Linear4Job& job, const FinishTile& tile) {
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < kTileGroups; ++g)
      if (tile.lanes > kVec * g)
        vec_store(matrix, job.dtype, (tile.m + i) * job.ld_out + tile.lane0 + kVec * g, c[i][g], tile.lanes - kVec * g);
}

template <int ROWS>
inline void finish_rows(const Linear4Job& job, const FinishTile& tile) {
  constexpr int64_t kWidth = kVec * kTileGroups;
  Vec c[ROWS][kTileGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kTileGroups; ++g) {
    const int64_t left = tile.lanes - kVec * g;
    const Vec bias =
        job.bias && left > 0 ? vec_load(job.bias, job.bias_dtype, tile.lane0 + kVec * g, left) : vec_zero();
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) c[i][g] = vec_load(tile.sums + i * kLinear4Lanes + kVec * g) + bias;
  }
  const float* right = tile.packed_terms;
  for (int64_t t = 0; t < job.term_count; ++t) {
    const Linear4Term& term = job.terms[t];
    alignas(64) float mask[ROWS][kWidth];
    for (int i = 0; term.p != 0 && i < ROWS; ++i)
      dropout_scale_row(term.seed, tile.m + i, tile.lane0, kWidth, term.p, mask[i]);
    const float* left = term.left + tile.m * term.ld;
    for (int64_t j0 = 0; j0 < term.r; j0 += kTermRun) {
      Vec d[ROWS][kTileGroups];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < kTileGroups; ++g) d[i][g] = vec_zero();
      for (int64_t j = j0; j < min64(term.r, j0 + kTermRun); ++j, right += kLinear4Lanes) {
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
          const Vec s = vec_set(left[i * term.ld + j]);
#pragma GCC unroll 4
          for (int g = 0; g < kTileGroups; ++g) d[i][g] = multiply_add(s, vec_load(right + kVec * g), d[i][g]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < kTileGroups; ++g)
          c[i][g] = c[i][g] + (term.p != 0 ? d[i][g] * vec_load(mask[i] + kVec * g) : d[i][g]);
    }
  }
  if (job.out_scale) {
    if (job.unscaled) store_rows<ROWS>(c, job.unscaled, job, tile);
#pragma GCC unroll 4
    for (int g = 0; g < kTileGroups; ++g) {
      const int64_t lane = tile.lane0 + kVec * g, left = tile.lanes - kVec * g;
      const Vec scale = left > 0 ? vec_load(job.out_scale, DType::F32, lane, left) : vec_zero();
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) c[i][g] = c[i][g] * scale;
    }
  }
  store_rows<ROWS>(c, job.out, job, tile);
}

// out[m : m + rows, lane0 : lane0 + lanes] from sums [rows][64]; lanes <= 64.
inline void finish(const Linear4Job& job, FinishTile tile, int64_t rows) {
  constexpr int64_t kWidth = kVec * kTileGroups;
  for (; tile.lanes > 0; tile.lane0 += kWidth, tile.lanes -= kWidth, tile.sums += kWidth) {
    FinishTile part = tile;
    int64_t left = rows;
    for (; left >= 4; left -= 4, part.m += 4, part.sums += 4 * kLinear4Lanes) finish_rows<4>(job, part);
    if (left == 3) finish_rows<3>(job, part);
    if (left == 2) finish_rows<2>(job, part);
    if (left == 1) finish_rows<1>(job, part);
    if (tile.packed_terms) tile.packed_terms += kWidth;
  }
}

}  // namespace
}  // namespace peft_kernels

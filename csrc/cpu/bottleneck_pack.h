// Packing into units and panels.
#pragma once

#include "cpu/bottleneck_units.h"
#include "cpu/philox.h"

namespace peft_kernels {
namespace {

// Whether layer norm is applied to the products with x, which then is multiplied as it is:
// LN(x) W' = (x W' - mean sum(W')) / std. Only where the operands are rounded to bfloat16: for float32 the difference
// of rows whose mean is far from zero would lose digits.
template <class U>
bool folds_norm(const BottleneckJob& job) {
  return U::kElements == 2 && job.ln_weight;
}

inline bool only_columns_scaled(const Source& from) {
  return !from.subtract && !from.row_scale && !from.dropout.active();
}

inline bool plain(const Source& from) { return only_columns_scaled(from) && !from.column_scale; }

// Elements [k, k + count) of row m, count <= 16; `mask` belongs to column k.
PK_INLINE Vec read(const Source& from, int64_t m, int64_t k, int64_t count, const float* mask) {
  Vec v = vec_load(from.matrix.data, from.matrix.dtype, m * from.matrix.ld + k, count);
  if (from.subtract) v = v - vec_set(from.subtract[m]);
  if (from.row_scale) v = v * vec_set(from.row_scale[m]);
  if (from.column_scale) v = v * vec_load(from.column_scale, DType::F32, k, count);
  if (mask) v = v * vec_load(mask);  // a product, not a select: a dropped NaN stays NaN as in eager
  return v;
}

inline void widen(const Vector& from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kVec)
    vec_store(to, DType::F32, i, vec_load(from.data, from.dtype, i, count - i), count - i);
}

// Zeros and ones for columns [k, k + count) of row m, or null without dropout.
inline const float* keep_row(const Source& from, int64_t m, int64_t k, int64_t count, float* to) {
  if (!from.dropout.active()) return nullptr;
  dropout_row(from.dropout.seed, m, k, count, from.dropout.p, 1.0f, to);
  return to;
}

// Rows [m0, m0 + rows), columns [k0, k0 + count) as units, zero up to a multiple of sixteen units.
template <class U>
void pack_rows(const Source& from, int64_t m0, int64_t rows, int64_t k0, int64_t count, uint32_t* to, int64_t ld) {
  constexpr int64_t kStep = kVec * U::kElements;
  alignas(64) float mask[kChunkUnits * U::kElements];
  for (int64_t i = 0; i < rows; ++i, to += ld) {
    const float* keep = keep_row(from, m0 + i, k0, (count + kStep - 1) / kStep * kStep, mask);
    for (int64_t k = 0; k < count; k += kStep) {
      const Vec first = read(from, m0 + i, k0 + k, count - k, keep ? keep + k : nullptr);
      Vec second = vec_zero();
      if (U::kElements == 2)
        second = read(from, m0 + i, k0 + k + kVec, count - k - kVec, keep ? keep + k + kVec : keep);
      vec_store((float*)(to + k / U::kElements), U::along(first, second));
    }
  }
}

// Elements [k, k + count) of row m as sixteen units.
template <class U>
PK_INLINE Vec read_units(const Source& from, int64_t m, int64_t k, int64_t count) {
  if constexpr (U::kElements == 2) {
    if (count >= 2 * kVec && plain(from) && from.matrix.dtype == U::kDtype)
      return vec_load((const float*)((const uint16_t*)from.matrix.data + m * from.matrix.ld + k));
    return U::along(read(from, m, k, count, nullptr), read(from, m, k + kVec, count - kVec, nullptr));
  } else {
    return read(from, m, k, count, nullptr);
  }
}

// panel[unit][W]: lanes are rows [row0, row0 + lanes) of a weight, units its columns [k0, k0 + count).
template <class U>
void pack_lanes_from_rows(const Source& from, int64_t row0, int64_t lanes, int64_t k0, int64_t count, int64_t W,
                          uint32_t* panel) {
  const int64_t units = units_of<U>(count);
  for (int64_t lane = 0; lane < W; lane += kVec) {
    for (int64_t u = 0; u < units; u += kVec) {
      Vec v[kVec];
      const int64_t k = u * U::kElements;
      for (int64_t i = 0; i < kVec; ++i)
        v[i] = lane + i < lanes ? read_units<U>(from, row0 + lane + i, k0 + k, count - k) : vec_zero();
      vec_transpose(v);
      for (int64_t i = 0; i < min64(kVec, units - u); ++i) vec_store((float*)(panel + (u + i) * W + lane), v[i]);
    }
  }
}

// panel[unit][W]: lanes are columns [k0, k0 + lanes), units the rows [m0, m0 + rows).
template <class U>
void pack_lanes_from_columns(const Source& from, int64_t m0, int64_t rows, int64_t k0, int64_t lanes, int64_t W,
                             uint32_t* panel) {
  alignas(64) float masks[2][kPanelLanes];
  for (int64_t i = 0; i < rows; i += U::kElements, panel += W) {
    const int64_t m = m0 + i;
    const bool pair = U::kElements == 2 && i + 1 < rows;
#if defined(__AVX512BF16__)
    if (U::kElements == 2 && pair && lanes == W && only_columns_scaled(from) && from.matrix.dtype == U::kDtype) {
      const uint16_t* row = (const uint16_t*)from.matrix.data + m * from.matrix.ld + k0;
      const float* scale = from.column_scale ? from.column_scale + k0 : nullptr;
      interleave_rows(row, row + from.matrix.ld, scale, lanes, panel);
      continue;
    }
#endif
    const float* keep = keep_row(from, m, k0, W, masks[0]);
    const float* keep_second = pair ? keep_row(from, m + 1, k0, W, masks[1]) : nullptr;
    for (int64_t lane = 0; lane < W; lane += kVec) {
      Vec second = vec_zero();
      if (pair) second = read(from, m + 1, k0 + lane, lanes - lane, keep_second ? keep_second + lane : nullptr);
      const Vec first = read(from, m, k0 + lane, lanes - lane, keep ? keep + lane : nullptr);
      vec_store((float*)(panel + lane), U::across(first, second));
    }
  }
}

}  // namespace
}  // namespace peft_kernels

// Packing into units and panels, and the product of both. Included once per translation unit and instruction set.
#pragma once

#include "cpu/bottleneck_kernels.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace peft_kernels {
namespace {

struct F32Unit {
  static constexpr int64_t kElements = 1;
  static constexpr DType kDtype = DType::F32;
  using Wide = Vec;
  static PK_INLINE Wide broadcast(const char* p) { return vec_set(*(const float*)p); }
  static PK_INLINE Wide load(const uint32_t* p) { return vec_load((const float*)p); }
  static PK_INLINE Vec multiply_add(Wide a, Wide w, Vec sum) { return peft_kernels::multiply_add(a, w, sum); }
  static PK_INLINE Vec rounded(Vec value) { return value; }
  static PK_INLINE Vec along(Vec first, Vec) { return first; }   // sixteen units of consecutive elements
  static PK_INLINE Vec across(Vec first, Vec) { return first; }  // sixteen units, each of one element of both
};

#if defined(__AVX512BF16__)
struct Bf16Unit {  // the products of bf16 are exact in vdpbf16ps, which adds them in float32 at twice the FMA rate
  static constexpr int64_t kElements = 2;
  static constexpr DType kDtype = DType::BF16;
  using Wide = __m512bh;
  typedef float Bits __attribute__((aligned(2), may_alias));  // a pair of a row, read as one broadcast operand
  static PK_INLINE Wide broadcast(const char* p) {
    return (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*(const Bits*)p));
  }
  static PK_INLINE Wide load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static PK_INLINE Vec multiply_add(Wide a, Wide w, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, w)}; }
  static PK_INLINE Vec rounded(Vec value) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_bf16(value.v)), 16))};
  }
  static PK_INLINE Vec along(Vec first, Vec second) {
    return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second.v, first.v))};
  }
  static PK_INLINE void split(const uint16_t* from, Vec& even, Vec& odd) {  // 32 elements
    const __m512i raw = _mm512_loadu_si512(from);
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u))))};
  }
  static PK_INLINE Vec across(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32(round_bf16(first.v)), high = _mm512_cvtepu16_epi32(round_bf16(second.v));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
};
#endif

// Elements [i, i + 32) of U's dtype.
template <class U>
PK_INLINE void store_pair(void* data, int64_t i, Vec first, Vec second) {
  if constexpr (U::kElements == 2) {
    vec_store((float*)((uint16_t*)data + i), U::along(first, second));
  } else {
    vec_store((float*)data + i, first);
    vec_store((float*)data + i + kVec, second);
  }
}

#if defined(__AVX512BF16__)
// to[lane] = (first[lane], second[lane]), each times scale[lane] unless it is null; lanes a multiple of sixteen.
inline void interleave_rows(const uint16_t* first, const uint16_t* second, const float* scale, int64_t lanes,
                            uint32_t* to) {
  const auto load = [](const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  };
  const auto scaled = [&](__m512i bits, int64_t lane) {
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_loadu_ps(scale + lane));
  };
  for (int64_t lane = 0; lane < lanes; lane += kVec) {
    const __m512i low = load(first + lane), high = load(second + lane);
    if (scale)
      vec_store((float*)(to + lane), Bf16Unit::across({scaled(low, lane)}, {scaled(high, lane)}));
    else
      _mm512_storeu_si512(to + lane, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

template <class U>
PK_INLINE int64_t units_of(int64_t elements) {
  return (elements + U::kElements - 1) / U::kElements;
}

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

// A tile of a matrix that is read or written after the next product: too short a run for the hardware prefetcher.
inline void prefetch_tile(const void* data, DType dtype, int64_t ld, int64_t row, int64_t rows, int64_t column) {
  const int64_t size = dtype_size(dtype);
  const char* from = (const char*)data + (row * ld + column) * size;
  for (int64_t i = 0; data && i < rows; ++i, from += ld * size)
    for (int64_t b = 0; b < kPanelLanes * size; b += 64) __builtin_prefetch(from + b);
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

// What a product brings closer meanwhile, spread over its steps: all at once, requests would queue before its own
// loads.
struct NothingAhead {
  PK_INLINE void operator()(int64_t) const {}
};

// kPanelLanes elements of each of `rows` rows, one row every fourth step.
struct ColumnsAhead {
  const char* data;
  int64_t ld, rows, size;
  PK_INLINE void operator()(int64_t u) const {
    if (u % 4 == 0 && u / 4 < rows)
      for (int64_t b = 0; b < size; b += 64) __builtin_prefetch(data + u / 4 * ld + b);
  }
  ColumnsAhead after(int64_t steps) const { return {data + steps / 4 * ld, ld, rows - steps / 4, size}; }
};

// A tile of what a product is added to or stored to: kPanelLanes elements of kTileRows rows of up to three matrices.
struct TileAhead {
  const char* data[3];
  int64_t ld[3], size;

  void add(int i, const void* matrix, DType dtype, int64_t row_stride, int64_t row, int64_t column) {
    const int64_t bytes = dtype_size(dtype);
    data[i] = (const char*)matrix + (row * row_stride + column) * bytes;
    ld[i] = row_stride * bytes, size = kPanelLanes * bytes;
  }

  PK_INLINE void operator()(int64_t u) const {
    if (u >= kTileRows) return;
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i)
      for (int64_t b = 0; data[i] && b < size; b += 64) __builtin_prefetch(data[i] + u * ld[i] + b);
  }
};

// sink(rows[MR][units] panel[units][LANES]) for 16 G of the lanes, as registers.
template <class U, int MR, int G, int LANES, class Sink, class Ahead = NothingAhead>
PK_INLINE void multiply_tile(const char* rows, int64_t ld, const uint32_t* panel, int64_t units, const Sink& sink,
                             const Ahead& ahead = {}) {
  Vec acc[MR][G];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) acc[i][g] = vec_zero();
  for (int64_t u = 0; u < units; ++u, panel += LANES, rows += 4) {
    ahead(u);
    typename U::Wide w[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) w[g] = U::load(panel + g * kVec);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const typename U::Wide a = U::broadcast(rows + i * ld);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[i][g] = U::multiply_add(a, w[g], acc[i][g]);
    }
  }
  sink(acc);
}

// sums[MR][16 G] = (or +=) rows[MR][units] panel[units][16 G], as many lanes at a time as registers allow.
template <class U, int MR, int G, class Ahead>
void multiply(const char* rows, int64_t ld, const uint32_t* panel, int64_t units, float* sums, int64_t ld_sums,
              bool add, const Ahead& ahead) {
  constexpr int kParts = kVecRegisters == 32 ? G : 1;
  for (int part = 0; part < G; part += kParts, panel += kParts * kVec, sums += kParts * kVec)
    multiply_tile<U, MR, kParts, G * kVec>(
        rows, ld, panel, units,
        [&](Vec(&acc)[MR][kParts]) {
#pragma GCC unroll 6
          for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
            for (int g = 0; g < kParts; ++g) {
              float* to = sums + i * ld_sums + g * kVec;
              vec_store(to, add ? vec_load(to) + acc[i][g] : acc[i][g]);
            }
        },
        ahead);
}

template <class Ahead>
using Multiply = void (*)(const char*, int64_t, const uint32_t*, int64_t, float*, int64_t, bool, const Ahead&);

template <class U, int G, class Ahead>
Multiply<Ahead> multiply_of(int64_t rows) {
  constexpr Multiply<Ahead> table[kTileRows] = {multiply<U, 1, G, Ahead>, multiply<U, 2, G, Ahead>,
                                                multiply<U, 3, G, Ahead>, multiply<U, 4, G, Ahead>,
                                                multiply<U, 5, G, Ahead>, multiply<U, 6, G, Ahead>};
  return table[rows - 1];
}

// Any number of rows; W lanes, a multiple of sixteen up to kPanelLanes.
template <class U>
void multiply_rows(const char* rows, int64_t ld, int64_t count, const uint32_t* panel, int64_t units, int64_t W,
                   float* sums, int64_t ld_sums, bool add) {
  const auto of = W == 64   ? multiply_of<U, 4, NothingAhead>
                  : W == 48 ? multiply_of<U, 3, NothingAhead>
                  : W == 32 ? multiply_of<U, 2, NothingAhead>
                            : multiply_of<U, 1, NothingAhead>;
  for (; count > 0; count -= kTileRows, rows += kTileRows * ld, sums += kTileRows * ld_sums)
    of(min64(kTileRows, count))(rows, ld, panel, units, sums, ld_sums, add, {});
}

}  // namespace
}  // namespace peft_kernels

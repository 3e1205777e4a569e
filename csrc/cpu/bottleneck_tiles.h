// The product of units and panels.
#pragma once

#include "cpu/bottleneck_units.h"

namespace peft_kernels {
namespace {

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

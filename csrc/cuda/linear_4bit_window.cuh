// A warp's share of linear_4bit_kernel: 16 rows of W times x, 128 columns at a time.
#pragma once

#include "cuda/nf4_decode.cuh"

namespace peft_kernels {

constexpr int kTileRows = 16;            // rows of W that a block multiplies at a time
constexpr int kWarps = 8;                // of a block; they share the tile's columns
constexpr int kWindow = 128;             // columns that a warp multiplies at a time
constexpr int kSlots = 4;                // windows that a warp has in flight: eight 16-byte loads a lane
constexpr int kStep = kWarps * kWindow;  // columns from one slot's window to the next slot's
constexpr int kBatch = kSlots * kStep;   // columns from one window of a slot to its next

// What is added to x W^T before the one rounding.
struct Extras {
  const void* bias;
  DType bias_dtype;
  const float* s;
  const void* b;
  DType b_dtype;
  int rank;
  float scaling;
};

struct Linear4 {
  const void* x;
  Weight4 weight;
  DecodeTable table;
  Extras extras;
  void* y;
  float* planes;  // (splits, M, N), or null where K is not split
  int64_t ldx;
  int M, N, k_per_split, block_shift, nested_shift;
};

// What lane 4 g + t holds of 16 rows and a window's columns: rows g and g + 8, of either every fourth run of SPAN / 4
// columns; and the scale of row g + 8 (t & 1) in the window's half t >> 1.
template <int SPAN>
struct Window {
  uint32_t words[kWindow / SPAN][2][SPAN / 32];
  RawScale scale;
};

// Where a lane's loads begin, for the windows of one batch: rows past N are the last one again.
struct Source {
  const uint8_t* rows[2];
  int block64;  // its scale's number if blocks were of 64
};

template <int SPAN>
__device__ __forceinline__ Source source(const Linear4& call, int tile, int k, int g, int t) {
  const int K = int(call.weight.K), last = call.N - 1;
  const int upper = min(tile * kTileRows + g, last), lower = min(tile * kTileRows + g + 8, last);
  const uint8_t* from = call.weight.packed + k / 2 + t * (SPAN / 8);
  return {{from + int64_t(upper) * (K / 2), from + int64_t(lower) * (K / 2)},
          (t & 1 ? lower : upper) * (K / 64) + k / 64 + (t >> 1)};
}

// `columns`: how many there are from the batch's first on. Past them a lane keeps what it had: zeros, or codes and a
// scale of the same rows, which is as good, for x is zero there.
template <int SPAN, bool NESTED>
__device__ __forceinline__ void load_window(Window<SPAN>& window, const Linear4& call, const Source& from, int slot,
                                            int columns, int t) {
#pragma unroll
  for (int span = 0; span < kWindow / SPAN; ++span) {
    const int column = slot * kStep + span * SPAN;
    if (column + t * (SPAN / 4) >= columns) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t* words = window.words[span][i];
      if constexpr (SPAN == 128) {
        const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(from.rows[i] + column / 2));
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
      } else {
        const uint2 loaded = __ldcs(reinterpret_cast<const uint2*>(from.rows[i] + column / 2));
        words[0] = loaded.x, words[1] = loaded.y;
      }
    }
  }
  const int block = (from.block64 + slot * (kStep / 64)) >> call.block_shift;
  if (slot * kStep + 64 * (t >> 1) < columns) window.scale = load_scale<NESTED>(call.weight, block, call.nested_shift);
}

// sums += W x^T over a window. x: the lane's part of its row of x, at the window's first column.
//
// A scale belongs to 64 columns of one row, so products of different blocks must not meet before they are scaled.
// SPAN 64: the lanes of a row share a block, 8 bytes each, and the tensor core's 8 columns are 8 rows of x.
// SPAN 128: they read 16 bytes each and hold two blocks; its columns are 4 rows of x once for either block, a lane of
// the other block giving zeros. Nothing is lost as long as there are no more than 4 rows.
template <typename T, int SPAN, int GROUPS, bool TABLE>
__device__ __forceinline__ void multiply_window(float (&sums)[GROUPS][4], const Window<SPAN>& window,
                                                const DecodeTable& table, const char* pairs,
                                                const char* const (&x)[GROUPS], float scale, int lane) {
#pragma unroll
  for (int span = 0; span < kWindow / SPAN; ++span) {
    float products[GROUPS][4] = {};
#pragma unroll
    for (int word = 0; word < SPAN / 32; ++word) {
      uint32_t upper[4], lower[4];
      if constexpr (TABLE) {
        decode_word(window.words[span][0][word], pairs, 4 * lane, upper);
        decode_word(window.words[span][1][word], pairs, 4 * lane, lower);
      } else {
        decode_word(window.words[span][0][word], table, upper);
        decode_word(window.words[span][1][word], table, lower);
      }
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        const uint4 eight = *reinterpret_cast<const uint4*>(x[group] + span * SPAN * 2 + word * 16);
        matrix_multiply_add<T>(products[group], upper[0], lower[0], upper[1], lower[1], eight.x, eight.y);
        matrix_multiply_add<T>(products[group], upper[2], lower[2], upper[3], lower[3], eight.z, eight.w);
      }
    }
    // the lanes that hold the scales of this lane's two rows and its block
    const int holder = (lane & ~3) + (SPAN == 128 ? lane & 2 : 2 * span);
    const float scales[2] = {__shfl_sync(~0u, scale, holder), __shfl_sync(~0u, scale, holder + 1)};
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[group][i] = fmaf(products[group][i], scales[i / 2], sums[group][i]);
  }
}

}  // namespace peft_kernels

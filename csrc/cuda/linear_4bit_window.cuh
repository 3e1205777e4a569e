// A warp's share of linear_4bit_kernel: 16 rows of W times x, 128 columns at a time.
#pragma once

#include "cuda/nf4_decode.cuh"

namespace peft_kernels {

constexpr int kTileRows = 16;  // rows of W that a block multiplies at a time
constexpr int kWarps = 16;     // of a block, which has a multiprocessor for itself; they share the tile's columns
constexpr int kWindow = 128;   // columns that a warp multiplies at a time
constexpr int kStages = 2;     // windows that a warp has in flight; four take 1 microsecond more (H100, 14336 x 4096)
constexpr int kCodeBytes = kTileRows * kWindow / 2, kStageBytes = kCodeBytes + 2 * kScales;

// Windows of a warp in a tile. Registers have room for 64 words of x.
constexpr __host__ __device__ int most_windows(int groups) { return 4 / groups; }

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
  int M, N, k_per_split, windows, block_shift, nested_shift;  // windows: of a warp in a tile
};

// Where a warp is among its windows, and what lane 4 g + t fetches there: 16 bytes each of rows g and g + 8, at columns
// 32 t; and the scale of row g + 8 (t & 1) in the window's half t >> 1. Rows from N on and columns from k_end on are
// zeros, as their scales are.
struct Position {
  int window, row, column, block64;  // block64: the scale's number if blocks were of 64
  const uint8_t* codes;
};

constexpr int kStep = kWarps * kWindow;  // columns from one window of a warp to its next

__device__ __forceinline__ Position first_position(const Linear4& call, int tile, int k, int lane) {
  const int g = lane >> 2, t = lane & 3, row = tile * kTileRows + g, K = int(call.weight.K);
  return {0, row, k + 32 * t, (row + 8 * (t & 1)) * (K / 64) + k / 64 + (t >> 1),
          call.weight.packed + int64_t(row) * (K / 2) + k / 2 + 16 * t};
}

__device__ __forceinline__ void advance(Position& at, const Linear4& call) {
  const bool same = at.window + 1 < call.windows;
  const int columns = same ? kStep : -kStep * (call.windows - 1), rows = same ? 0 : kTileRows * int(gridDim.x);
  const int K = int(call.weight.K);
  at.window = same ? at.window + 1 : 0;
  at.row += rows, at.column += columns;
  at.block64 += rows * (K / 64) + columns / 64;
  at.codes += int64_t(rows) * (K / 2) + columns / 2;
}

// Where 16 bytes of a row lie in a stage: rows 2 and 3 modulo 4 have their halves exchanged, so that lanes that read 8
// bytes of four rows meet in no bank.
__device__ __forceinline__ int place_in_stage(int row, int chunk) { return row * 64 + ((chunk ^ (row & 2)) * 16); }

// Starts copying a window to a stage; returns which byte of its word the scale's code is.
template <bool NESTED>
__device__ __forceinline__ uint32_t fetch_window(const Linear4& call, const Position& at, int k_end, char* stage,
                                                 int lane) {
  const int g = lane >> 2, t = lane & 3, K = int(call.weight.K);
  const bool upper = at.column < k_end && at.row < call.N, lower = at.column < k_end && at.row + 8 < call.N;
  copy_async<16>(stage + place_in_stage(g, t), at.codes, upper);
  copy_async<16>(stage + place_in_stage(g, t) + 8 * 64, at.codes + int64_t(8) * (K / 2), lower);
  return fetch_scale<NESTED>(call.weight, at.block64 >> call.block_shift, call.nested_shift, t & 1 ? lower : upper,
                             stage + kCodeBytes + 4 * lane);
}

// What lane 4 g + t needs of a window: of rows g and g + 8, eight bytes in either half.
struct Window {
  uint2 words[2][2];  // [half][row]
};

__device__ __forceinline__ Window read_window(const char* stage, int lane) {
  const int g = lane >> 2, t = lane & 3;
  Window window;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      window.words[half][i] =
          *reinterpret_cast<const uint2*>(stage + place_in_stage(g + 8 * i, 2 * half + (t >> 1)) + 8 * (t & 1));
  return window;
}

// Row 8 group + g of x at the columns of those words; it stays in registers from tile to tile.
template <int GROUPS>
struct WindowOfX {
  uint4 eights[2][2][GROUPS];  // [half][word]
};

template <typename T, int GROUPS>
__device__ __forceinline__ void load_x(WindowOfX<GROUPS>& x, const Linear4& call, int k, int k_end, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int word = 0; word < 2; ++word)
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        const int column = k + 64 * half + 16 * t + 8 * word, m = 8 * group + g;
        const T* from = static_cast<const T*>(call.x) + m * call.ldx + column;
        x.eights[half][word][group] = m < call.M && column < k_end ? *reinterpret_cast<const uint4*>(from) : uint4{};
      }
}

// sums += W x^T over a window. A scale belongs to 64 columns of one row, so products of different blocks must not meet
// before they are scaled.
template <typename T, int GROUPS>
__device__ __forceinline__ void multiply_window(float (&sums)[GROUPS][4], const Window& window,
                                                const WindowOfX<GROUPS>& x, const char* pairs, float scale, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float products[GROUPS][4] = {};
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      uint32_t upper[4], lower[4];
      decode_word(word ? window.words[half][0].y : window.words[half][0].x, pairs, 4 * lane, upper);
      decode_word(word ? window.words[half][1].y : window.words[half][1].x, pairs, 4 * lane, lower);
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        const uint4& eight = x.eights[half][word][group];
        matrix_multiply_add<T>(products[group], upper[0], lower[0], upper[1], lower[1], eight.x, eight.y);
        matrix_multiply_add<T>(products[group], upper[2], lower[2], upper[3], lower[3], eight.z, eight.w);
      }
    }
    // the lanes that hold the scales of this lane's two rows
    const int holder = (lane & ~3) + 2 * half;
    const float scales[2] = {__shfl_sync(~0u, scale, holder), __shfl_sync(~0u, scale, holder + 1)};
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[group][i] = fmaf(products[group][i], scales[i / 2], sums[group][i]);
  }
}

}  // namespace peft_kernels

// The kernels of linear_4bit.cu.
#pragma once

#include "cuda/nf4_decode.cuh"

namespace peft_kernels {

constexpr int kTileRows = 16;            // rows of W that a block multiplies at a time
constexpr int kWarps = 8;                // of a block; they share the tile's columns
constexpr int kWindow = 128;             // columns that a warp multiplies at a time
constexpr int kSlots = 4;                // windows that a warp has in flight: eight 16-byte loads a lane
constexpr int kStep = kWarps * kWindow;  // columns from one slot's window to the next slot's
constexpr int kBatch = kSlots * kStep;   // columns from one window of a slot to its next
constexpr int kZeros = 384;              // bytes of zeros for lanes without a row of x: a window's, and a shift
constexpr int kCodes = 256 * 4;          // bytes of the nested scales' code book

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

// Bytes from one row of x to the next: 16 modulo 128, so that lanes reading several rows meet in no bank.
inline __host__ __device__ int64_t row_bytes(int64_t k) { return 2 * k + 16; }

// Floats of one warp's partial sums; an odd stride between rows keeps their readers apart.
inline __host__ __device__ int partial_stride(int64_t M) { return M <= 4 ? 5 : M <= 8 ? 9 : 17; }

// Zeros, the nested code book, two sets of partial sums, x.
inline __host__ __device__ int64_t shared_bytes(int64_t M, int64_t k) {
  return kZeros + kCodes + 2 * 4 * kWarps * kTileRows * partial_stride(M) + M * row_bytes(k);
}

__device__ __forceinline__ float add_extras(float sum, const Extras& extras, int m, int n) {
  if (extras.bias) sum += load_as_float(extras.bias, n, extras.bias_dtype);
  if (extras.s) {
    float product = 0;
    for (int r = 0; r < extras.rank; ++r)
      product += extras.s[m * extras.rank + r] * load_as_float(extras.b, int64_t(n) * extras.rank + r, extras.b_dtype);
    sum += extras.scaling * product;
  }
  return sum;
}

// x's columns k_begin ... k_end to shared memory, zeros up to k_per_split; and what else lies there.
template <typename T>
__device__ __forceinline__ void stage_x(const Linear4& call, int k_begin, int k_end, char* zeros, float* code2,
                                        char* rows) {
  for (int i = threadIdx.x; i < kZeros / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(zeros)[i] = 0;
  for (int i = threadIdx.x; call.weight.absmax2 && i < 256; i += blockDim.x) code2[i] = call.weight.code2[i];
  const int vectors = call.k_per_split / 8;
  for (int i = threadIdx.x; i < call.M * vectors; i += blockDim.x) {
    const int m = i / vectors, k = k_begin + i % vectors * 8;
    const T* from = static_cast<const T*>(call.x) + m * call.ldx + k;
    const uint4 eight = k < k_end ? *reinterpret_cast<const uint4*>(from) : uint4{};
    *reinterpret_cast<uint4*>(rows + m * row_bytes(call.k_per_split) + 2 * (k - k_begin)) = eight;
  }
}

// A tile of y, or of the split's plane, from the warps' sums.
template <typename T>
__device__ __forceinline__ void write_tile(const Linear4& call, int tile, const float* partials) {
  const int stride = partial_stride(call.M);
  if (call.extras.s) wait_for_previous_kernel();
  for (int i = threadIdx.x; i < kTileRows * call.M; i += blockDim.x) {
    const int row = i % kTileRows, m = i / kTileRows, n = tile * kTileRows + row;
    if (n >= call.N) continue;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += partials[(warp * kTileRows + row) * stride + m];
    sum *= call.table.unit;
    if (call.planes) {
      call.planes[(int64_t(blockIdx.y) * call.M + m) * call.N + n] = sum;
    } else {
      static_cast<T*>(call.y)[int64_t(m) * call.N + n] = from_float<T>(add_extras(sum, call.extras, m, n));
    }
  }
}

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
template <typename T, int SPAN, int GROUPS>
__device__ __forceinline__ void multiply_window(float (&sums)[GROUPS][4], const Window<SPAN>& window,
                                                const DecodeTable& table, const char* const (&x)[GROUPS], float scale,
                                                int lane) {
#pragma unroll
  for (int span = 0; span < kWindow / SPAN; ++span) {
    float products[GROUPS][4] = {};
#pragma unroll
    for (int word = 0; word < SPAN / 32; ++word) {
      uint32_t upper[4], lower[4];
      decode_word(window.words[span][0][word], table, upper);
      decode_word(window.words[span][1][word], table, lower);
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

// Each block keeps its part of K of x and goes through tiles of 16 rows of W; its warps share a tile's columns and add
// up their sums in shared memory, in a fixed order. A slot's next window is loaded as soon as its last is multiplied,
// also from tile to tile, so that memory never waits.
template <typename T, int SPAN, int GROUPS, bool NESTED>
__global__ void __launch_bounds__(kWarps* kWarp, GROUPS == 1 ? 2 : 1) linear_4bit_kernel(const Linear4 call) {
  extern __shared__ __align__(16) char shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane >> 2, t = lane & 3;
  const int tiles = (call.N + kTileRows - 1) / kTileRows, stride = partial_stride(call.M);
  const int k_begin = blockIdx.y * call.k_per_split, k_end = min(int(call.weight.K), k_begin + call.k_per_split);
  const int k_first = k_begin + warp * kWindow;
  float* const code2 = reinterpret_cast<float*>(shared + kZeros);
  float* const partials = code2 + kCodes / 4;
  char* const rows = reinterpret_cast<char*>(partials + 2 * kWarps * kTileRows * stride);

  int tile = blockIdx.x;
  Window<SPAN> windows[kSlots] = {};
  Source from = source<SPAN>(call, tile, k_first, g, t);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    load_window<SPAN, NESTED>(windows[slot], call, from, slot, k_end - k_first, t);
  stage_x<T>(call, k_begin, k_end, shared, code2, rows);
  const float offset = NESTED ? *call.weight.offset : 0.0f;
  __syncthreads();

  // Lanes without a row of x read zeros, from banks that the lanes beside them leave free.
  const char* x_rows[GROUPS];
  int x_step[GROUPS];
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const int m = SPAN == 128 ? g & 3 : 8 * group + g;
    const bool own = m < call.M && (SPAN == 64 || g >> 2 == t >> 1);
    const char* zeros = shared + (SPAN == 64 ? 16 : m & 2 ? 0 : 32);
    x_rows[group] = own ? rows + m * row_bytes(call.k_per_split) + (k_first - k_begin) * 2 + t * (SPAN / 2) : zeros;
    x_step[group] = own ? kStep * 2 : 0;
  }

  for (int set = 0; tile < tiles; tile += gridDim.x, set ^= 1) {
    float sums[GROUPS][4] = {};
    const char* x[GROUPS];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) x[group] = x_rows[group];
    for (int k = k_first; k < k_end; k += kBatch) {
      const int next_k = k + kBatch < k_end ? k + kBatch : k_first, next_tile = next_k > k ? tile : tile + gridDim.x;
      const int columns = next_tile < tiles ? k_end - next_k : 0;
      from = source<SPAN>(call, next_tile, next_k, g, t);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (k + slot * kStep < k_end) {
          const float scale = scale_value<NESTED>(windows[slot].scale, code2, offset);
          multiply_window<T, SPAN, GROUPS>(sums, windows[slot], call.table, x, scale, lane);
        }
        load_window<SPAN, NESTED>(windows[slot], call, from, slot, columns, t);
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) x[group] += x_step[group];
      }
    }
    float* const partial = partials + (set * kWarps + warp) * kTileRows * stride;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float other = SPAN == 128 ? __shfl_xor_sync(~0u, sums[group][i], 2) : 0.0f;
        const int m = SPAN == 128 ? 2 * (t & 1) + i % 2 : 8 * group + 2 * t + i % 2;
        if (SPAN == 64 || t < 2) partial[(g + 8 * (i / 2)) * stride + m] = sums[group][i] + other;
      }
    }
    __syncthreads();  // one for a tile: the other set is read until the next
    write_tile<T>(call, tile, partials + set * kWarps * kTileRows * stride);
  }
}

// y from the float32 planes, in their order.
template <typename T>
__global__ void __launch_bounds__(256) sum_planes_kernel(const Linear4 call, int splits) {
  const int64_t outputs = int64_t(call.M) * call.N, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= outputs) return;
  float sum = 0;
  for (int split = 0; split < splits; ++split) sum += call.planes[split * outputs + i];
  static_cast<T*>(call.y)[i] = from_float<T>(add_extras(sum, call.extras, int(i / call.N), int(i % call.N)));
}

}  // namespace peft_kernels

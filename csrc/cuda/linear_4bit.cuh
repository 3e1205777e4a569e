// The kernels of linear_4bit.cu.
#pragma once

#include "cuda/linear_4bit_window.cuh"

namespace peft_kernels {

constexpr int kZeros = 384;      // bytes of zeros for lanes without a row of x: a window's, and a shift
constexpr int kCodes = 256 * 4;  // bytes of the nested scales' code book

// Blocks that registers leave room for on a multiprocessor: more than 8 rows need more than 128 a thread.
constexpr __host__ __device__ int most_resident(int64_t M) { return M <= 8 ? 2 : 1; }

// Bytes from one row of x to the next: 16 modulo 128, so that lanes reading several rows meet in no bank.
inline __host__ __device__ int64_t row_bytes(int64_t k) { return 2 * k + 16; }

// Floats of one warp's partial sums; an odd stride between rows keeps their readers apart.
inline __host__ __device__ int partial_stride(int64_t M) { return M <= 4 ? 5 : M <= 8 ? 9 : 17; }

// The table of pairs if there is one, zeros, the nested code book, two sets of partial sums, x.
inline __host__ __device__ int64_t shared_bytes(int64_t M, int64_t k, bool table) {
  return (table ? kPairs : 0) + kZeros + kCodes + 2 * 4 * kWarps * kTileRows * partial_stride(M) + M * row_bytes(k);
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

// Each block keeps its part of K of x and goes through tiles of 16 rows of W; its warps share a tile's columns and add
// up their sums in shared memory, in a fixed order. A slot's next window is loaded as soon as its last is multiplied,
// also from tile to tile, so that memory never waits.
template <typename T, int SPAN, int GROUPS, bool NESTED, bool TABLE>
__global__ void __launch_bounds__(kWarps* kWarp, GROUPS == 1 ? 2 : 1) linear_4bit_kernel(const Linear4 call) {
  extern __shared__ __align__(16) char shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane >> 2, t = lane & 3;
  const int tiles = (call.N + kTileRows - 1) / kTileRows, stride = partial_stride(call.M);
  const int k_begin = blockIdx.y * call.k_per_split, k_end = min(int(call.weight.K), k_begin + call.k_per_split);
  const int k_first = k_begin + warp * kWindow;
  char* const zeros = shared + (TABLE ? kPairs : 0);
  float* const code2 = reinterpret_cast<float*>(zeros + kZeros);
  float* const partials = code2 + kCodes / 4;
  char* const rows = reinterpret_cast<char*>(partials + 2 * kWarps * kTileRows * stride);

  int tile = blockIdx.x;
  Window<SPAN> windows[kSlots] = {};
  Source from = source<SPAN>(call, tile, k_first, g, t);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    load_window<SPAN, NESTED>(windows[slot], call, from, slot, k_end - k_first, t);
  if constexpr (TABLE) fill_pairs(call.table, shared);
  stage_x<T>(call, k_begin, k_end, zeros, code2, rows);
  const float offset = NESTED ? *call.weight.offset : 0.0f;
  __syncthreads();

  // Lanes without a row of x read zeros, from banks that the lanes beside them leave free.
  const char* x_rows[GROUPS];
  int x_step[GROUPS];
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const int m = SPAN == 128 ? g & 3 : 8 * group + g;
    const bool own = m < call.M && (SPAN == 64 || g >> 2 == t >> 1);
    const int free = SPAN == 64 ? 16 : m & 2 ? 0 : 32;
    x_rows[group] =
        own ? rows + m * row_bytes(call.k_per_split) + (k_first - k_begin) * 2 + t * (SPAN / 2) : zeros + free;
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
          multiply_window<T, SPAN, GROUPS, TABLE>(sums, windows[slot], call.table, shared, x, scale, lane);
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

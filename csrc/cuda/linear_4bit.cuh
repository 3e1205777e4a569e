// The kernels of linear_4bit.cu.
#pragma once

#include "cuda/linear_4bit_window.cuh"

namespace peft_kernels {

constexpr int kCodes = 260 * 4;  // bytes of the nested scales' code book, their offset and three words to align

// Floats of one row of W in one warp's partial sums; an odd number keeps their readers apart.
constexpr __host__ __device__ int partial_stride(int groups) { return 8 * groups + 1; }

// The table of pairs, what nested scales need, two sets of partial sums, the warps' stages.
constexpr __host__ __device__ int shared_bytes(int groups) {
  return kPairs + kCodes + 2 * 4 * kWarps * kTileRows * partial_stride(groups) + kWarps * kStages * kStageBytes;
}

// The product of two rows of `rank` elements.
template <typename B>
__device__ __forceinline__ float dot(const float* s, const B* b, int rank) {
  float sum = 0;
  int r = 0;
  if (rank % 8 == 0 && (reinterpret_cast<uintptr_t>(s) | reinterpret_cast<uintptr_t>(b)) % 16 == 0) {
#pragma unroll 1
    for (; r < rank; r += 8) {
      float left[8], right[8];
      load_eight<float>(s, r, left);
      load_eight<B>(b, r, right);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(left[i], right[i], sum);
    }
  }
  for (; r < rank; ++r) sum = fmaf(s[r], to_float(b[r]), sum);
  return sum;
}

__device__ __forceinline__ float add_extras(float sum, const Extras& extras, int m, int n) {
  if (extras.bias) sum += load_as_float(extras.bias, n, extras.bias_dtype);
  if (extras.s) {
    const float* s = extras.s + int64_t(m) * extras.rank;
    const auto times = [&](auto* b) { return dot(s, b + int64_t(n) * extras.rank, extras.rank); };
    const float product = extras.b_dtype == DType::F32   ? times(static_cast<const float*>(extras.b))
                          : extras.b_dtype == DType::F16 ? times(static_cast<const __half*>(extras.b))
                                                         : times(static_cast<const __nv_bfloat16*>(extras.b));
    sum += extras.scaling * product;
  }
  return sum;
}

// Asks for a tile's rows of B, which its last threads would otherwise wait for.
__device__ __forceinline__ void prefetch_extras(const Linear4& call, int tile) {
  const int n = tile * kTileRows + int(threadIdx.x);
  if (!call.extras.s || call.planes || threadIdx.x >= kTileRows || n >= call.N) return;
  const int64_t row = int64_t(call.extras.rank) * (call.extras.b_dtype == DType::F32 ? 4 : 2);
  const char* from = static_cast<const char*>(call.extras.b) + n * row;
#pragma unroll 1
  for (int64_t i = 0; i < row; i += 128) prefetch(from + i);
}

// A tile of y, or of the split's plane, from the warps' sums.
template <typename T>
__device__ __forceinline__ void write_tile(const Linear4& call, int tile, const float* partials, int stride) {
  if (call.extras.s) wait_for_previous_kernel();
  for (int i = threadIdx.x; i < kTileRows * call.M; i += blockDim.x) {
    const int row = i % kTileRows, m = i / kTileRows, n = tile * kTileRows + row;
    if (n >= call.N) continue;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += partials[(warp * kTileRows + row) * stride + m];
    sum *= call.table.unit;
    if (call.planes) {
      call.planes[(int64_t(blockIdx.y) * call.M + m) * call.N + n] = sum;
    } else {
      static_cast<T*>(call.y)[int64_t(m) * call.N + n] = from_float<T>(add_extras(sum, call.extras, m, n));
    }
  }
}

// Each block keeps its part of K of x in registers and goes through tiles of 16 rows of W; its warps share a tile's
// columns and add up their sums in shared memory, in a fixed order. A stage is filled again as soon as it is read, also
// from tile to tile, so that memory never waits.
template <typename T, int GROUPS, bool NESTED>
__global__ void __launch_bounds__(kWarps* kWarp, 1) linear_4bit_kernel(const Linear4 call) {
  extern __shared__ __align__(16) char shared[];
  constexpr int stride = partial_stride(GROUPS);
  // by a shuffle the compiler knows that a warp has it in common
  const int warp = __shfl_sync(~0u, int(threadIdx.x / kWarp), 0), lane = threadIdx.x % kWarp, g = lane >> 2,
            t = lane & 3;
  const int tiles = (call.N + kTileRows - 1) / kTileRows;
  const int k_begin = blockIdx.y * call.k_per_split, k_end = min(int(call.weight.K), k_begin + call.k_per_split);
  const int k_first = k_begin + warp * kWindow;
  float* const code2 = reinterpret_cast<float*>(shared + kPairs);
  float* const partials = code2 + kCodes / 4;
  char* const stages =
      reinterpret_cast<char*>(partials + 2 * kWarps * kTileRows * stride) + warp * kStages * kStageBytes;
  let_next_kernel_start();

  Position ahead = first_position(call, blockIdx.x, k_first, lane);
  uint32_t bytes = 0;  // what `fetch_window` answered for each stage, two bits each
  const auto fetch = [&](char* stage) {
    bytes = bytes << 2 | fetch_window<NESTED>(call, ahead, k_end, stage, lane);
    end_of_copies();
    advance(ahead, call);
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) fetch(stages + stage * kStageBytes);
  WindowOfX<GROUPS> x[most_windows(GROUPS)];
#pragma unroll
  for (int window = 0; window < most_windows(GROUPS); ++window)
    if (window < call.windows) load_x<T>(x[window], call, k_first + window * kStep, k_end, lane);
  fill_pairs(call.table, shared);
  for (int i = threadIdx.x; NESTED && i < 257; i += blockDim.x)
    code2[i] = i < 256 ? call.weight.code2[i] : *call.weight.offset;
  __syncthreads();

  int stage = 0;
  for (int tile = blockIdx.x, set = 0; tile < tiles; tile += gridDim.x, set ^= 1) {
    prefetch_extras(call, tile);
    float sums[GROUPS][4] = {};
#pragma unroll
    for (int window = 0; window < most_windows(GROUPS); ++window) {
      if (window >= call.windows) break;
      char* const from = stages + stage * kStageBytes;
      wait_for_copies<kStages - 1>();
      __syncwarp();
      const Window codes = read_window(from, lane);
      const float scale = scale_value<NESTED>(from + kCodeBytes + 4 * lane, bytes >> 2 * (kStages - 1) & 3, code2);
      __syncwarp();
      fetch(from);
      stage = stage + 1 < kStages ? stage + 1 : 0;
      multiply_window<T>(sums, codes, x[window], shared, scale, lane);
    }
    float* const partial = partials + (set * kWarps + warp) * kTileRows * stride;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[(g + 8 * (i / 2)) * stride + 8 * group + 2 * t + i % 2] = sums[group][i];
    __syncthreads();  // one for a tile: the other set is read until the next
    write_tile<T>(call, tile, partials + set * kWarps * kTileRows * stride, stride);
  }
}

// y from the float32 planes, in their order.
template <typename T>
__global__ void __launch_bounds__(256) sum_planes_kernel(const Linear4 call, int splits) {
  wait_for_previous_kernel();
  const int64_t outputs = int64_t(call.M) * call.N, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= outputs) return;
  float sum = 0;
  for (int split = 0; split < splits; ++split) sum += call.planes[split * outputs + i];
  static_cast<T*>(call.y)[i] = from_float<T>(add_extras(sum, call.extras, int(i / call.N), int(i % call.N)));
}

}  // namespace peft_kernels

// S = x A^T for a few rows of x, on the way to linear_4bit_kernel, which starts beside it and reads S last.
#include "cuda/common.cuh"
#include "cuda/linear_4bit.h"
#include "cuda/ptx.cuh"

namespace peft_kernels {

// Eight columns a thread: K = 4096 in one go, because the kernel beside this one soon waits for it.
constexpr int kShrinkThreads = 512;
constexpr int kRowsAtOnce = 4;  // rows of x that are waited for together

template <typename T>
__device__ __forceinline__ void load_eight(const void* from, int64_t i, float (&values)[8]) {
  const uint4 loaded = *reinterpret_cast<const uint4*>(static_cast<const T*>(from) + i);
  const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = half_of_pair<T>(pairs[j / 2], j % 2);
}

template <>
__device__ __forceinline__ void load_eight<float>(const void* from, int64_t i, float (&values)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const uint4 loaded = *reinterpret_cast<const uint4*>(static_cast<const float*>(from) + i + j);
    values[j] = __uint_as_float(loaded.x), values[j + 1] = __uint_as_float(loaded.y);
    values[j + 2] = __uint_as_float(loaded.z), values[j + 3] = __uint_as_float(loaded.w);
  }
}

// Block r: column r of S.
template <typename T, typename A>
__global__ void __launch_bounds__(kShrinkThreads)
    lora_shrink_kernel(const T* x, int M, int64_t K, int64_t ldx, const A* a, int rank, float* s) {
  let_next_kernel_start();
  __shared__ float partials[kShrinkThreads / kWarp][kMostRows];
  const int r = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sums[kMostRows] = {};
  for (int64_t k = 8 * threadIdx.x; k < K; k += 8 * kShrinkThreads) {
    float right[8];
    load_eight<A>(a, r * K + k, right);
#pragma unroll
    for (int m0 = 0; m0 < kMostRows; m0 += kRowsAtOnce) {
      if (m0 >= M) break;
      float left[kRowsAtOnce][8];  // rows past M are the last one again; their sums go nowhere
#pragma unroll
      for (int m = 0; m < kRowsAtOnce; ++m) load_eight<T>(x, min(m0 + m, M - 1) * ldx + k, left[m]);
#pragma unroll
      for (int m = 0; m < kRowsAtOnce; ++m)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[m0 + m] = fmaf(left[m][j], right[j], sums[m0 + m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kMostRows; ++m) {
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], other);
    if (lane == 0) partials[warp][m] = sums[m];
  }
  __syncthreads();
  const int m = threadIdx.x;
  if (m >= M) return;
  float sum = 0;
  for (int w = 0; w < kShrinkThreads / kWarp; ++w) sum += partials[w][m];
  s[m * rank + r] = sum;
}

namespace {

template <typename T>
void run(uintptr_t stream, const void* x, int M, int64_t K, int64_t ldx, const void* a, DType a_dtype, int rank,
         float* s) {
  const auto start = [=](auto kernel, auto* a) {
    launch(kernel, dim3(unsigned(rank)), kShrinkThreads, 0, stream, false, static_cast<const T*>(x), M, K, ldx, a, rank,
           s);
  };
  if (a_dtype == DType::F32) start(lora_shrink_kernel<T, float>, static_cast<const float*>(a));
  if (a_dtype == DType::F16) start(lora_shrink_kernel<T, __half>, static_cast<const __half*>(a));
  if (a_dtype == DType::BF16) start(lora_shrink_kernel<T, __nv_bfloat16>, static_cast<const __nv_bfloat16*>(a));
}

}  // namespace

void lora_shrink_decode(int device, uintptr_t stream, const void* x, DType dtype, int64_t M, int64_t K, int64_t ldx,
                        const void* a, DType a_dtype, int64_t rank, float* s) {
  if (!(x && a && s && M >= 1 && M <= kMostRows && K >= 1 && ldx >= K && rank >= 1 && rank <= INT32_MAX))
    throw std::invalid_argument("lora_shrink_decode: a pointer is null or a size out of range");
  if (K % 8 || ldx % 8 || (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(a)) % 16)
    throw std::invalid_argument("lora_shrink_decode: the rows of x and a must start at multiples of 16 bytes");
  if (dtype != DType::F16 && dtype != DType::BF16)
    throw std::invalid_argument("lora_shrink_decode: x must be float16 or bfloat16");
  const DeviceGuard guard(device);
  const auto run_as = dtype == DType::F16 ? run<__half> : run<__nv_bfloat16>;
  run_as(stream, x, int(M), K, ldx, a, a_dtype, int(rank), s);
}

}  // namespace peft_kernels

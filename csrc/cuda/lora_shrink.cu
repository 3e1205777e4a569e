// S = x A^T for a few rows of x, on the way to linear_4bit_kernel, which starts beside it and reads S last.
#include "cuda/common.cuh"
#include "cuda/linear_4bit.h"
#include "cuda/ptx.cuh"

namespace peft_kernels {

constexpr int kShrinkThreads = 256;

// Block r: column r of S. The rows of x beyond the first come from the L1 cache.
template <typename T>
__global__ void __launch_bounds__(kShrinkThreads)
    lora_shrink_kernel(const T* x, int M, int64_t K, int64_t ldx, const void* a, DType a_dtype, int rank, float* s) {
  let_next_kernel_start();
  __shared__ float partials[kShrinkThreads / kWarp][kMostRows];
  const int r = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sums[kMostRows] = {};
  for (int64_t k = threadIdx.x; k < K; k += kShrinkThreads) {
    const float value = load_as_float(a, r * K + k, a_dtype);
#pragma unroll
    for (int m = 0; m < kMostRows; ++m)
      if (m < M) sums[m] = fmaf(to_float(x[m * ldx + k]), value, sums[m]);
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

void lora_shrink_decode(int device, uintptr_t stream, const void* x, DType dtype, int64_t M, int64_t K, int64_t ldx,
                        const void* a, DType a_dtype, int64_t rank, float* s) {
  if (!(x && a && s && M >= 1 && M <= kMostRows && K >= 1 && ldx >= K && rank >= 1 && rank <= INT32_MAX))
    throw std::invalid_argument("lora_shrink_decode: a pointer is null or a size out of range");
  const DeviceGuard guard(device);
  const dim3 grid = dim3(unsigned(rank));
  if (dtype == DType::F16) {
    launch(lora_shrink_kernel<__half>, grid, kShrinkThreads, 0, stream, false, static_cast<const __half*>(x), int(M), K,
           ldx, a, a_dtype, int(rank), s);
  } else if (dtype == DType::BF16) {
    launch(lora_shrink_kernel<__nv_bfloat16>, grid, kShrinkThreads, 0, stream, false,
           static_cast<const __nv_bfloat16*>(x), int(M), K, ldx, a, a_dtype, int(rank), s);
  } else {
    throw std::invalid_argument("lora_shrink_decode: x must be float16 or bfloat16");
  }
}

}  // namespace peft_kernels

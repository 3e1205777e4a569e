// S = x A^T for a few rows of x, on the way to linear_4bit_kernel, which starts beside it and reads S last.
#include "cuda/common.cuh"
#include "cuda/linear_4bit.h"
#include "cuda/ptx.cuh"

namespace peft_kernels {

// Eight columns a thread: K = 4096 in one go, because the kernel beside this one soon waits for it.
constexpr int kShrinkThreads = 512;
constexpr int kShrinkRows = 4;  // rows of x that a block multiplies

// Block (r, i): column r of S, its rows from kShrinkRows * i on. While a block is resident, the next kernel's cannot be
// beside it, so there are many short ones.
template <typename T, typename A>
__global__ void __launch_bounds__(kShrinkThreads)
    lora_shrink_kernel(const T* x, int M, int64_t K, int64_t ldx, const A* a, int rank, float* s) {
  let_next_kernel_start();
  __shared__ float partials[kShrinkThreads / kWarp][kShrinkRows];
  const int r = blockIdx.x, m0 = kShrinkRows * blockIdx.y, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sums[kShrinkRows] = {};
  for (int64_t k = 8 * threadIdx.x; k < K; k += 8 * kShrinkThreads) {
    float right[8], left[kShrinkRows][8];  // rows past M are the last one again; their sums go nowhere
    load_eight<A>(a, r * K + k, right);
#pragma unroll
    for (int m = 0; m < kShrinkRows; ++m) load_eight<T>(x, min(m0 + m, M - 1) * ldx + k, left[m]);
#pragma unroll
    for (int m = 0; m < kShrinkRows; ++m)
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[m] = fmaf(left[m][j], right[j], sums[m]);
  }
#pragma unroll
  for (int m = 0; m < kShrinkRows; ++m) {
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], other);
    if (lane == 0) partials[warp][m] = sums[m];
  }
  __syncthreads();
  const int m = threadIdx.x;
  if (m >= kShrinkRows || m0 + m >= M) return;
  float sum = 0;
  for (int w = 0; w < kShrinkThreads / kWarp; ++w) sum += partials[w][m];
  s[(m0 + m) * rank + r] = sum;
}

namespace {

template <typename T>
void run(uintptr_t stream, const void* x, int M, int64_t K, int64_t ldx, const void* a, DType a_dtype, int rank,
         float* s) {
  const auto start = [=](auto kernel, auto* a) {
    const dim3 grid(unsigned(rank), unsigned((M + kShrinkRows - 1) / kShrinkRows));
    launch(kernel, grid, kShrinkThreads, 0, stream, false, static_cast<const T*>(x), M, K, ldx, a, rank, s);
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

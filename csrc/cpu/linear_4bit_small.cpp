// y = x W' for few rows in float32 arithmetic: preparation of x, and the scalar kernel.
#include "cpu/isa.h"
#include "cpu/linear_4bit_finish.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

constexpr int64_t kLanes = kLinear4Lanes;
constexpr int64_t kPartials = 16;  // independent sums: exact enough, and the compiler may vectorize

void prepare_row(const void* in, int64_t first, DType dtype, int64_t K, const int (&order)[64], float* out) {
  for (int64_t k = 0; k < K; k += 64)
    for (int64_t i = 0; i < 64; ++i) out[k + i] = load_f32(in, first + k + order[i], dtype);
}

float round_to(float value, DType dtype) {
  if (dtype == DType::BF16) return bf16_to_f32(f32_to_bf16(value));
  return dtype == DType::F16 ? f16_to_f32(f32_to_f16(value)) : value;
}

void small_scalar(const Linear4Job& job, const float* x, int64_t n0, int64_t n1) {
  const Weight4& w = *job.weight;
  float* sums = static_cast<float*>(linear4_scratch(Linear4Scratch::Sums, size_t(job.M * kLanes) * sizeof(float)));
  for (int64_t n = n0; n < n1; ++n) {
    float partial[kLinear4SmallRows][kPartials] = {};
    for (int64_t k = 0; k < w.K; k += 64) {
      const float scale = w.scale((n * w.K + k) / w.blocksize);
      float table[16], decoded[64];
      for (int i = 0; i < 16; ++i) table[i] = round_to(w.book().code[i] * scale, job.dtype);
      const uint8_t* packed = w.packed + (n * w.K + k) / 2;
      for (int64_t i = 0; i < 32; ++i) {
        decoded[2 * i] = table[packed[i] >> 4];
        decoded[2 * i + 1] = table[packed[i] & 15];
      }
      for (int64_t m = 0; m < job.M; ++m)
        for (int64_t i = 0; i < 64; ++i) partial[m][i % kPartials] += decoded[i] * x[m * w.K + k + i];
    }
    for (int64_t m = 0; m < job.M; ++m) {
      float sum = 0;
      for (float part : partial[m]) sum += part;
      sums[m * kLanes + n - n0] = sum;
    }
  }
  finish(job, {sums, 0, n0, n1 - n0, pack_terms(job, n0, w.N, true)}, job.M);
}

const Linear4SmallKernel kSmallScalar = {small_scalar, [](int position) { return position; }};

const Linear4SmallKernel& small_kernel(DType dtype) {
#if defined(__x86_64__)
  if (isa() >= Isa::Avx512) return kLinear4SmallAvx512[int(dtype)];
  if (isa() == Isa::Avx2) return kLinear4SmallAvx2[int(dtype)];
#endif
  (void)dtype;
  return kSmallScalar;
}

}  // namespace

void linear4_small_forward(const Linear4Job& job, int threads) {
  const Weight4& w = *job.weight;
  const Linear4SmallKernel& kernel = small_kernel(job.dtype);
  int order[64];
  for (int i = 0; i < 64; ++i) order[i] = kernel.element(i);
  float* x = static_cast<float*>(linear4_scratch(Linear4Scratch::Input, size_t(job.M * w.K) * sizeof(float)));
  for (int64_t m = 0; m < job.M; ++m) prepare_row(job.in, m * job.ld_in, job.dtype, w.K, order, x + m * w.K);
  const int64_t items = (w.N + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) kernel.run(job, x, item * kLanes, min64(w.N, (item + 1) * kLanes));
}

}  // namespace peft_kernels

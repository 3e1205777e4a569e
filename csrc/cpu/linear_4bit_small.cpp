// y = x W' for few rows in float32 arithmetic: preparation of x, the scalar kernel and the epilogue.
#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/linear_4bit_kernels.h"
#include "cpu/nf4_kernels.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

constexpr int64_t kLanes = kLinear4SmallLanes;
constexpr int64_t kPartials = 8;  // independent sums, so that the compiler may vectorize

void prepare_row(const void* in, int64_t first, DType dtype, int64_t K, const int (&order)[64], float* out) {
  for (int64_t k = 0; k < K; k += 64)
    for (int64_t i = 0; i < 64; ++i) out[k + i] = load_f32(in, first + k + order[i], dtype);
}

float round_to(float value, DType dtype) {
  if (dtype == DType::BF16) return bf16_to_f32(f32_to_bf16(value));
  return dtype == DType::F16 ? f16_to_f32(f32_to_f16(value)) : value;
}

void small_scalar(const Linear4SmallTile& tile, int64_t n0, int64_t n1, float* sums) {
  const Weight4& w = *tile.weight;
  const int64_t blocks = w.K / w.blocksize;
  fill_scales(w, n0 * blocks, (n1 - n0) * blocks, tile.scales);
  for (int64_t n = n0; n < n1; ++n) {
    float partial[kLinear4SmallRows][kPartials] = {};
    for (int64_t k = 0; k < w.K; k += 64) {
      const float scale = tile.scales[(n - n0) * blocks + k / w.blocksize];
      float table[16], decoded[64];
      for (int i = 0; i < 16; ++i) table[i] = round_to(w.book().code[i] * scale, tile.dtype);
      const uint8_t* packed = w.packed + (n * w.K + k) / 2;
      for (int64_t s = 0; s < 8; ++s)
        for (int64_t j = 0; j < 8; ++j) decoded[8 * s + j] = table[packed[4 * j + s / 2] >> s % 2 * 4 & 15];
      for (int64_t m = 0; m < tile.M; ++m)
        for (int64_t s = 0; s < 8; ++s)
          for (int64_t j = 0; j < 8; ++j) partial[m][j] += decoded[8 * s + j] * tile.x[m * w.K + k + 8 * s + j];
    }
    for (int64_t m = 0; m < tile.M; ++m) {
      float sum = 0;
      for (float part : partial[m]) sum += part;
      sums[m * kLanes + n - n0] = sum;
    }
  }
}

const Linear4SmallKernel kSmallScalar = {small_scalar,
                                         [](int position) { return 8 * (position % 8) + (position / 8 ^ 1); }};

const Linear4SmallKernel& small_kernel(DType dtype) {
#if defined(__x86_64__)
  if (isa() >= Isa::Avx512) return kLinear4SmallAvx512[int(dtype)];
  if (isa() == Isa::Avx2) return kLinear4SmallAvx2[int(dtype)];
#endif
  (void)dtype;
  return kSmallScalar;
}

// Left operands of the terms with ranks padded to kPartials by zeros: [M][sum of padded ranks].
struct PaddedTerms {
  int64_t width = 0;
  std::vector<float> left;

  static int64_t padded(int64_t r) { return (r + kPartials - 1) / kPartials * kPartials; }

  explicit PaddedTerms(const Linear4Job& job) {
    for (int64_t t = 0; t < job.term_count; ++t) width += padded(job.terms[t].r);
    left.assign(size_t(job.M * width), 0.0f);
    for (int64_t m = 0; m < job.M; ++m) {
      float* to = left.data() + m * width;
      for (int64_t t = 0; t < job.term_count; to += padded(job.terms[t++].r))
        std::copy_n(job.terms[t].left + m * job.terms[t].ld, job.terms[t].r, to);
    }
  }
};

void finish(const Linear4Job& job, const PaddedTerms& terms, int64_t n0, int64_t n1, const float* sums, float* right) {
  for (int64_t n = n0; n < n1; ++n) {
    float* to = right;
    for (int64_t t = 0; t < job.term_count; ++t) {
      const Linear4Term& term = job.terms[t];
      for (int64_t j = 0; j < term.r; ++j) to[j] = term.scaling * load_f32(term.right, n * term.r + j, term.dtype);
      std::fill(to + term.r, to + PaddedTerms::padded(term.r), 0.0f);
      to += PaddedTerms::padded(term.r);
    }
    const float bias = job.bias ? load_f32(job.bias, n, job.bias_dtype) : 0.0f;
    for (int64_t m = 0; m < job.M; ++m) {
      float partial[kPartials] = {};
      const float* left = terms.left.data() + m * terms.width;
      for (int64_t j = 0; j < terms.width; j += kPartials)
        for (int64_t i = 0; i < kPartials; ++i) partial[i] += left[j + i] * right[j + i];
      float delta = 0;
      for (float part : partial) delta += part;
      const float value = sums[m * kLanes + n - n0] + bias + delta;
      if (job.unscaled) store_f32(job.unscaled, m * job.ld_out + n, job.dtype, value);
      store_f32(job.out, m * job.ld_out + n, job.dtype, job.out_scale ? value * job.out_scale[n] : value);
    }
  }
}

}  // namespace

void linear4_small_forward(const Linear4Job& job, int threads) {
  const Weight4& w = *job.weight;
  const Linear4SmallKernel& kernel = small_kernel(job.dtype);
  int order[64];
  for (int i = 0; i < 64; ++i) order[i] = kernel.element(i);
  float* x = static_cast<float*>(linear4_scratch(Linear4Scratch::Input, size_t(job.M * w.K) * sizeof(float)));
  for (int64_t m = 0; m < job.M; ++m) prepare_row(job.in, m * job.ld_in, job.dtype, w.K, order, x + m * w.K);
  const PaddedTerms terms(job);
  const int64_t items = (w.N + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t n0 = item * kLanes, n1 = std::min(w.N, n0 + kLanes);
    const size_t blocks = size_t((n1 - n0) * (w.K / w.blocksize));
    float* scales = static_cast<float*>(linear4_scratch(Linear4Scratch::Scales, blocks * sizeof(float)));
    float* sums =
        static_cast<float*>(linear4_scratch(Linear4Scratch::Sums, size_t(kLinear4SmallRows * kLanes) * sizeof(float)));
    float* right = static_cast<float*>(linear4_scratch(Linear4Scratch::Terms, size_t(terms.width + 1) * sizeof(float)));
    kernel.run({x, job.M, &w, job.dtype, scales}, n0, n1, sums);
    finish(job, terms, n0, n1, sums, right);
  }
}

}  // namespace peft_kernels

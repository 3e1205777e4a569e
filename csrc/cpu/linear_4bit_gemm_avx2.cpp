#include "cpu/linear_4bit_decode_avx2.h"
#include "cpu/linear_4bit_gemm_f32.h"

namespace peft_kernels {
namespace {

inline void transpose8(__m256 (&v)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    v[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    v[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    v[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    v[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 low = _mm256_permute2f128_ps(v[i], v[4 + i], 0x20);
    v[4 + i] = _mm256_permute2f128_ps(v[i], v[4 + i], 0x31);
    v[i] = low;
  }
}

template <typename Decode>
struct PanelAvx2 : Decode {
  using Decode::Decode;
  using Values = __m256;
  static constexpr int kWidth = 8;

  static void transpose(Values (&v)[kWidth]) { transpose8(v); }
  static void store(float* to, Values v) { _mm256_store_ps(to, v); }
};

using Nibbles = PanelAvx2<NibblesAvx2>;
using Words = PanelAvx2<WordsAvx2>;

void backward_panel(const Linear4Job& job, int64_t lane0, int64_t m0, int64_t m1) {
  if (job.dtype == DType::BF16) return run_panel<Words, /*forward=*/false>(job, lane0, m0, m1);
  run_panel<Nibbles, /*forward=*/false>(job, lane0, m0, m1);
}

}  // namespace

const Linear4F32Kernels kLinear4F32Avx2 = {run_panel<Nibbles, /*forward=*/true>, backward_panel, widen_row};

}  // namespace peft_kernels

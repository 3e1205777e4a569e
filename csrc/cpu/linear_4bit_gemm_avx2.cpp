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

struct DecodeAvx2 {
  using Table = peft_kernels::Table;
  using Values = __m256;
  static constexpr int kWidth = 8;

  static Table table(const Weight4& w, float scale, DType dtype) { return rounded_table(w.book().code, scale, dtype); }
  static Values decode(const Table& table, const uint8_t* packed, int t) { return decode8(table, packed, t); }
  static void transpose(Values (&v)[kWidth]) { transpose8(v); }
  static void store(float* to, Values v) { _mm256_store_ps(to, v); }
};

}  // namespace

const Linear4F32Kernels kLinear4F32Avx2 = f32_kernels<DecodeAvx2>();

}  // namespace peft_kernels

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
  static constexpr int64_t kColumns = 8;

  static Table table(const Weight4& w, float scale, DType dtype) { return rounded_table(w.book().code, scale, dtype); }

  static void row(const Table& table, const uint8_t* packed, float* to) {
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) _mm256_store_ps(to + 8 * s, decode8(table, packed, s));
  }

  static void columns(const Table* tables, const uint8_t* packed, int64_t row_bytes, int64_t present, float* to) {
    for (int s = 0; s < 8; ++s) {
      __m256 v[8];
      if (present == 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) v[i] = decode8(tables[i], packed + i * row_bytes, s);
      } else {
        for (int i = 0; i < 8; ++i)
          v[i] = i < present ? decode8(tables[i], packed + i * row_bytes, s) : _mm256_setzero_ps();
      }
      transpose8(v);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_store_ps(to + nibble_order(8 * s + i) * kLanes, v[i]);
    }
  }
};

}  // namespace

const Linear4F32Kernels kLinear4F32Avx2 = f32_kernels<DecodeAvx2>();

}  // namespace peft_kernels

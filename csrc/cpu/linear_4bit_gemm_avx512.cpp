#include "cpu/linear_4bit_decode_avx512.h"
#include "cpu/linear_4bit_gemm_f32.h"

namespace peft_kernels {
namespace {

struct DecodeAvx512 {
  using Table = __m512;
  static constexpr int64_t kColumns = 16;

  static Table table(const Weight4& w, float scale, DType dtype) {
    return rounded_table(_mm512_loadu_ps(w.book().code), scale, dtype);
  }

  // Positions 16 t to 16 t + 15.
  static __m512 decode16(Table table, const uint8_t* packed, int t) {
    const __m512i dwords = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)packed));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(dwords, nibble_shifts(t)), table);  // reads 4 index bits
  }

  static void row(Table table, const uint8_t* packed, float* to) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) _mm512_store_ps(to + 16 * t, decode16(table, packed, t));
  }

  static void columns(const Table* tables, const uint8_t* packed, int64_t row_bytes, int64_t present, float* to) {
    for (int t = 0; t < 4; ++t) {
      __m512 v[16];
      if (present == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = decode16(tables[i], packed + i * row_bytes, t);
      } else {
        for (int i = 0; i < 16; ++i)
          v[i] = i < present ? decode16(tables[i], packed + i * row_bytes, t) : _mm512_setzero_ps();
      }
      transpose16(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_ps(to + nibble_order(16 * t + i) * kLanes, v[i]);
    }
  }
};

}  // namespace

const Linear4F32Kernels kLinear4F32Avx512 = f32_kernels<DecodeAvx512>();

}  // namespace peft_kernels

#include "cpu/linear_4bit_decode_avx512.h"
#include "cpu/linear_4bit_gemm_f32.h"

namespace peft_kernels {
namespace {

struct DecodeAvx512 {
  using Table = __m512;
  using Values = __m512;
  static constexpr int kWidth = 16;

  static Table table(const Weight4& w, float scale, DType dtype) {
    return rounded_table(_mm512_loadu_ps(w.book().code), scale, dtype);
  }
  static Values decode(Table table, const uint8_t* packed, int t) {
    const __m512i dwords = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)packed));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(dwords, nibble_shifts(t)), table);  // reads 4 index bits
  }
  static void transpose(Values (&v)[kWidth]) { transpose16(v); }
  static void store(float* to, Values v) { _mm512_store_ps(to, v); }
};

}  // namespace

const Linear4F32Kernels kLinear4F32Avx512 = f32_kernels<DecodeAvx512>();

}  // namespace peft_kernels

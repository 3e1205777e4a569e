#include "cpu/linear_4bit_decode_avx512.h"
#include "cpu/linear_4bit_gemm_f32.h"

namespace peft_kernels {
namespace {

struct PanelAvx512 : DecodeAvx512 {
  using DecodeAvx512::DecodeAvx512;
  using Values = __m512;
  static constexpr int kWidth = 16;

  static void transpose(Values (&v)[kWidth]) { transpose16(v); }
  static void store(float* to, Values v) { _mm512_store_ps(to, v); }
};

}  // namespace

const Linear4F32Kernels kLinear4F32Avx512 = {run_panel<PanelAvx512, /*forward=*/true>,
                                             run_panel<PanelAvx512, /*forward=*/false>, widen_row};

}  // namespace peft_kernels

// y = x W' for few rows with AVX-512 float32 FMA.
#include "cpu/linear_4bit_decode_avx512.h"
#include "cpu/linear_4bit_small.h"

namespace peft_kernels {
namespace {

struct DotAvx512 : DecodeAvx512 {
  using DecodeAvx512::DecodeAvx512;
  static constexpr int kColumns = 4;

  static void row_scales(const Weight4& w, int64_t first, int64_t count, float* out) {
    peft_kernels::row_scales(w, first, count, out);
  }
  Vec vec(__m512 table, const uint8_t* packed, int t) const { return {(*this)(table, packed, t)}; }
};

}  // namespace

const Linear4SmallKernel kLinear4SmallAvx512[3] = {{run<DotAvx512, DType::F32>, DecodeAvx512::element},
                                                   {run<DotAvx512, DType::F16>, DecodeAvx512::element},
                                                   {run<DotAvx512, DType::BF16>, DecodeAvx512::element}};

}  // namespace peft_kernels

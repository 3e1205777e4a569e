// y = x W' for few rows with AVX2.
#include "cpu/linear_4bit_decode_avx2.h"
#include "cpu/linear_4bit_small.h"

namespace peft_kernels {
namespace {

template <typename Decode>
struct DotAvx2 : Decode {
  using Decode::Decode;
  static constexpr int kColumns = 1;

  static void row_scales(const Weight4& w, int64_t first, int64_t count, float* out) {
    fill_scales(w, first, count, out);
    for (int64_t i = 0; i < count; ++i) out[i] = canonical(out[i]);
  }
  Vec vec(const typename Decode::Table& table, const uint8_t* packed, int t) const {
    return {(VecHalf)(*this)(table, packed, 2 * t), (VecHalf)(*this)(table, packed, 2 * t + 1)};
  }
};

}  // namespace

const Linear4SmallKernel kLinear4SmallAvx2[3] = {{run<DotAvx2<NibblesAvx2>, DType::F32>, NibblesAvx2::element},
                                                 {run<DotAvx2<NibblesAvx2>, DType::F16>, NibblesAvx2::element},
                                                 {run<DotAvx2<WordsAvx2>, DType::BF16>, WordsAvx2::element}};

}  // namespace peft_kernels

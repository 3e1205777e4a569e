#include "cpu/weight4.h"

#include <stdexcept>
#include <string>

namespace peft_kernels {
namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("Weight4: " + message);
}

}  // namespace

Weight4 make_weight4(const uint8_t* packed, const void* absmax, const float* absmax2, const float* code2,
                     const float* offset, int64_t nested_blocksize, QuantType quant_type, int64_t N, int64_t K,
                     int64_t blocksize) {
  const Weight4 w{packed, absmax, absmax2, code2, offset, nested_blocksize, quant_type, N, K, blocksize};
  int64_t numel;
  require(w.N >= 0 && w.K >= 0, "N and K must not be negative");
  require(!__builtin_mul_overflow(w.N, w.K, &numel), "N * K overflows");
  require(w.blocksize >= 2 && w.blocksize % 2 == 0,
          "blocksize must be even and at least 2, got " + std::to_string(w.blocksize));
  require(numel == 0 || (w.packed && w.absmax), "packed and absmax must not be null");
  require(!w.absmax2 || (w.code2 && w.offset && w.nested_blocksize > 0),
          "nested statistics need absmax2, code2, offset and a positive nested_blocksize");
  require(w.absmax2 || (!w.code2 && !w.offset), "code2 and offset need absmax2");
  return w;
}

}  // namespace peft_kernels

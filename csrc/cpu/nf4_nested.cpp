#include <cmath>
#include <limits>
#include <stdexcept>

#include "cpu/nf4_codec.h"
#include "cpu/nf4_kernels.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

struct Bounds {
  float value[256];  // value[i]: above it code i + 1 is nearer than code i; the last is a sentinel

  // The exact midpoint needs more bits than a float has; for a float v, v > midpoint is v > (midpoint rounded down).
  explicit Bounds(const float* code) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (int i = 0; i < 255; ++i) {
      const double midpoint = (double(code[i]) + double(code[i + 1])) / 2;
      const float rounded = float(midpoint);
      value[i] = double(rounded) > midpoint ? std::nextafter(rounded, -kInfinity) : rounded;
    }
    value[255] = kInfinity;
  }

  // Branch-free bisection: a misprediction costs more than the eight dependent loads.
  int nearest(float v) const {
    int code = 0;
    for (int step = 128; step > 0; step /= 2) code += step & -int(!(v <= value[code + step - 1]));
    return code;
  }
};

}  // namespace

void quantize_nested(const float* absmax, int64_t count, const float* offset, const float* code2,
                     int64_t nested_blocksize, uint8_t* codes, float* absmax2) {
  if (count < 0) throw std::invalid_argument("quantize_nested: count must not be negative");
  if (nested_blocksize < 1) throw std::invalid_argument("quantize_nested: nested_blocksize must be positive");
  if (count == 0) return;
  if (!absmax || !offset || !code2 || !codes || !absmax2)
    throw std::invalid_argument("quantize_nested: absmax, offset, code2, codes and absmax2 must not be null");

  const Bounds bounds(code2);
  const int64_t groups = (count - 1) / nested_blocksize + 1;
  constexpr int64_t kGrain = 1 << 12;
  const int threads = threads_for(count, kGrain);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * nested_blocksize, last = std::min(count, first + nested_blocksize);
    uint32_t top = 0;  // magnitudes compare as integers, and NaN is above infinity
    for (int64_t i = first; i < last; ++i) top = std::max(top, float_bits(absmax[i] - *offset) & 0x7fffffffu);
    absmax2[group] = bits_float(top);
    const float inverse = 1.0f / (absmax2[group] < kTinyAbsmax ? kTinyAbsmax : absmax2[group]);
    for (int64_t i = first; i < last; ++i) codes[i] = uint8_t(bounds.nearest((absmax[i] - *offset) * inverse));
  }
}

}  // namespace peft_kernels

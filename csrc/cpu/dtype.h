// Element types and scalar conversions. Rounding is to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/inline.h"

namespace peft_kernels {

enum class DType { F32 = 0, F16 = 1, BF16 = 2 };

PK_INLINE int64_t dtype_size(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

PK_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

PK_INLINE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

PK_INLINE float bf16_to_f32(uint16_t value) { return bits_float(uint32_t(value) << 16); }

PK_INLINE uint16_t f32_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#if defined(__F16C__)

PK_INLINE float f16_to_f32(uint16_t value) { return _cvtsh_ss(value); }
PK_INLINE uint16_t f32_to_f16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

#else

PK_INLINE float f16_to_f32(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000u) << 16, magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 0x1p-24f;
  return bits_float(sign | float_bits(subnormal));
}

PK_INLINE uint16_t f32_to_f16(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  // Below 2^-14 the result is subnormal: adding 0.5 puts its unit, 2^-24, at the last bit, and the addition rounds.
  if (magnitude < 0x38800000u) return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}

#endif

PK_INLINE float load_f32(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::F32) return static_cast<const float*>(data)[i];
  const uint16_t value = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::BF16 ? bf16_to_f32(value) : f16_to_f32(value);
}

PK_INLINE void store_f32(void* data, int64_t i, DType dtype, float value) {
  if (dtype == DType::F32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = dtype == DType::BF16 ? f32_to_bf16(value) : f32_to_f16(value);
  }
}

}  // namespace peft_kernels

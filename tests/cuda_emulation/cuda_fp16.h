// float16 by the CPU core's conversions.
#pragma once

#include "cpu/dtype.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return peft_kernels::f16_to_f32(value.bits); }
inline __half __float2half_rn(float value) { return {peft_kernels::f32_to_f16(value)}; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

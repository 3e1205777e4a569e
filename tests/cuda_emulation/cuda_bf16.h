// bfloat16 by the CPU core's conversions.
#pragma once

#include "cpu/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return peft_kernels::bf16_to_f32(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {peft_kernels::f32_to_bf16(value)}; }

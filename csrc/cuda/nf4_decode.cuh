// 4-bit codes to 16-bit values in registers by a table in shared memory; and the scale of a block.
#pragma once

#include "cpu/weight4.h"
#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace peft_kernels {

// A code book in 16 bits: code * multiplier, rounded. Block scales have to be multiplied by `unit`, 1 / multiplier.
struct DecodeTable {
  uint16_t values[16] = {};
  float unit = 1;
};

// Rounded alone, NF4's codes would be off by the same 2^-9 (bfloat16) wherever they occur; these multipliers make the
// rounding errors small and let them cancel over a Gaussian weight. FP4's codes are twelfths, hence exact. The Triton
// kernels have the same values.
constexpr double kMultiplier[2][2] = {{1.3886146545410156, 1.188751220703125},
                                      {12.0, 12.0}};  // [quant type][fp16, bf16]

inline DecodeTable make_decode_table(QuantType quant_type, DType dtype) {
  const bool bf16 = dtype == DType::BF16;
  const double multiplier = kMultiplier[quant_type][bf16];
  DecodeTable table;
  table.unit = float(1.0 / multiplier);
  for (int i = 0; i < 16; ++i) {
    const float value = float(kCodeBooks[quant_type].code[i] * multiplier);
    table.values[i] = bf16 ? f32_to_bf16(value) : f32_to_f16(value);
  }
  return table;
}

// For each byte the pair of its weights, the high nibble's first, 32 times, so that each lane reads from a bank of its
// own: a word of shared memory for two weights. Byte permutes decode in registers, but take three times as many
// instructions, which the integer units issue at half the rate: measured on H100, 2 to 18 % more time.
constexpr int kPairs = 256 * 32 * 4;  // bytes

__device__ __forceinline__ void fill_pairs(const DecodeTable& table, char* pairs) {
  for (int i = threadIdx.x; i < kPairs / 16; i += blockDim.x) {
    const uint32_t pair = table.values[i / 8 >> 4] | uint32_t(table.values[i / 8 & 15]) << 16;
    *reinterpret_cast<uint4*>(pairs + 16 * i) = {pair, pair, pair, pair};
  }
}

// The eight weights of a word in their order, two in a register.
__device__ __forceinline__ void decode_word(uint32_t word, const char* table, int bank_offset, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t row = byte == 0 ? word << 7 : word >> (8 * byte - 7);
    pairs[byte] = *reinterpret_cast<const uint32_t*>(table + ((row & 0x7f80u) | bank_offset));
  }
}

// Starts copying what a block's scale is made of: the float32, or the aligned word around its code and the float32 that
// goes with it; zeros if `there` is false. They take a word each in `to`, and in `to` + kScales. Returns which byte of
// its word the code is.
constexpr int kScales = kWarp * 4;  // bytes: a word for each lane

// nested_shift: blocks of the first level in one of the second, as a power of two.
template <bool NESTED>
__device__ __forceinline__ uint32_t fetch_scale(const Weight4& weight, int block, int nested_shift, bool there,
                                                char* to) {
  if (!NESTED) {
    copy_async<4>(to, static_cast<const float*>(weight.absmax) + block, there);
    return 0;
  }
  const char* code = static_cast<const char*>(weight.absmax) + block;
  const uint32_t byte = reinterpret_cast<uintptr_t>(code) & 3;
  copy_async<4>(to, code - byte, there);
  copy_async<4>(to + kScales, weight.absmax2 + (block >> nested_shift), there);
  return byte;
}

// The scale that was fetched to `from`. Product and sum round separately, as in bitsandbytes. code2: in shared memory,
// with the offset behind it.
template <bool NESTED>
__device__ __forceinline__ float scale_value(const char* from, uint32_t byte, const float* code2) {
  if (!NESTED) return *reinterpret_cast<const float*>(from);
  const uint32_t code = *reinterpret_cast<const uint32_t*>(from) >> 8 * byte & 0xff;
  return __fadd_rn(__fmul_rn(code2[code], *reinterpret_cast<const float*>(from + kScales)), code2[256]);
}

}  // namespace peft_kernels

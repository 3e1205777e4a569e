// 4-bit codes to 16-bit values in registers, eight at a time, by byte permute; and the scale of a block.
#pragma once

#include "cpu/weight4.h"
#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace peft_kernels {

// A code book in 16 bits, as byte permutes read it: plane 0 has the low bytes of the sixteen values, plane 1 the high
// ones. The values are code * multiplier, rounded; block scales have to be multiplied by `unit`, 1 / multiplier.
struct DecodeTable {
  uint32_t planes[2][4] = {};
  uint16_t values[16] = {};
  float unit = 1;
  uint32_t top_bits = 0x44444444, own_nibbles = 0x32103210;  // a compiler that knew them would use more instructions
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
    const uint32_t bits = bf16 ? f32_to_bf16(value) : f32_to_f16(value);
    table.values[i] = uint16_t(bits);
    for (int plane = 0; plane < 2; ++plane) table.planes[plane][i / 4] |= (bits >> 8 * plane & 0xff) << 8 * (i % 4);
  }
  return table;
}

// The eight weights of a word in their order, two in a register: a byte's high nibble comes first.
// One permute looks four nibbles up in eight bytes by their low three bits; a third chooses between the two halves of
// the table by the top bit: selector nibble i is i, or i + 4 where that bit is set.
__device__ __forceinline__ void decode_word(uint32_t word, const DecodeTable& table, uint32_t (&pairs)[4]) {
  uint32_t half = (word >> 1 & table.top_bits) | table.own_nibbles, entry = word & 0x77777777u;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t bytes[2];
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      const uint32_t* octets = table.planes[plane];
      bytes[plane] =
          byte_permute(byte_permute(octets[0], octets[1], entry), byte_permute(octets[2], octets[3], entry), half);
    }
    pairs[2 * i] = byte_permute(bytes[0], bytes[1], 0x4051);
    pairs[2 * i + 1] = byte_permute(bytes[0], bytes[1], 0x6273);
    entry >>= 16, half >>= 16;
  }
}

// The same by a table in shared memory: for each byte the pair of its weights, 32 times, so that each lane reads from a
// bank of its own. A third of the instructions, and a word of shared memory for each two weights.
constexpr int kPairs = 256 * 32 * 4;  // bytes

__device__ __forceinline__ void fill_pairs(const DecodeTable& table, char* pairs) {
  for (int i = threadIdx.x; i < kPairs / 16; i += blockDim.x) {
    const uint32_t pair = table.values[i / 8 >> 4] | uint32_t(table.values[i / 8 & 15]) << 16;
    *reinterpret_cast<uint4*>(pairs + 16 * i) = {pair, pair, pair, pair};
  }
}

__device__ __forceinline__ void decode_word(uint32_t word, const char* table, int bank_offset, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t row = byte == 0 ? word << 7 : word >> (8 * byte - 7);
    pairs[byte] = *reinterpret_cast<const uint32_t*>(table + ((row & 0x7f80u) | bank_offset));
  }
}

// A block's scale as it lies in memory: fetched early, worth nothing until `scale_value`.
struct RawScale {
  uint32_t absmax;  // float32 bits, or an 8-bit code
  float absmax2;
};

// nested_shift: blocks of the first level in one of the second, as a power of two.
template <bool NESTED>
__device__ __forceinline__ RawScale load_scale(const Weight4& weight, int block, int nested_shift) {
  if (!NESTED) return {__float_as_uint(static_cast<const float*>(weight.absmax)[block]), 0.0f};
  return {static_cast<const uint8_t*>(weight.absmax)[block], weight.absmax2[block >> nested_shift]};
}

// Product and sum round separately, as in bitsandbytes. code2: in shared memory.
template <bool NESTED>
__device__ __forceinline__ float scale_value(RawScale raw, const float* code2, float offset) {
  if (!NESTED) return __uint_as_float(raw.absmax);
  return __fadd_rn(__fmul_rn(code2[raw.absmax], raw.absmax2), offset);
}

}  // namespace peft_kernels

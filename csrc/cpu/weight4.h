// A 4-bit weight [N, K] as the kernels see it: bitsandbytes' canonical layout, borrowed pointers.
#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "nf4.h"

namespace peft_kernels {

struct Weight4 {
  const uint8_t* packed;  // ceil(N * K / 2) bytes, flat row-major, the high nibble is the even element
  const void* absmax;     // float32 per block of the flat tensor, or uint8 when absmax2 is set (nested statistics)
  const float* absmax2;   // nested: one float32 per nested_blocksize blocks, else null
  const float* code2;     // nested: 256 values
  const float* offset;    // nested: one value
  int64_t nested_blocksize;
  QuantType quant_type;
  int64_t N, K;
  int64_t blocksize;  // blocks may straddle rows, and the last may be partial

  PK_INLINE int64_t numel() const { return N * K; }
  PK_INLINE int64_t blocks() const { return (numel() + blocksize - 1) / blocksize; }
  PK_INLINE const CodeBook& book() const { return kCodeBooks[quant_type]; }

  // The block's absmax. The product and the sum round separately (built with -ffp-contract=off), as in bitsandbytes.
  PK_INLINE float scale(int64_t block) const {
    if (!absmax2) return static_cast<const float*>(absmax)[block];
    const float product = code2[static_cast<const uint8_t*>(absmax)[block]] * absmax2[block / nested_blocksize];
    return product + *offset;
  }
};

// Throws std::invalid_argument unless the fields are consistent.
Weight4 make_weight4(const uint8_t* packed, const void* absmax, const float* absmax2, const float* code2,
                     const float* offset, int64_t nested_blocksize, QuantType quant_type, int64_t N, int64_t K,
                     int64_t blocksize);

}  // namespace peft_kernels

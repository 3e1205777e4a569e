// The 4-bit codec on the CPU: what the other kernels and the bindings call.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/weight4.h"

namespace peft_kernels {

// x[numel] -> packed[ceil(numel / 2)] and absmax[ceil(numel / blocksize)], bit for bit bitsandbytes' result:
// x * (1 / absmax) against the code book's bounds, a tie to the lower code; a partial last block divides instead, and
// stores an absmax of at least 1e-38. A zero block stores the code of 0. A block with a NaN has a NaN absmax and
// the highest code throughout; one with an infinity has an infinite absmax.
void quantize_4bit(const void* x, DType dtype, int64_t numel, int64_t blocksize, QuantType quant_type, uint8_t* packed,
                   float* absmax);

// absmax[count] - *offset -> codes[count] and absmax2[ceil(count / nested_blocksize)]: the exact nearest of the 256
// ascending values of code2 to v * (1 / absmax2), a tie to the lower one.
void quantize_nested(const float* absmax, int64_t count, const float* offset, const float* code2,
                     int64_t nested_blocksize, uint8_t* codes, float* absmax2);

// Elements [begin, end) of the flat weight, code * scale rounded once to dtype, into out[0, end - begin).
void dequantize_4bit(const Weight4& weight, int64_t begin, int64_t end, void* out, DType dtype);

// The same on the calling thread, arguments unchecked, the result left in cache: for panels inside other kernels.
void decode_4bit(const Weight4& weight, int64_t begin, int64_t end, void* out, DType dtype);

}  // namespace peft_kernels

// What each instruction-set file of the codec provides to nf4_quantize.cpp and nf4_dequantize.cpp.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/weight4.h"

namespace peft_kernels {

struct QuantizeJob {
  const void* x;
  DType dtype;
  int64_t numel, blocksize;
  const CodeBook* book;
  uint8_t* packed;
  float* absmax;
};

// Blocks below this absmax scale by its inverse, which stays finite (bitsandbytes' constant).
constexpr float kTinyAbsmax = 1e-38f;

// Whole blocks [first, last) whose size is a multiple of 16.
void quantize_blocks_avx2(const QuantizeJob& job, int64_t first, int64_t last);
void quantize_blocks_avx512(const QuantizeJob& job, int64_t first, int64_t last);

// Any range and blocksize. `stream` writes around the cache where the output's alignment allows.
void decode_avx2(const Weight4& weight, int64_t begin, int64_t end, void* out, DType dtype);
void decode_avx512(const Weight4& weight, int64_t begin, int64_t end, void* out, DType dtype, bool stream);

// The scales of `count` blocks from `first` on, without Weight4::scale's division for each.
PK_INLINE void fill_scales(const Weight4& w, int64_t first, int64_t count, float* scales) {
  if (!w.absmax2) {
    const float* absmax = static_cast<const float*>(w.absmax) + first;
    for (int64_t i = 0; i < count; ++i) scales[i] = absmax[i];
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(w.absmax) + first;
  const float offset = *w.offset;
  int64_t group = first / w.nested_blocksize;
  int64_t left = (group + 1) * w.nested_blocksize - first;
  for (int64_t i = 0; i < count;) {
    const float absmax2 = w.absmax2[group++];
    const int64_t stop = left < count - i ? i + left : count;
    for (; i < stop; ++i) {
      const float product = w.code2[codes[i]] * absmax2;
      scales[i] = product + offset;
    }
    left = w.nested_blocksize;
  }
}

// Calls run(scale, packed bytes, count, out) for each piece of [begin, end) that one scale covers; pieces start at even
// elements. An odd `begin` is a piece of its own, one(scale, nibble, out), because its byte is shared.
template <typename Out, typename One, typename Run>
PK_INLINE void for_each_run(const Weight4& w, int64_t begin, int64_t end, Out* out, One one, Run run) {
  constexpr int64_t kChunk = 128;
  float scales[kChunk];
  int64_t at = begin;
  if (at < end && at % 2 != 0) {
    one(w.scale(at / w.blocksize), w.packed[at / 2] & 15, out++);
    ++at;
  }
  if (at >= end) return;
  const int64_t last = (end - 1) / w.blocksize;
  for (int64_t block = at / w.blocksize; block <= last;) {
    const int64_t count = last - block + 1 < kChunk ? last - block + 1 : kChunk;
    fill_scales(w, block, count, scales);
    for (int64_t i = 0; i < count; ++i, ++block) {
      const int64_t block_end = (block + 1) * w.blocksize;
      const int64_t size = (block_end < end ? block_end : end) - at;
      run(scales[i], w.packed + at / 2, size, out);
      out += size;
      at += size;
    }
  }
}

}  // namespace peft_kernels

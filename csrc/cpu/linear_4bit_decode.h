// Scales of the 4-bit kernels, and the order in which they decode.
#pragma once

#include <immintrin.h>

#include "cpu/linear_4bit_kernels.h"
#include "cpu/nf4_kernels.h"

namespace peft_kernels {
namespace {

constexpr int64_t kPrefetchRows = 16;  // a strided walk over W outruns the hardware prefetcher

// The tables are rounded as integers, which carries the digits of some NaN into its sign and leaves a number; the
// digits of this one stay a NaN's, and so do those of its products.
constexpr float kNaN = __builtin_nanf("");
inline float canonical(float scale) { return scale == scale ? scale : kNaN; }

// canonical() scales of the blocks that hold column k in rows [n, n + count).
inline void column_scales(const Weight4& w, int64_t k, int64_t n, int64_t count, float* out) {
  const int64_t step = w.K / w.blocksize;
  int64_t block = n * step + k / w.blocksize;
  if (!w.absmax2 || (w.nested_blocksize & (w.nested_blocksize - 1)) != 0) {
    for (int64_t i = 0; i < count; ++i, block += step) out[i] = canonical(w.scale(block));
    return;
  }
  const int shift = __builtin_ctzll(w.nested_blocksize);  // a division would cost as much as decoding 64 weights
  const uint8_t* q = static_cast<const uint8_t*>(w.absmax);
  for (int64_t i = 0; i < count; ++i, block += step) {
    if (i + kPrefetchRows < count) _mm_prefetch((const char*)q + block + kPrefetchRows * step, _MM_HINT_T0);
    const float product = w.code2[q[block]] * w.absmax2[block >> shift];
    out[i] = canonical(product + *w.offset);
  }
}

// Which of 64 elements is decoded at a position: nibble s of dword j of the 8, element 8 j + (s ^ 1), at 8 s + j. A
// shift and a look-up take one nibble of every dword, in an order that costs nothing where the other operand or the
// result is put in the same.
inline int nibble_order(int position) { return 8 * (position % 8) + (position / 8 ^ 1); }

}  // namespace
}  // namespace peft_kernels

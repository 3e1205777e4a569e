// The 4-bit code books and their decision bounds: the only native copy.
#pragma once

#include "cpu/inline.h"

namespace peft_kernels {

enum QuantType { NF4 = 0, FP4 = 1 };

struct CodeBook {
  float code[16];           // index -> value
  unsigned char order[16];  // rank by value -> index: FP4 indices are bit patterns, not in value order

  // The value above which rank + 1 is nearer than rank; a tie belongs to the lower rank.
  constexpr PK_INLINE float bound(int rank) const { return (code[order[rank]] + code[order[rank + 1]]) / 2; }
};

// bitsandbytes' values to the last bit. FP4 is its 2-exponent 1-mantissa float divided by the largest, 12.
inline constexpr CodeBook kCodeBooks[2] = {
    {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
     {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
    {{0.0f, 0.0625f / 12, 8.0f / 12, 12.0f / 12, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,  //
      0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12},
     {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}},
};

}  // namespace peft_kernels

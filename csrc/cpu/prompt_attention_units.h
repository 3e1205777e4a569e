// The 32-bit units of prompt_attention_kernels.h: how rows become units and how units multiply.
#pragma once

#include "cpu/vec16.h"

namespace peft_kernels {
namespace {

// One float32 a unit.
struct Float32Unit {
  static constexpr int64_t kStep = 1;
  using Vector = f32x16;
  PK_INLINE static Vector broadcast(const uint32_t* unit) { return splat(bits_float(*unit)); }
  PK_INLINE static f32x16 multiply(Vector a, Vector b, f32x16 sum) { return multiply_add(a, b, sum); }
  PK_INLINE static void store(uint32_t* units, f32x16 v) { store_vector(units, v); }

  // `width` units from n elements and zeros.
  static void load_row(const void* data, DType dtype, int64_t index, int64_t n, int64_t width, uint32_t* units) {
    for (int64_t i = 0; i < width; i += 16) {
      const int64_t count = n - i < 0 ? 0 : n - i < 16 ? n - i : 16;
      store_vector(units + i, count ? load_elements(data, dtype, index + i, count) : f32x16{});
    }
  }

  // The rows, [count][width] elements, with units along the rows: [count / kStep][width]. `to` may serve to hold them.
  static const uint32_t* along_rows(const uint32_t* rows, int64_t, int64_t, uint32_t*) { return rows; }
};

#ifdef __AVX512BF16__
// Two bfloat16 a unit.
struct Bf16Unit {
  static constexpr int64_t kStep = 2;
  using Vector = u32x16;
  PK_INLINE static Vector broadcast(const uint32_t* unit) { return (u32x16)_mm512_set1_epi32(int(*unit)); }
  PK_INLINE static f32x16 multiply(Vector a, Vector b, f32x16 sum) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  PK_INLINE static void store(uint32_t* units, f32x16 v) { store_vector(units, to_bf16(v)); }

  static void load_row(const void* data, DType dtype, int64_t index, int64_t n, int64_t width, uint32_t* units) {
    uint16_t* to = (uint16_t*)units;
    for (int64_t i = 0; i < 2 * width; i += 16) {
      const int64_t count = n - i < 0 ? 0 : n - i < 16 ? n - i : 16;
      if (count == 16 && dtype == DType::BF16)
        std::memcpy(to + i, (const uint16_t*)data + index + i, 32);
      else
        store_vector(to + i, to_bf16(count ? load_elements(data, dtype, index + i, count) : f32x16{}));
    }
  }

  static const uint32_t* along_rows(const uint32_t* rows, int64_t count, int64_t width, uint32_t* to) {
    const uint16_t* from = (const uint16_t*)rows;
    for (int64_t row = 0; row < count; row += 2, from += 2 * width)
      for (int64_t i = 0; i < width; i += 16) {
        const u32x16 even = __builtin_convertvector(load_vector<u16x16>(from + i), u32x16);
        const u32x16 odd = __builtin_convertvector(load_vector<u16x16>(from + width + i), u32x16);
        store_vector(to + row / 2 * width + i, even | odd << 16);
      }
    return to;
  }
};
#endif

// to[columns][rows] from [rows][columns]; both are multiples of 16.
inline void transpose(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to) {
#ifdef __AVX512F__
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t column = 0; column < columns; column += 16) {
      __m512 block[16];
      for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_ps((const float*)from + (row + i) * columns + column);
      transpose16(block);
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps((float*)to + (column + i) * rows + row, block[i]);
    }
#else
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) to[column * rows + row] = from[row * columns + column];
#endif
}

}  // namespace
}  // namespace peft_kernels

// The 32-bit units of prompt_attention_kernels.h: how rows become units and how units multiply.
#pragma once

#include <cstring>

#include "cpu/vec.h"

namespace peft_kernels {
namespace {

// e^x within 2 units in the last place; zero where it would be subnormal, NaN stays NaN. x is at most 88.
template <class Floats, class Integers>
PK_INLINE Floats exponential_of(Floats x) {
  const Floats lowest = Floats{} - 87.33f, clamped = x < lowest ? lowest : x;
  const Floats magic = Floats{} + 12582912.0f;  // adding it rounds to an integer
  const Floats n = multiply_add(clamped, Floats{} + 1.44269504f, magic) - magic;
  Floats r = multiply_add(n, Floats{} - 0.693359375f, clamped);
  r = multiply_add(n, Floats{} + 2.12194440e-4f, r);
  constexpr float kSeries[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                               5.0000001201e-1f};
  Floats p = Floats{} + 1.9875691500e-4f;
  for (int i = 0; i < 5; ++i) p = multiply_add(p, r, Floats{} + kSeries[i]);
  p = multiply_add(p * r, r, r) + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return x < lowest ? Floats{} : p * (Floats)power;
}

PK_INLINE Vec exponential(Vec x) {
#ifdef __AVX512F__
  typedef int32_t Integers __attribute__((vector_size(64)));
  return {exponential_of<__m512, Integers>(x.v)};
#else
  typedef int32_t Integers __attribute__((vector_size(32)));
  return {exponential_of<VecHalf, Integers>(x.a), exponential_of<VecHalf, Integers>(x.b)};
#endif
}

// One float32 a unit.
struct Float32Unit {
  static constexpr int64_t kStep = 1;
  using Vector = Vec;
  PK_INLINE static Vector broadcast(const uint32_t* unit) { return vec_set(bits_float(*unit)); }
  PK_INLINE static Vector load(const uint32_t* units) { return vec_load((const float*)units); }
  PK_INLINE static Vec multiply(Vector a, Vector b, Vec sum) { return multiply_add(a, b, sum); }
  PK_INLINE static void store(uint32_t* units, Vec v) { vec_store((float*)units, v); }

  // `width` units from n elements and zeros.
  static void load_row(const void* data, DType dtype, int64_t index, int64_t n, int64_t width, uint32_t* units) {
    for (int64_t i = 0; i < width; i += kVec)
      store(units + i, n > i ? vec_load(data, dtype, index + i, n - i) : vec_zero());
  }

  // The rows, [count][width] elements, with units along the rows: [count / kStep][width]. `to` may serve to hold them.
  static const uint32_t* along_rows(const uint32_t* rows, int64_t, int64_t, uint32_t*) { return rows; }
};

#ifdef __AVX512BF16__
// Two bfloat16 a unit.
struct Bf16Unit {
  static constexpr int64_t kStep = 2;
  using Vector = __m512bh;
  PK_INLINE static Vector broadcast(const uint32_t* unit) { return (__m512bh)_mm512_set1_epi32(int(*unit)); }
  PK_INLINE static Vector load(const uint32_t* units) { return (__m512bh)_mm512_loadu_si512(units); }
  PK_INLINE static Vec multiply(Vector a, Vector b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
  PK_INLINE static void store(uint32_t* units, Vec v) { vec_store(units, DType::BF16, 0, v); }

  static void load_row(const void* data, DType dtype, int64_t index, int64_t n, int64_t width, uint32_t* units) {
    uint16_t* to = (uint16_t*)units;
    for (int64_t i = 0; i < 2 * width; i += kVec)
      if (n - i >= kVec && dtype == DType::BF16)
        std::memcpy(to + i, (const uint16_t*)data + index + i, 32);
      else
        vec_store(to, DType::BF16, i, n > i ? vec_load(data, dtype, index + i, n - i) : vec_zero());
  }

  static const uint32_t* along_rows(const uint32_t* rows, int64_t count, int64_t width, uint32_t* to) {
    const uint16_t* from = (const uint16_t*)rows;
    for (int64_t row = 0; row < count; row += 2, from += 2 * width)
      for (int64_t i = 0; i < width; i += 16) {
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + i)));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + width + i)));
        _mm512_storeu_si512(to + row / 2 * width + i, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    return to;
  }
};
#endif

// to[columns][rows] from [rows][columns]; both are multiples of 16.
inline void transpose(const uint32_t* from, int64_t rows, int64_t columns, uint32_t* to) {
  for (int64_t row = 0; row < rows; row += kVec)
    for (int64_t column = 0; column < columns; column += kVec) {
      Vec block[kVec];
      for (int i = 0; i < kVec; ++i) block[i] = vec_load((const float*)from + (row + i) * columns + column);
      vec_transpose(block);
      for (int i = 0; i < kVec; ++i) vec_store((float*)to + (column + i) * rows + row, block[i]);
    }
}

}  // namespace
}  // namespace peft_kernels

// The units of bottleneck_kernels.h: how elements become units and how units multiply. Included once per translation
// unit and instruction set, as are the headers that build on it.
#pragma once

#include "cpu/bottleneck_kernels.h"
#include "cpu/vec.h"

namespace peft_kernels {
namespace {

struct F32Unit {
  static constexpr int64_t kElements = 1;
  static constexpr DType kDtype = DType::F32;
  using Wide = Vec;
  static PK_INLINE Wide broadcast(const char* p) { return vec_set(*(const float*)p); }
  static PK_INLINE Wide load(const uint32_t* p) { return vec_load((const float*)p); }
  static PK_INLINE Vec multiply_add(Wide a, Wide w, Vec sum) { return peft_kernels::multiply_add(a, w, sum); }
  static PK_INLINE Vec rounded(Vec value) { return value; }
  static PK_INLINE Vec along(Vec first, Vec) { return first; }   // sixteen units of consecutive elements
  static PK_INLINE Vec across(Vec first, Vec) { return first; }  // sixteen units, each of one element of both
};

#if defined(__AVX512BF16__)
struct Bf16Unit {  // the products of bf16 are exact in vdpbf16ps, which adds them in float32 at twice the FMA rate
  static constexpr int64_t kElements = 2;
  static constexpr DType kDtype = DType::BF16;
  using Wide = __m512bh;
  typedef float Bits __attribute__((aligned(2), may_alias));  // a pair of a row, read as one broadcast operand
  static PK_INLINE Wide broadcast(const char* p) {
    return (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*(const Bits*)p));
  }
  static PK_INLINE Wide load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static PK_INLINE Vec multiply_add(Wide a, Wide w, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, w)}; }
  static PK_INLINE Vec rounded(Vec value) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_bf16(value.v)), 16))};
  }
  static PK_INLINE Vec along(Vec first, Vec second) {
    return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second.v, first.v))};
  }
  static PK_INLINE void split(const uint16_t* from, Vec& even, Vec& odd) {  // 32 elements
    const __m512i raw = _mm512_loadu_si512(from);
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u))))};
  }
  static PK_INLINE Vec across(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32(round_bf16(first.v)), high = _mm512_cvtepu16_epi32(round_bf16(second.v));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
};
#endif

// Elements [i, i + 32) of U's dtype.
template <class U>
PK_INLINE void store_pair(void* data, int64_t i, Vec first, Vec second) {
  if constexpr (U::kElements == 2) {
    vec_store((float*)((uint16_t*)data + i), U::along(first, second));
  } else {
    vec_store((float*)data + i, first);
    vec_store((float*)data + i + kVec, second);
  }
}

#if defined(__AVX512BF16__)
// to[lane] = (first[lane], second[lane]), each times scale[lane] unless it is null; lanes a multiple of sixteen.
inline void interleave_rows(const uint16_t* first, const uint16_t* second, const float* scale, int64_t lanes,
                            uint32_t* to) {
  const auto load = [](const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  };
  const auto scaled = [&](__m512i bits, int64_t lane) {
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_loadu_ps(scale + lane));
  };
  for (int64_t lane = 0; lane < lanes; lane += kVec) {
    const __m512i low = load(first + lane), high = load(second + lane);
    if (scale)
      vec_store((float*)(to + lane), Bf16Unit::across({scaled(low, lane)}, {scaled(high, lane)}));
    else
      _mm512_storeu_si512(to + lane, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

template <class U>
PK_INLINE int64_t units_of(int64_t elements) {
  return (elements + U::kElements - 1) / U::kElements;
}

}  // namespace
}  // namespace peft_kernels

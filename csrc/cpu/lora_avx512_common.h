// Loads, stores and block copies shared by the AVX-512 LoRA kernels. Included once per translation unit and ISA.
#pragma once

#include <type_traits>

#include "cpu/lora_kernels.h"
#include "cpu/philox.h"
#include "cpu/vec_avx512.h"

namespace peft_kernels {
namespace {

struct Pair {
  __m512 v[2];
};

inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }

// How 32 consecutive elements of x become two float32 vectors. The masked form reads nothing past the mask.
struct LoadF32 {
  static constexpr DType kDtype = DType::F32;
  using type = float;
  static constexpr bool kSplit = false;
  static __m512 half(const float* x, int h) { return _mm512_loadu_ps(x + 16 * h); }
  static Pair load(const float* x, __mmask32 m) {
    return {{_mm512_maskz_loadu_ps(__mmask16(m), x), _mm512_maskz_loadu_ps(__mmask16(m >> 16), x + 16)}};
  }
};

struct LoadF16 {
  static constexpr DType kDtype = DType::F16;
  using type = uint16_t;
  static constexpr bool kSplit = false;
  static Pair widen(__m512i raw) {
    return {{_mm512_cvtph_ps(_mm512_castsi512_si256(raw)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1))}};
  }
  static __m512 half(const uint16_t* x, int h) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + 16 * h)));
  }
  static Pair load(const uint16_t* x, __mmask32 m) { return widen(_mm512_maskz_loadu_epi16(m, x)); }
};

struct LoadBf16 {
  static constexpr DType kDtype = DType::BF16;
  using type = uint16_t;
  static constexpr bool kSplit = false;
  static __m512 half(const uint16_t* x, int h) { return widen_bf16(_mm256_loadu_si256((const __m256i*)(x + 16 * h))); }
  static Pair load(const uint16_t* x, __mmask32 m) {
    const __m512i raw = _mm512_maskz_loadu_epi16(m, x);
    return {{widen_bf16(_mm512_castsi512_si256(raw)), widen_bf16(_mm512_extracti64x4_epi64(raw, 1))}};
  }
};

// Even elements, then odd ones: two instructions for 32 elements where LoadBf16 takes four.
struct LoadBf16Split {
  using type = uint16_t;
  static constexpr bool kSplit = true;
  static __m512 widen(__m512i raw, int h) {
    return _mm512_castsi512_ps(h ? _mm512_and_si512(raw, _mm512_set1_epi32(int(0xFFFF0000u)))
                                 : _mm512_slli_epi32(raw, 16));
  }
  static __m512 half(const uint16_t* x, int h) { return widen(_mm512_loadu_si512(x), h); }
  static Pair load(const uint16_t* x, __mmask32 m) {
    const __m512i raw = _mm512_maskz_loadu_epi16(m, x);
    return {{widen(raw, 0), widen(raw, 1)}};
  }
};

template <class Loader>
inline Pair load32(const typename Loader::type* x) {
  return {{Loader::half(x, 0), Loader::half(x, 1)}};
}

inline Pair interleave(Pair split) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {{_mm512_permutex2var_ps(split.v[0], low, split.v[1]), _mm512_permutex2var_ps(split.v[0], high, split.v[1])}};
}

inline Pair deinterleave(Pair natural) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(natural.v[0], even, natural.v[1]),
           _mm512_permutex2var_ps(natural.v[0], odd, natural.v[1])}};
}

// Calls f(loader) for the dtype.
template <class Bf16Loader, class F>
inline void with_loader(DType dtype, F&& f) {
  if (dtype == DType::F32) return f(LoadF32{});
  if (dtype == DType::F16) return f(LoadF16{});
  f(Bf16Loader{});
}

template <class Loader>
inline void store32(typename Loader::type* to, Pair v) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same<Loader, LoadBf16>::value) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(v.v[1], v.v[0]));
    return;
  }
#endif
  for (int half = 0; half < 2; ++half) store16(to, Loader::kDtype, 16 * half, v.v[half], 0xFFFF);
}

// to[row][col] = scale * from[row0 + row, col0 + col] in float32; columns zero-filled to a multiple of 32.
inline void copy_block(const Matrix& from, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float scale,
                       float* to, int64_t ldto) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; col += 32) {
      const __mmask32 m = first_lanes(cols - col);
      const int64_t index = (row0 + row) * from.ld + col0 + col;
      Pair pair = {{load16(from.data, from.dtype, index, __mmask16(m)),
                    load16(from.data, from.dtype, index + 16, __mmask16(m >> 16))}};
      _mm512_storeu_ps(to + row * ldto + col, _mm512_mul_ps(pair.v[0], factor));
      _mm512_storeu_ps(to + row * ldto + col + 16, _mm512_mul_ps(pair.v[1], factor));
    }
  }
}

// to[col][row] = scale * from[row0 + row, col0 + col] in float32; rows zero-filled to a multiple of 32.
inline void transpose_block(const Matrix& from, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float scale,
                            float* to, int64_t ldto) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t row = 0; row < (rows + 31) / 32 * 32; row += 16) {
    for (int64_t col = 0; col < cols; col += 16) {
      const __mmask16 m = __mmask16(first_lanes(min64(16, cols - col)));
      __m512 r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = row + i < rows ? load16(from.data, from.dtype, (row0 + row + i) * from.ld + col0 + col, m)
                              : _mm512_setzero_ps();
      transpose16(r);
      for (int i = 0; i < 16 && col + i < cols; ++i)
        _mm512_storeu_ps(to + (col + i) * ldto + row, _mm512_mul_ps(r[i], factor));
    }
  }
}

// to[i] = x[m, k0 + i] * mask / (1 - p), i < n, in float32. A product, not a select: a dropped NaN stays NaN as in
// eager.
inline void load_dropped(const Matrix& x, const Dropout& dropout, int64_t m, int64_t k0, int64_t n, float* to) {
  dropout_scale_row(dropout.seed, m, k0, n, dropout.p, to);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = __mmask16(first_lanes(min64(16, n - i)));
    const __m512 value = load16(x.data, x.dtype, m * x.ld + k0 + i, lanes);
    _mm512_mask_storeu_ps(to + i, lanes, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, to + i)));
  }
}

}  // namespace
}  // namespace peft_kernels

// S = alpha * drop(x) P' with lanes along k: no transposition of x, no store of converted x, and any rank fills the
// vectors. A tile of 3 rows x 8 ranks holds 24 accumulators and reads 11 vectors for 48 multiply-adds of 32 columns.
#pragma once

#include "cpu/lora_avx512_common.h"

namespace peft_kernels {
namespace {

// How one step of 32 columns multiplies: two float32 vectors, or (bf16 file only) one vector of bf16 pairs.
template <class Loader>
struct Float32Step {
  using x_type = typename Loader::type;
  using p_type = float;
  static constexpr int kHalves = 2;
  static __m512 load(const x_type* x, int half) { return Loader::half(x, half); }
  static __m512 load(const x_type* x, int half, __mmask32 m) { return Loader::load(x, m).v[half]; }
  static __m512 load_p(const float* p, int half) { return _mm512_loadu_ps(p + 16 * half); }
  static __m512 load_p(const float* p, int half, __mmask32 m) {
    return _mm512_maskz_loadu_ps(__mmask16(m >> (16 * half)), p + 16 * half);
  }
  static __m512 multiply_add(__m512 x, __m512 p, __m512 c) { return _mm512_fmadd_ps(x, p, c); }
};

#ifdef __AVX512BF16__
struct Bf16Step {  // the products of bf16 are exact in vdpbf16ps, which adds them in float32 at twice the FMA rate
  using x_type = uint16_t;
  using p_type = uint16_t;
  static constexpr int kHalves = 1;
  static __m512i load(const uint16_t* x, int) { return _mm512_loadu_si512(x); }
  static __m512i load(const uint16_t* x, int, __mmask32 m) { return _mm512_maskz_loadu_epi16(m, x); }
  static __m512i load_p(const uint16_t* p, int) { return _mm512_loadu_si512(p); }
  static __m512i load_p(const uint16_t* p, int, __mmask32 m) { return _mm512_maskz_loadu_epi16(m, p); }
  static __m512 multiply_add(__m512i x, __m512i p, __m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)x, (__m512bh)p); }
};
#endif

inline __m512 fold2(__m512 a, __m512 b) {  // per 128-bit lane: a0+a2, b0+b2, a1+a3, b1+b3
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

inline __m512 fold4(const __m512* c) {  // per 128-bit lane: that lane's sums of c[0..3]
  const __m512d a = _mm512_castps_pd(fold2(c[0], c[1])), b = _mm512_castps_pd(fold2(c[2], c[3]));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

template <int NR>
inline void store_sums(const __m512 (&c)[NR], float alpha, float* S) {
  if constexpr (NR == 8) {
    const __m512 a = fold4(c), b = fold4(c + 4);
    const __m512 half = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(half, half, 0x08), _mm512_shuffle_f32x4(half, half, 0x0D));
    _mm256_storeu_ps(S, _mm256_mul_ps(_mm512_castps512_ps256(sums), _mm256_set1_ps(alpha)));
  } else if constexpr (NR == 4) {
    const __m512 a = fold4(c);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(S, _mm_mul_ps(sums, _mm_set1_ps(alpha)));
  } else {
    for (int j = 0; j < NR; ++j) S[j] = alpha * _mm512_reduce_add_ps(c[j]);
  }
}

struct ShrinkBlock {  // one k block of one work item
  int64_t ldx, ldp, kn;
  bool first, last;
  bool prefetch;  // the next rows of x: 1 KB of each is too short for the hardware (8192 x 4096 bf16: 14.0 -> 10.9 ms)
  float alpha;
  int64_t ldS;
};

// The asm in the loop keeps GCC 12 from reading each vector of P three times, as the memory operand of three FMAs (1.3
// x slower: Zen 4 loads one vector a cycle), and from widening both halves of x at once (which spills accumulators).
// kPacked: p is [k / 32][NR][32], one pointer with constant offsets; else rank j's columns start at p + j * ldp.
template <class Step, int MR, int NR, bool kPacked>
inline void shrink_tile(const ShrinkBlock& block, const typename Step::x_type* x, const typename Step::p_type* p,
                        float* partial, float* S) {
  const int64_t rank_stride = kPacked ? 32 : block.ldp, step_stride = kPacked ? 32 * NR : 32;
  __m512 c[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j)
      c[i][j] = block.first ? _mm512_setzero_ps() : _mm512_loadu_ps(partial + (i * NR + j) * 16);

  int64_t k = 0;
  for (; k + 32 <= block.kn; k += 32, p += step_stride) {
#pragma GCC unroll 2
    for (int half = 0; half < Step::kHalves; ++half) {
      decltype(Step::load(x, 0)) v[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) v[i] = Step::load(x + i * block.ldx + k, half);
      if (MR == 3 && block.prefetch && half * sizeof(*x) % 4 == 0)  // one line of each next row; float32 has two a step
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) _mm_prefetch((const char*)(x + (i + MR) * block.ldx + k + 16 * half), _MM_HINT_T0);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) {
        auto w = Step::load_p(p + j * rank_stride, half);
        if (MR > 1) asm volatile("" : "+v"(w)::"memory");  // see above
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) c[i][j] = Step::multiply_add(v[i], w, c[i][j]);
      }
    }
  }
  if (k < block.kn) {
    const __mmask32 m = first_lanes(block.kn - k);
#pragma GCC unroll 2
    for (int half = 0; half < Step::kHalves; ++half)
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const auto v = Step::load(x + i * block.ldx + k, half, m);
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) {
          const auto* from = p + j * rank_stride;  // packed columns are zero-filled, and perhaps permuted
          const auto w = kPacked ? Step::load_p(from, half) : Step::load_p(from, half, m);
          c[i][j] = Step::multiply_add(v, w, c[i][j]);
        }
      }
  }

#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    if (block.last) {
      store_sums<NR>(c[i], block.alpha, S + i * block.ldS);
      continue;
    }
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) _mm512_storeu_ps(partial + (i * NR + j) * 16, c[i][j]);
  }
}

template <class Step, int NR, bool kPacked>
void shrink_ranks(const ShrinkBlock& block, int64_t rows, const typename Step::x_type* x,
                  const typename Step::p_type* p, float* partial, float* S) {
  int64_t row = 0;
  for (; row + 3 <= rows; row += 3)
    shrink_tile<Step, 3, NR, kPacked>(block, x + row * block.ldx, p, partial + row * NR * 16, S + row * block.ldS);
  x += row * block.ldx, partial += row * NR * 16, S += row * block.ldS;
  if (rows - row == 2) shrink_tile<Step, 2, NR, kPacked>(block, x, p, partial, S);
  if (rows - row == 1) shrink_tile<Step, 1, NR, kPacked>(block, x, p, partial, S);
}

inline int64_t rank_group(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

template <class Step, bool kPacked>
void shrink_block(ShrinkBlock block, int64_t rows, int64_t ranks, const typename Step::x_type* x,
                  const typename Step::p_type* p, float* partial, float* S) {
  for (int64_t j = 0; j < ranks;) {
    const int64_t count = rank_group(ranks - j);
    const auto run = count == 8   ? shrink_ranks<Step, 8, kPacked>
                     : count == 4 ? shrink_ranks<Step, 4, kPacked>
                     : count == 2 ? shrink_ranks<Step, 2, kPacked>
                                  : shrink_ranks<Step, 1, kPacked>;
    run(block, rows, x, p + j * block.ldp, partial + j * rows * 16, S + j);
    block.prefetch = false;
    j += count;
  }
}

template <class Step>
void shrink_block(const ShrinkBlock& block, bool packed, int64_t rows, int64_t ranks, const void* x, const void* p,
                  float* partial, float* S) {
  const auto run = packed ? shrink_block<Step, true> : shrink_block<Step, false>;
  run(block, rows, ranks, (const typename Step::x_type*)x, (const typename Step::p_type*)p, partial, S);
}

void shrink(const Matrix& x, const Dropout& dropout, int64_t m0, int64_t m1, int64_t K, const ShrinkPanels& panels,
            int64_t j0, int64_t j1, float alpha, float* S, int64_t ldS) {
  const int64_t rows = m1 - m0;
  float* partial = (float*)lora_scratch(1, size_t(rows) * (j1 - j0) * 16 * sizeof(float));
  const int64_t ld_dropped = panels.block_k + 16;  // a power of two would put the three rows of a tile in one L1 set
  float* dropped = dropout.active() ? (float*)lora_scratch(2, size_t(rows) * ld_dropped * sizeof(float)) : nullptr;
  S += m0 * ldS + j0;
  for (int64_t k0 = 0, b = 0; k0 < K; k0 += panels.block_k, ++b) {
    const int64_t kn = min64(panels.block_k, K - k0);
    const char* p = (const char*)panels.data + (b * panels.block_stride + j0 * panels.ld) * dtype_size(panels.dtype);
    const char* from = (const char*)x.data + (m0 * x.ld + k0) * dtype_size(x.dtype);
    ShrinkBlock block = {x.ld, panels.ld, kn, k0 == 0, k0 + kn == K, true, alpha, ldS};
#ifdef __AVX512BF16__
    if (panels.dtype == DType::BF16) {
      shrink_block<Bf16Step>(block, panels.packed, rows, j1 - j0, from, p, partial, S);
      continue;
    }
#endif
    if (dropped) {
      for (int64_t i = 0; i < rows; ++i) load_dropped(x, dropout, m0 + i, k0, kn, dropped + i * ld_dropped);
      block.ldx = ld_dropped;
      shrink_block<Float32Step<LoadF32>>(block, panels.packed, rows, j1 - j0, dropped, p, partial, S);
    } else {
      const auto run = [&](auto loader) {
        shrink_block<Float32Step<decltype(loader)>>(block, panels.packed, rows, j1 - j0, from, p, partial, S);
      };
      panels.split ? with_loader<LoadBf16Split>(x.dtype, run) : with_loader<LoadBf16>(x.dtype, run);
    }
  }
}

inline void store_panel(Pair natural, const ShrinkPanels& panels, void* block, int64_t at) {
  if (panels.split) natural = deinterleave(natural);
  for (int half = 0; half < 2; ++half, at += 16) {
    if (panels.dtype == DType::F32) {
      _mm512_storeu_ps((float*)block + at, natural.v[half]);
    } else {  // widened bf16: a shift is exact, and keeps subnormals
      const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(natural.v[half]), 16);
      _mm256_storeu_si256((__m256i*)((uint16_t*)block + at), _mm512_cvtepi32_epi16(bits));
    }
  }
}

void pack_panel(const Matrix& p, bool p_is_kr, int64_t r, int64_t k0, int64_t kn, const ShrinkPanels& panels,
                void* block) {
  float rows[kShrinkRanks * 32];
  for (int64_t k = 0; k < kn; k += 32) {
    const int64_t columns = min64(32, kn - k);
    for (int64_t j = 0; j < r; j += kShrinkRanks) {
      const int64_t ranks = min64(kShrinkRanks, r - j);
      if (p_is_kr)
        transpose_block(p, k0 + k, columns, j, ranks, 1.0f, rows, 32);
      else
        copy_block(p, j, ranks, k0 + k, columns, 1.0f, rows, 32);
      for (int64_t group = 0; group < ranks;) {
        const int64_t count = rank_group(ranks - group), at = (j + group) * panels.ld + k * count;
        for (int64_t i = 0; i < count; ++i)
          store_panel(load32<LoadF32>(rows + (group + i) * 32), panels, block, at + i * 32);
        group += count;
      }
    }
  }
}

}  // namespace
}  // namespace peft_kernels

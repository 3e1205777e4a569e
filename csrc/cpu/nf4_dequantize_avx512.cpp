// Decode in natural order with three instructions per 32 weights: put each byte where its two elements go (vpshufb),
// shift each element's nibble down (vpsrlvw), look them up (vpermw in a table of the scaled codes). VBMI's
// vpmultishiftqb would save no instruction, and Skylake and Cascade Lake lack it.
#include <immintrin.h>

#include "cpu/nf4_kernels.h"

namespace peft_kernels {
namespace {

// The 16 scaled codes rounded to bfloat16, twice: vpermw reads 5 index bits, and the fifth is a neighbour's.
inline __m512i bf16_table(__m512 code, float scale) {
  const __m512 product = _mm512_mul_ps(code, _mm512_set1_ps(scale));
  const __m512i bits = _mm512_castps_si512(product);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  // Integer rounding: vcvtneps2bf16 would flush subnormals.
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb);
  if (__builtin_expect((float_bits(scale) & 0x7f800000u) == 0x7f800000u, 0)) {
    const __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  }
  const __m512i upper_halves = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,  //
                                                31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutexvar_epi16(upper_halves, rounded);
}

inline __m512i f16_table(__m512 code, float scale) {
  const __m512 product = _mm512_mul_ps(code, _mm512_set1_ps(scale));
  return _mm512_broadcast_i64x4(_mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 16 packed bytes in every quarter -> 32 elements of two bytes.
inline __m512i lookup32(__m512i table, __m512i packed) {
  // Words b0b1 b0b1 b0b1 b0b1, b2b3 ...: of each four, the nibbles at bits 4 (b0 high), 0 (b0 low), 12 and 8.
  const __m512i order =
      _mm512_set_epi64(0x0f0e0f0e0f0e0f0e, 0x0d0c0d0c0d0c0d0c, 0x0b0a0b0a0b0a0b0a, 0x0908090809080908,
                       0x0706070607060706, 0x0504050405040504, 0x0302030203020302, 0x0100010001000100);
  const __m512i shifts = _mm512_set1_epi64(0x0008000c00000004);
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(_mm512_shuffle_epi8(packed, order), shifts), table);
}

// 8 packed bytes at the start of every quarter -> 16 floats; vpermps reads 4 index bits.
inline __m512 lookup16(__m512 table, __m512i packed) {
  // Byte i in both halves of quadword i: of each two, the nibbles at bits 4 and 0.
  const __m512i order = _mm512_set_epi64(7ll << 32 | 7, 6ll << 32 | 6, 5ll << 32 | 5, 4ll << 32 | 4,  //
                                         3ll << 32 | 3, 2ll << 32 | 2, 1ll << 32 | 1, 0);
  const __m512i shifts = _mm512_set1_epi64(0x0000000000000004);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(packed, order), shifts), table);
}

template <bool stream>
inline void store(void* out, __m512i value) {
  if (stream) {
    _mm512_stream_si512(static_cast<__m512i*>(out), value);
  } else {
    _mm512_storeu_si512(out, value);
  }
}

inline __m512i load_tail(const uint8_t* packed, int64_t elements) {
  return _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(__mmask16((1u << (elements + 1) / 2) - 1), packed));
}

template <bool stream>
inline void run_half(__m512i table, const uint8_t* packed, int64_t count, uint16_t* out) {
  for (; count >= 32; count -= 32, packed += 16, out += 32)
    store<stream>(out, lookup32(table, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)packed))));
  if (count > 0) _mm512_mask_storeu_epi16(out, __mmask32((1u << count) - 1), lookup32(table, load_tail(packed, count)));
}

template <bool stream>
inline void run_float(__m512 table, const uint8_t* packed, int64_t count, float* out) {
  for (; count >= 16; count -= 16, packed += 8, out += 16) {
    long long bytes;
    std::memcpy(&bytes, packed, 8);
    store<stream>(out, _mm512_castps_si512(lookup16(table, _mm512_set1_epi64(bytes))));
  }
  if (count > 0) _mm512_mask_storeu_ps(out, __mmask16((1u << count) - 1), lookup16(table, load_tail(packed, count)));
}

template <DType dtype, bool stream, typename Out>
void decode_as(const Weight4& w, int64_t begin, int64_t end, Out* out) {
  const float* code = w.book().code;
  const __m512 codes = _mm512_loadu_ps(code);
  for_each_run(
      w, begin, end, out, [&](float scale, int nibble, Out* to) { store_f32(to, 0, dtype, code[nibble] * scale); },
      [&](float scale, const uint8_t* packed, int64_t count, Out* to) {
        if constexpr (dtype == DType::F32) {
          run_float<stream>(_mm512_mul_ps(codes, _mm512_set1_ps(scale)), packed, count, to);
        } else {
          run_half<stream>(dtype == DType::BF16 ? bf16_table(codes, scale) : f16_table(codes, scale), packed, count,
                           to);
        }
      });
  if (stream) _mm_sfence();
}

template <DType dtype, typename Out>
void decode_to(const Weight4& w, int64_t begin, int64_t end, Out* out, bool stream) {
  // Streaming stores take whole cache lines: every piece must start on one.
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && w.blocksize % 32 == 0 && begin % w.blocksize == 0;
  if (stream && aligned) {
    decode_as<dtype, true>(w, begin, end, out);
  } else {
    decode_as<dtype, false>(w, begin, end, out);
  }
}

}  // namespace

void decode_avx512(const Weight4& w, int64_t begin, int64_t end, void* out, DType dtype, bool stream) {
  if (dtype == DType::F32) return decode_to<DType::F32>(w, begin, end, static_cast<float*>(out), stream);
  if (dtype == DType::F16) return decode_to<DType::F16>(w, begin, end, static_cast<uint16_t*>(out), stream);
  return decode_to<DType::BF16>(w, begin, end, static_cast<uint16_t*>(out), stream);
}

}  // namespace peft_kernels

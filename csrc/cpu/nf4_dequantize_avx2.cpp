// Decode without AVX-512: byte shuffles look up the low and the high byte of each 16-bit element; float32 takes two
// 8-entry permutes and a blend.
#include <immintrin.h>

#include "cpu/nf4_kernels.h"

namespace peft_kernels {
namespace {

struct ByteTables {
  __m256i low, high;  // byte i of each half: the low / high byte of the scaled code i
};

// Eight floats to bfloat16 bits, each in the low word of its lane.
inline __m256i to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}

inline ByteTables split(__m128i first, __m128i second) {
  const __m128i mask = _mm_set1_epi16(0xff);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
  return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

template <DType dtype>
inline ByteTables byte_tables(const float* code, float scale) {
  const __m256 first = _mm256_mul_ps(_mm256_loadu_ps(code), _mm256_set1_ps(scale));
  const __m256 second = _mm256_mul_ps(_mm256_loadu_ps(code + 8), _mm256_set1_ps(scale));
  if (dtype == DType::F16)
    return split(_mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bf16(first), to_bf16(second)), 0xd8);
  return split(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline void store256(void* out, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(out), value); }

// The elements of 32 indices, one per byte: those of the lower 16 at `first`, of the upper at `second`.
inline void lookup(const ByteTables& tables, __m256i indices, uint16_t* first, uint16_t* second) {
  const __m256i low = _mm256_shuffle_epi8(tables.low, indices), high = _mm256_shuffle_epi8(tables.high, indices);
  const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);  // eights of each half
  store256(first, _mm256_permute2x128_si256(even, odd, 0x20));
  store256(second, _mm256_permute2x128_si256(even, odd, 0x31));
}

inline void run_half(const ByteTables& tables, const uint8_t* packed, int64_t count, uint16_t* out) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (; count >= 64; count -= 64, packed += 32, out += 64) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), odd = _mm256_and_si256(bytes, mask);
    lookup(tables, _mm256_unpacklo_epi8(even, odd), out, out + 32);
    lookup(tables, _mm256_unpackhi_epi8(even, odd), out + 16, out + 48);
  }
  if (count >= 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), low = _mm256_castsi256_si128(mask);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), odd = _mm_and_si128(bytes, low);
    lookup(tables, _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd)), out, out + 16);
    count -= 32, packed += 16, out += 32;
  }
  if (count == 0) return;
  uint8_t low[16], high[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(tables.low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_castsi256_si128(tables.high));
  for (int64_t i = 0; i < count; ++i) {
    const int nibble = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
    out[i] = uint16_t(low[nibble] | high[nibble] << 8);
  }
}

inline void run_float(const float* code, float scale, const uint8_t* packed, int64_t count, float* out) {
  const __m256 lower = _mm256_mul_ps(_mm256_loadu_ps(code), _mm256_set1_ps(scale));
  const __m256 upper = _mm256_mul_ps(_mm256_loadu_ps(code + 8), _mm256_set1_ps(scale));
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  for (; count >= 8; count -= 8, packed += 4, out += 8) {
    int bytes;
    std::memcpy(&bytes, packed, 4);
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts);  // vpermps reads 3 index bits
    const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28));
    _mm256_storeu_ps(out, _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, nibbles),
                                           _mm256_permutevar8x32_ps(upper, nibbles), fourth_bit));
  }
  for (int64_t i = 0; i < count; ++i) out[i] = code[i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15] * scale;
}

template <DType dtype, typename Out>
void decode_to(const Weight4& w, int64_t begin, int64_t end, Out* out) {
  const float* code = w.book().code;
  for_each_run(
      w, begin, end, out, [&](float scale, int nibble, Out* to) { store_f32(to, 0, dtype, code[nibble] * scale); },
      [&](float scale, const uint8_t* packed, int64_t count, Out* to) {
        if constexpr (dtype == DType::F32) {
          run_float(code, scale, packed, count, to);
        } else {
          run_half(byte_tables<dtype>(code, scale), packed, count, to);
        }
      });
}

}  // namespace

void decode_avx2(const Weight4& w, int64_t begin, int64_t end, void* out, DType dtype) {
  if (dtype == DType::F32) return decode_to<DType::F32>(w, begin, end, static_cast<float*>(out));
  if (dtype == DType::F16) return decode_to<DType::F16>(w, begin, end, static_cast<uint16_t*>(out));
  return decode_to<DType::BF16>(w, begin, end, static_cast<uint16_t*>(out));
}

}  // namespace peft_kernels

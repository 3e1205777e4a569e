// The column pass as plain loops, for the compiler to vectorize with whatever the including file may use.
#pragma once

#include "cpu/columns_kernels.h"

namespace peft_kernels {
namespace {

struct ElementF32 {
  using type = float;
  static PK_INLINE float load(float value) { return value; }
  static PK_INLINE float store(float value) { return value; }
};

struct ElementF16 {
  using type = uint16_t;
  static PK_INLINE float load(uint16_t value) { return f16_to_f32(value); }
  static PK_INLINE uint16_t store(float value) { return f32_to_f16(value); }
};

struct ElementBf16 {
  using type = uint16_t;
  static PK_INLINE float load(uint16_t value) { return bf16_to_f32(value); }
  static PK_INLINE uint16_t store(float value) { return f32_to_bf16(value); }
};

template <typename E>
void run(const ColumnPass& pass, int64_t m0, int64_t m1, int64_t n0, int64_t count, float* sums, float* products) {
  using T = typename E::type;
  for (int64_t i = 0; sums && i < count; ++i) sums[i] = 0;
  for (int64_t i = 0; products && i < count; ++i) products[i] = 0;
  int64_t m = m0;
  // Four rows at a time: the sums are loaded and stored once for them, and they are added as a tree.
  for (; m < m1; m += m + 4 <= m1 ? 4 : 1) {
    const bool four = m + 4 <= m1;
    const T* u = (const T*)pass.u + m * pass.ldu + n0;
    const T *u1 = u + pass.ldu, *u2 = u1 + pass.ldu, *u3 = u2 + pass.ldu;
    if (sums && four) {
      for (int64_t i = 0; i < count; ++i)
        sums[i] += (E::load(u[i]) + E::load(u1[i])) + (E::load(u2[i]) + E::load(u3[i]));
    } else if (sums) {
      for (int64_t i = 0; i < count; ++i) sums[i] += E::load(u[i]);
    }
    if (products) {
      const T* v = (const T*)pass.v + m * pass.ldv + n0;
      const T *v1 = v + pass.ldv, *v2 = v1 + pass.ldv, *v3 = v2 + pass.ldv;
      if (four) {
        for (int64_t i = 0; i < count; ++i)
          products[i] += (E::load(u[i]) * E::load(v[i]) + E::load(u1[i]) * E::load(v1[i])) +
                         (E::load(u2[i]) * E::load(v2[i]) + E::load(u3[i]) * E::load(v3[i]));
      } else {
        for (int64_t i = 0; i < count; ++i) products[i] += E::load(u[i]) * E::load(v[i]);
      }
    }
    if (!pass.out) continue;
    for (int64_t row = 0; row < (four ? 4 : 1); ++row) {
      const T* from = u + row * pass.ldu;
      T* to = (T*)pass.out + (m + row) * pass.ldo + n0;
#pragma GCC ivdep  // in place, an element depends on itself alone
      for (int64_t i = 0; i < count; ++i) to[i] = E::store(E::load(from[i]) * pass.scale[n0 + i]);
    }
  }
}

void run(const ColumnPass& pass, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums, float* products) {
  if (pass.dtype == DType::BF16) return run<ElementBf16>(pass, m0, m1, n0, n1 - n0, sums, products);
  if (pass.dtype == DType::F16) return run<ElementF16>(pass, m0, m1, n0, n1 - n0, sums, products);
  run<ElementF32>(pass, m0, m1, n0, n1 - n0, sums, products);
}

}  // namespace
}  // namespace peft_kernels

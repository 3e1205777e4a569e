// PK_INLINE: for every function in a header that files of different instruction sets include.
//
// A plain inline function may be emitted out of line by any of them, and the linker keeps one copy: an AVX-512 body
// could then serve the scalar file on a machine without AVX-512. Always inlined means never emitted. For the same
// reason *_avx2.cpp and *_avx512.cpp files keep their helpers in an anonymous namespace and use no std templates.
#pragma once

#include <cstdint>

#define PK_INLINE inline __attribute__((always_inline))

namespace peft_kernels {
namespace {

PK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace peft_kernels

// Argument checks and sizes that the operations share. Include from baseline files only.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/dtype.h"

namespace peft_kernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline void require(bool ok, const char* function, const std::string& message) {
  if (!ok) throw std::invalid_argument(std::string(function) + ": " + message);
}

inline void check_matrix(const char* function, const char* name, const void* data, DType dtype, int64_t rows,
                         int64_t columns, int64_t ld) {
  const std::string what = name;
  int64_t span;
  require(dtype == DType::F32 || dtype == DType::F16 || dtype == DType::BF16, function,
          what + " has an unknown dtype, expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  require(rows >= 0 && columns >= 0, function, what + " has a negative size");
  require(ld >= columns, function,
          what + " has row stride " + std::to_string(ld) + ", expected at least " + std::to_string(columns));
  require(!__builtin_mul_overflow(rows, ld, &span) && span <= INT64_MAX / 8, function, what + " is too large");
  require(data || rows == 0 || columns == 0, function, what + " is null");
}

inline void check_dropout(const char* function, double p, int64_t rows, int64_t columns) {
  require(p >= 0 && p <= 1, function, "dropout_p must be in [0, 1], got " + std::to_string(p));
  require(p == 0 || (rows <= INT64_C(1) << 32 && columns <= INT64_C(1) << 34), function,
          "dropout needs at most 2^32 rows and 2^34 columns: its counters are 32 bits");
}

}  // namespace peft_kernels

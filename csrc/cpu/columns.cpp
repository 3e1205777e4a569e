#include "cpu/columns.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/columns_kernels.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements that a thread passes over in about ten microseconds

ColumnKernel kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::Avx512) return columns_avx512;
  if (isa() == Isa::Avx2) return columns_avx2;
#endif
  return columns_scalar;
}

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("scale_and_sum_columns: " + message);
}

void check_matrix(const char* name, const void* data, int64_t N, int64_t ld) {
  require(data != nullptr, std::string(name) + " must not be null");
  require(ld >= N, std::string(name) + ": the row stride is shorter than a row");
}

}  // namespace

void scale_and_sum_columns(const void* u, DType dtype, int64_t M, int64_t N, int64_t ldu, const void* v, int64_t ldv,
                           const float* scale, void* out, int64_t ldo, float* sums, float* products) {
  require(M >= 0 && N >= 0, "M and N must not be negative");
  if (N == 0) return;
  if (M > 0) {
    check_matrix("u", u, N, ldu);
    if (products) check_matrix("v", v, N, ldv);
    if (out) check_matrix("out", out, N, ldo);
    require(!out || scale, "out needs a scale");
  }
  // Rows are cut by M alone, so that the sums do not depend on the threads.
  const int64_t cuts = std::max<int64_t>(1, (M + kColumnRows - 1) / kColumnRows);
  const int64_t blocks = (N + kColumnBlock - 1) / kColumnBlock;
  const bool planes = cuts > 1;
  const std::unique_ptr<float[]> partial(planes && (sums || products) ? new float[size_t(2 * cuts * N)] : nullptr);
  float* const sum_planes = planes && sums ? partial.get() : sums;
  float* const product_planes = planes && products ? partial.get() + cuts * N : products;
  const ColumnPass pass = {u, v, scale, out, dtype, ldu, ldv, ldo};
  const ColumnKernel run = kernel();
  const int threads = threads_for(M * N, kGrain);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < cuts * blocks; ++item) {
      const int64_t cut = item / blocks, n0 = item % blocks * kColumnBlock, offset = cut * N + n0;
      run(pass, cut * kColumnRows, std::min(M, (cut + 1) * kColumnRows), n0, std::min(N, n0 + kColumnBlock),
          sum_planes ? sum_planes + offset : nullptr, product_planes ? product_planes + offset : nullptr);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < (planes ? N : 0); ++n) {
      float sum = 0, product = 0;
      for (int64_t cut = 0; cut < cuts; ++cut) {
        if (sums) sum += sum_planes[cut * N + n];
        if (products) product += product_planes[cut * N + n];
      }
      if (sums) sums[n] = sum;
      if (products) products[n] = product;
    }
  }
}

}  // namespace peft_kernels

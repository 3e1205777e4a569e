#include "cpu/prompt_embedding.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/threads.h"

namespace peft_kernels {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements for which waking a thread pays
constexpr int64_t kColumns = 1024;   // float32 sums that stay in L1

template <DType dtype>
void add(const void* row, int64_t first, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += load_f32(row, first + i, dtype);
}

// out[0, hidden) = the sum of `rows` rows of elements, the i-th at offset(i), rounded once.
template <typename Offset>
void sum_rows(const void* data, DType dtype, int64_t rows, Offset offset, void* out, DType out_dtype, int64_t hidden) {
  float sums[kColumns];
  for (int64_t first = 0; first < hidden; first += kColumns) {
    const int64_t count = std::min(kColumns, hidden - first);
    std::fill_n(sums, count, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = offset(i) + first;
      if (dtype == DType::F32) {
        add<DType::F32>(data, at, count, sums);
      } else if (dtype == DType::BF16) {
        add<DType::BF16>(data, at, count, sums);
      } else {
        add<DType::F16>(data, at, count, sums);
      }
    }
    for (int64_t i = 0; i < count; ++i) store_f32(out, first + i, out_dtype, sums[i]);
  }
}

}  // namespace

void prompt_embedding_forward(const int64_t* ids, int64_t batch, int64_t length, const void* weight, int64_t vocabulary,
                              int64_t ld_weight, const void* prompt, int64_t tokens, int64_t ld_prompt, int64_t hidden,
                              DType dtype, void* out) {
  for (int64_t i = 0; i < batch * length; ++i)
    if (ids[i] < 0 || ids[i] >= vocabulary)
      throw std::invalid_argument("input_ids: expected ids from 0 to " + std::to_string(vocabulary - 1) + ", got " +
                                  std::to_string(ids[i]) + ". Tokenize with the vocabulary of this embedding.");
  const int64_t size = dtype_size(dtype), rows = tokens + length;
  const int threads = threads_for(batch * rows * hidden, kGrain);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < batch * rows; ++row) {
    const int64_t b = row / rows, at = row % rows;
    const char* from = at < tokens
                           ? static_cast<const char*>(prompt) + at * ld_prompt * size
                           : static_cast<const char*>(weight) + ids[b * length + at - tokens] * ld_weight * size;
    std::memcpy(static_cast<char*>(out) + row * hidden * size, from, hidden * size);
  }
}

void prompt_embedding_dprompt(const void* dy, DType dtype, int64_t batch, int64_t stride_batch, int64_t stride_row,
                              void* out, DType out_dtype, int64_t tokens, int64_t hidden) {
  const int threads = threads_for(batch * tokens * hidden, kGrain);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t)
    sum_rows(
        dy, dtype, batch, [=](int64_t b) { return b * stride_batch + t * stride_row; },
        static_cast<char*>(out) + t * hidden * dtype_size(out_dtype), out_dtype, hidden);
}

void prompt_embedding_dweight(const void* dy, DType dtype, int64_t length, int64_t stride_batch, int64_t stride_row,
                              const int64_t* ids, const int64_t* order, int64_t count, void* out, int64_t hidden) {
  const int threads = threads_for(count * hidden, kGrain);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16) if (threads > 1)
  for (int64_t first = 0; first < count; ++first) {
    if (first > 0 && ids[first] == ids[first - 1]) continue;  // belongs to the run that began before
    int64_t last = first + 1;
    while (last < count && ids[last] == ids[first]) ++last;
    sum_rows(
        dy, dtype, last - first,
        [=](int64_t i) {
          const int64_t row = order[first + i];
          return row / length * stride_batch + row % length * stride_row;
        },
        static_cast<char*>(out) + ids[first] * hidden * dtype_size(dtype), dtype, hidden);
  }
}

}  // namespace peft_kernels

#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/nf4_codec.h"
#include "cpu/nf4_kernels.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

// The index of the code nearest to v; the bounds below v are counted. A NaN is above them all.
int nearest(const CodeBook& book, float v) {
  int rank = 0;
  for (int i = 0; i < 15; ++i) rank += !(v <= book.bound(i));
  return book.order[rank];
}

template <DType dtype>
void quantize_block_scalar(const QuantizeJob& job, int64_t block) {
  const int64_t first = block * job.blocksize;
  const int64_t count = std::min(job.blocksize, job.numel - first);
  uint32_t top = 0;  // magnitudes compare as integers, and NaN is above infinity
  for (int64_t i = 0; i < count; ++i) top = std::max(top, float_bits(load_f32(job.x, first + i, dtype)) & 0x7fffffffu);
  const float absmax = bits_float(top);
  const float divisor = absmax < kTinyAbsmax ? kTinyAbsmax : absmax;
  const bool partial = count < job.blocksize;
  job.absmax[block] = partial ? divisor : absmax;
  const float inverse = 1.0f / divisor;
  const auto code = [&](int64_t i) {
    if (i >= count) return nearest(*job.book, 0.0f);  // the unused nibble of an odd size
    const float x = load_f32(job.x, first + i, dtype);
    return nearest(*job.book, partial ? x / divisor : x * inverse);
  };
  for (int64_t i = 0; i < count; i += 2) job.packed[(first + i) / 2] = uint8_t(code(i) << 4 | code(i + 1));
}

void quantize_scalar(const QuantizeJob& job, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    if (job.dtype == DType::F32) quantize_block_scalar<DType::F32>(job, block);
    if (job.dtype == DType::F16) quantize_block_scalar<DType::F16>(job, block);
    if (job.dtype == DType::BF16) quantize_block_scalar<DType::BF16>(job, block);
  }
}

void quantize_blocks(const QuantizeJob& job, int64_t first, int64_t last) {
#if defined(__x86_64__)
  if (job.blocksize % 16 == 0) {
    const int64_t whole = std::max(first, std::min(last, job.numel / job.blocksize));
    if (isa() >= Isa::Avx512) {
      quantize_blocks_avx512(job, first, whole);
      first = whole;
    } else if (isa() == Isa::Avx2) {
      quantize_blocks_avx2(job, first, whole);
      first = whole;
    }
  }
#endif
  quantize_scalar(job, first, last);
}

}  // namespace

void quantize_4bit(const void* x, DType dtype, int64_t numel, int64_t blocksize, QuantType quant_type, uint8_t* packed,
                   float* absmax) {
  if (numel < 0) throw std::invalid_argument("quantize_4bit: numel must not be negative");
  if (blocksize < 2 || blocksize % 2 != 0)
    throw std::invalid_argument("quantize_4bit: blocksize must be even and at least 2, got " +
                                std::to_string(blocksize));
  if (numel == 0) return;
  if (!x || !packed || !absmax) throw std::invalid_argument("quantize_4bit: x, packed and absmax must not be null");

  constexpr int64_t kGrain = 1 << 14;
  const QuantizeJob job{x, dtype, numel, blocksize, &kCodeBooks[quant_type], packed, absmax};
  const int64_t blocks = (numel - 1) / blocksize + 1;
  const int threads = threads_for(numel, kGrain);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int t = 0; t < threads; ++t) quantize_blocks(job, blocks * t / threads, blocks * (t + 1) / threads);
}

}  // namespace peft_kernels

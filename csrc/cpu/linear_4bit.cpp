#include "cpu/linear_4bit.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/linear_4bit_kernels.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

constexpr int64_t kDotRows = 24;  // above, decoding a panel once beats decoding in registers for every 8 rows
// Rows of `in` whose multiplication takes as long as decoding a panel: what a split over rows repeats.
constexpr int64_t kForwardDecodeRows = 12, kBackwardDecodeRows = 6;
// The same of the float32 kernels, the rows that they multiply at a time, and how many of float32 AVX2 takes at all.
constexpr int64_t kF32ForwardDecodeRows = 8, kF32BackwardDecodeRows = 5, kF32Rows = 256, kF32RowsAvx2 = 64;
constexpr int64_t kGrain = 1 << 18;  // products a thread does in about ten microseconds at M = 1

void require(bool ok, const char* function, const std::string& message) {
  if (!ok) throw std::invalid_argument(std::string(function) + ": " + message);
}

bool blocks_fit(int64_t K, int64_t blocksize) { return blocksize % 64 == 0 && K % blocksize == 0; }

bool has_bf16_kernels(DType dtype) { return dtype == DType::BF16 && isa() == Isa::Avx512Bf16; }

// Beyond these rows, decoding a panel (Scalar: to scratch, for the vendor's GEMM) is faster.
int64_t small_rows() { return isa() == Isa::Scalar ? 2 : kLinear4SmallRows; }

// Half precision would have to be widened for the vendor's float32 GEMM too; beyond some rows of float32, that GEMM
// wins. 4096 x 4096 on Skylake, vendor's time / ours, forward and dX, AVX-512: 256 rows 1.20 and 1.14, 512 rows 1.01
// and 0.98; AVX2: 64 rows 1.30 and 1.11, 128 rows 1.10 and 0.94; bfloat16: 16 rows 1.4 and 1.6, 512 rows 1.07 and 0.98.
bool has_panels(DType dtype, int64_t M) {
  if (isa() < Isa::Avx2) return false;
  return dtype != DType::F32 || M <= (isa() == Isa::Avx2 ? kF32RowsAvx2 : kF32Rows);
}

#if defined(__x86_64__)

// blocks of lanes x splits of rows over the threads: the number of splits that finishes first.
int64_t row_splits(int64_t panels, int64_t M, int64_t decode_rows, int64_t threads) {
  int64_t best = 1, best_time = INT64_MAX;
  for (int64_t splits = 1; splits <= threads && splits <= M; ++splits) {
    const int64_t rounds = (panels * splits + threads - 1) / threads;
    const int64_t time = rounds * (decode_rows + (M + splits - 1) / splits);
    if (time < best_time) best = splits, best_time = time;
  }
  return best;
}

using Panel = void (*)(const Linear4Job&, int64_t lane0, int64_t m0, int64_t m1);

void run_panels(const Linear4Job& job, int64_t m0, int64_t m1, int64_t lanes, int64_t decode_rows, int threads,
                Panel panel) {
  const int64_t panels = (lanes + kLinear4Lanes - 1) / kLinear4Lanes, rows = m1 - m0;
  const int64_t splits = row_splits(panels, rows, decode_rows, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t item = 0; item < panels * splits; ++item) {
    const int64_t split = item % splits;
    panel(job, item / splits * kLinear4Lanes, m0 + rows * split / splits, m0 + rows * (split + 1) / splits);
  }
}

// Of the work, an eighth goes to the thread that comes for it: the two processors seldom run equally fast (where one
// was disturbed, M = 24 took 11 % less time so; more than an eighth costs, as W is no longer read in one stream).
void run_dot(const Linear4Job& job, int threads) {
  const int64_t N = job.weight->N, items = (N + kLinear4DotLanes - 1) / kLinear4DotLanes;
  const int64_t shared = threads > 1 ? items / 8 : 0, divided = items - shared;
  int64_t next = divided;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
    const uint16_t* x = linear4_dot_input_avx512bf16(job);
    int64_t from = divided * t / team, to = divided * (t + 1) / team;
    do {
      const int64_t n0 = from * kLinear4DotLanes, n1 = std::min(N, to * kLinear4DotLanes);
      if (n0 < n1) linear4_dot_avx512bf16(job, x, n0, n1);
#pragma omp atomic capture
      from = next++;
      to = from + 1;
    } while (from < items);
  }
}

const Linear4F32Kernels& f32_kernels() { return isa() >= Isa::Avx512 ? kLinear4F32Avx512 : kLinear4F32Avx2; }

// Row blocks so that their part of `in` and their sums stay in a core's L2: 512 rows take 12 % longer at once.
void run_f32(const Linear4Job& job, int64_t length, int64_t lanes, int64_t decode_rows, int threads, Panel panel) {
  const int64_t blocks = (job.M + kF32Rows - 1) / kF32Rows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t m0 = job.M * block / blocks, m1 = job.M * (block + 1) / blocks;
    const int64_t ld = length + 16;  // rows a power of two apart would share few sets of the cache
    float* copy = (float*)linear4_scratch(Linear4Scratch::Input, size_t((m1 - m0) * ld) * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t m = m0; m < m1; ++m) f32_kernels().widen_row(job, m, length, copy + (m - m0) * ld);
    Linear4Job wide = job;
    wide.in_f32 = copy, wide.ld_in_f32 = ld, wide.first_f32 = m0;
    run_panels(wide, m0, m1, lanes, decode_rows, threads, panel);
  }
}

void run_forward(const Linear4Job& job, int threads) {
  const Weight4& w = *job.weight;
  if (!has_bf16_kernels(job.dtype))
    return run_f32(job, w.K, w.N, kF32ForwardDecodeRows, threads, f32_kernels().forward_panel);
  if (job.M <= kDotRows) return run_dot(job, threads);
  run_panels(job, 0, job.M, w.N, kForwardDecodeRows, threads, linear4_forward_panel_avx512bf16);
}

void run_backward(const Linear4Job& job, int threads) {
  const Weight4& w = *job.weight;
  if (!has_bf16_kernels(job.dtype))
    return run_f32(job, w.N, w.K, kF32BackwardDecodeRows, threads, f32_kernels().backward_panel);
  run_panels(job, 0, job.M, w.K, kBackwardDecodeRows, threads, linear4_backward_panel_avx512bf16);
}

#else  // never called: has_panels() is false

void run_forward(const Linear4Job&, int) {}
void run_backward(const Linear4Job&, int) {}

#endif

void check_matrix(const char* function, const char* name, const void* data, int64_t columns, int64_t ld) {
  require(data != nullptr, function, std::string(name) + " must not be null");
  require(ld >= columns, function, std::string(name) + ": the row stride is shorter than a row");
}

template <typename Term>
Linear4Term common_term(const char* function, const Term& term) {
  Linear4Term out{};
  out.left = reinterpret_cast<const float*>(std::get<0>(term));
  out.ld = std::get<1>(term);
  out.right = reinterpret_cast<const void*>(std::get<2>(term));
  require(std::get<3>(term) >= 0 && std::get<3>(term) <= 2, function, "a term's dtype code must be 0, 1 or 2");
  out.dtype = DType(std::get<3>(term));
  out.r = std::get<4>(term);
  require(out.r >= 1 && out.ld >= out.r, function, "a term needs 1 <= r <= its row stride");
  require(out.left && out.right, function, "a term's pointers must not be null");
  return out;
}

int64_t ranks(const std::vector<Linear4Term>& terms) {
  int64_t sum = 0;
  for (const Linear4Term& term : terms) sum += term.r;
  return sum;
}

}  // namespace

void* linear4_scratch(Linear4Scratch slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[int(Linear4Scratch::Count)];
  Buffer& buffer = buffers[int(slot)];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = rounded;
  }
  return buffer.data;
}

bool linear_4bit_forward_supported(DType dtype, int64_t M, int64_t K, int64_t blocksize) {
  return blocks_fit(K, blocksize) && (has_panels(dtype, M) || M <= small_rows());
}

bool linear_4bit_backward_supported(DType dtype, int64_t M, int64_t K, int64_t blocksize) {
  return blocks_fit(K, blocksize) && has_panels(dtype, M);
}

void linear_4bit_forward(const void* x, DType dtype, int64_t M, int64_t ldx, const Weight4& w, const void* bias,
                         DType bias_dtype, const std::vector<ForwardTerm>& terms, void* y, int64_t ldy,
                         const float* out_scale, void* unscaled) {
  constexpr const char* kName = "linear_4bit_forward";
  require(M >= 0, kName, "M must not be negative");
  require(linear_4bit_forward_supported(dtype, M, w.K, w.blocksize), kName, "unsupported dtype, M, K or blocksize");
  if (M == 0 || w.N == 0) return;
  require(w.K > 0, kName, "K must be positive");
  check_matrix(kName, "x", x, w.K, ldx);
  check_matrix(kName, "y", y, w.N, ldy);
  require(out_scale || !unscaled, kName, "unscaled needs an out_scale");
  std::vector<Linear4Term> common;
  for (const ForwardTerm& term : terms) {
    common.push_back(common_term(kName, term));
    common.back().scaling = float(std::get<5>(term));
  }
  Linear4Job job{x, dtype, M, ldx, &w, bias, bias_dtype, common.data(), int64_t(common.size()), ranks(common), y, ldy};
  job.out_scale = out_scale;
  job.unscaled = unscaled;
  const int threads = threads_for(M * w.numel(), kGrain);
  if (!has_bf16_kernels(dtype) && M <= small_rows()) return linear4_small_forward(job, threads);
  run_forward(job, threads);
}

void linear_4bit_backward(const void* dy, DType dtype, int64_t M, int64_t ldy, const Weight4& w,
                          const std::vector<BackwardTerm>& terms, void* dx, int64_t ldx, const float* in_scale) {
  constexpr const char* kName = "linear_4bit_backward";
  require(M >= 0, kName, "M must not be negative");
  require(linear_4bit_backward_supported(dtype, M, w.K, w.blocksize), kName, "unsupported dtype, K or blocksize");
  if (M == 0 || w.K == 0) return;
  require(w.N > 0, kName, "N must be positive");
  check_matrix(kName, "dy", dy, w.N, ldy);
  check_matrix(kName, "dx", dx, w.K, ldx);
  std::vector<Linear4Term> common;
  for (const BackwardTerm& term : terms) {
    common.push_back(common_term(kName, term));
    common.back().scaling = 1.0f;
    common.back().p = std::get<5>(term);
    common.back().seed = std::get<6>(term);
    require(common.back().p >= 0 && common.back().p <= 1, kName, "dropout p must be in [0, 1]");
  }
  Linear4Job job{dy, dtype, M, ldy, &w, nullptr, dtype, common.data(), int64_t(common.size()), ranks(common), dx, ldx};
  job.in_scale = in_scale;
  const int threads = threads_for(M * w.numel(), kGrain);
  run_backward(job, threads);
}

}  // namespace peft_kernels

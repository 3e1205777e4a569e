#include "cpu/lora.h"

#include <algorithm>
#include <cstring>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/lora_kernels.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

// A thread more for each 25 us of work at the float32 peak of a Zen 4 core (108 GFLOP/s).
constexpr int64_t kFlopsPerThread = 2'500'000;
// What else an element costs, in the FLOPs that fit into the same time (Zen 4): a Philox word; one of P from L2 or L3.
constexpr int64_t kDropoutFlops = 48, kParameterFlops = 12;

const LoraKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::Avx512Bf16:
      return kLoraAvx512Bf16;
    case Isa::Avx512:
      return kLoraAvx512;
    case Isa::Avx2:
      return kLoraAvx2;
    case Isa::Scalar:
      break;
  }
#endif
  return kLoraScalar;
}

// Panels of P for `shrink`: P itself when few rows would not repay a copy, else where to pack it.
ShrinkPanels plan_panels(const LoraKernels& kernel, const Matrix& x, int64_t M, int64_t K, const Matrix& p,
                         bool p_is_kr, int64_t r, bool dropout) {
  const bool pairs = kernel.multiplies_bf16 && x.dtype == DType::BF16 && p.dtype == DType::BF16 && !dropout;
  const bool packed = M > kernel.direct_rows || p_is_kr || (p.dtype != DType::F32 && !pairs);
  if (!packed) return {p.data, p.dtype, false, false, K, 0, p.ld};
  const DType dtype = pairs ? DType::BF16 : DType::F32;
  const bool split = kernel.splits_bf16 && x.dtype == DType::BF16 && !dropout && !pairs;
  const int64_t block_k = kPanelBytes / dtype_size(dtype);
  void* panels = lora_scratch(0, size_t(ceil_div(K, block_k)) * r * kPanelBytes);
  return {panels, dtype, true, split, block_k, r * block_k, block_k};
}

}  // namespace

void* lora_scratch(int slot, size_t bytes) {
  static thread_local AlignedBuffer buffers[3];
  return buffers[slot].reserve(bytes);
}

void lora_shrink(const Matrix& x, int64_t M, int64_t K, const Matrix& p, bool p_is_kr, int64_t r, float alpha,
                 const Dropout& dropout, float* S, int64_t ldS) {
  const char* function = "lora_shrink";
  check_matrix(function, "x", x.data, x.dtype, M, K, x.ld);
  check_matrix(function, "P", p.data, p.dtype, p_is_kr ? K : r, p_is_kr ? r : K, p.ld);
  check_matrix(function, "S", S, DType::F32, M, r, ldS);
  check_dropout(function, dropout.p, M, K);
  if (M == 0 || r == 0) return;
  if (K == 0) {
    for (int64_t m = 0; m < M; ++m) std::fill_n(S + m * ldS, r, 0.0f);
    return;
  }
  const LoraKernels& kernel = kernels();
  const ShrinkPanels panels = plan_panels(kernel, x, M, K, p, p_is_kr, r, dropout.active());
  const int64_t flops = M * K * (2 * r + (dropout.active() ? kDropoutFlops : 0)) + K * r * kParameterFlops;
  const int threads = threads_for(flops, kFlopsPerThread);
  // Any cut gives the same sums: each is over all of K, in one order.
  const int64_t blocks = threads * ceil_div(M, threads * kShrinkRows), rows = round_up(ceil_div(M, blocks), 3);
  const int64_t ranks = panels.packed || dropout.active() ? kShrinkRanks : 8;
  const int64_t row_items = ceil_div(M, rows), items = row_items * ceil_div(r, ranks);
  const int64_t k_blocks = panels.packed ? ceil_div(K, panels.block_k) : 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < k_blocks; ++b) {
      const int64_t k0 = b * panels.block_k, kn = std::min(panels.block_k, K - k0);
      kernel.pack_panel(p, p_is_kr, r, k0, kn, panels, (char*)panels.data + b * r * kPanelBytes);
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t m0 = item % row_items * rows, j0 = item / row_items * ranks;
      kernel.shrink(x, dropout, m0, std::min(M, m0 + rows), K, panels, j0, std::min(r, j0 + ranks), alpha, S, ldS);
    }
  }
}

void lora_wgrad(const Matrix& x, int64_t M, int64_t I, const float* P, int64_t ldP, int64_t r, float alpha,
                const Dropout& dropout, void* out, DType out_dtype, bool out_is_ri) {
  const char* function = "lora_wgrad";
  check_matrix(function, "x", x.data, x.dtype, M, I, x.ld);
  check_matrix(function, "P", P, DType::F32, M, r, ldP);
  check_matrix(function, "out", out, out_dtype, I, r, r);
  check_dropout(function, dropout.p, M, I);
  if (I == 0 || r == 0) return;
  const LoraKernels& kernel = kernels();
  const int64_t tiles = ceil_div(I, kTile), tile_size = r * kTile;
  const int threads = threads_for(M * I * (2 * r + (dropout.active() ? kDropoutFlops : 0)), kFlopsPerThread);
  // Narrow matrices are also cut along M, by their shape alone, so that the sums do not depend on the threads.
  const int64_t chunks = tiles >= 32 ? 1 : std::min<int64_t>(8, ceil_div(M, 512) + (M == 0));
  const int64_t chunk_rows = round_up(ceil_div(M, chunks), 8);
  const int64_t piece = std::clamp<int64_t>(tiles * chunks / (4 * threads), 1, 16);  // tiles: 16 are 1 KB of a bf16 row
  const int64_t pieces = ceil_div(tiles, piece);
  float* sums = (float*)lora_scratch(0, size_t(chunks) * tiles * tile_size * sizeof(float));
  const auto store = [&](int64_t tile, int64_t end) {
    kernel.wgrad_store(sums + tile * tile_size, r, tile * kTile, std::min(I, end * kTile), I, alpha, out, out_dtype,
                       out_is_ri);
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < pieces * chunks; ++item) {
      const int64_t tile = item % pieces * piece, end = std::min(tiles, tile + piece), chunk = item / pieces;
      const int64_t last_row = std::min(M, (chunk + 1) * chunk_rows);
      float* to = sums + (chunk * tiles + tile) * tile_size;
      std::memset(to, 0, size_t(end - tile) * tile_size * sizeof(float));
      for (int64_t m = chunk * chunk_rows; m < last_row; m += kWgradRows)
        kernel.wgrad(x, dropout, m, std::min(last_row, m + kWgradRows), tile * kTile, std::min(I, end * kTile), P, ldP,
                     r, to);
      if (chunks == 1) store(tile, end);
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < (chunks == 1 ? 0 : tiles); ++tile) {
      float* to = sums + tile * tile_size;
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < tile_size; ++i) to[i] += to[chunk * tiles * tile_size + i];
      store(tile, tile + 1);
    }
  }
}

void lora_expand_add(void* out, DType dtype, int64_t M, int64_t N, int64_t ldo, const ExpandTerm* terms,
                     int64_t count) {
  const char* function = "lora_expand_add";
  check_matrix(function, "out", out, dtype, M, N, ldo);
  int64_t flops = 0;
  for (int64_t t = 0; t < count; ++t) {
    const ExpandTerm& term = terms[t];
    require(term.rank > 0, function, "a term has rank " + std::to_string(term.rank) + ", expected at least 1");
    check_matrix(function, "S", term.s, DType::F32, M, term.rank, term.lds);
    check_matrix(function, "P", term.p.data, term.p.dtype, term.p_is_nr ? N : term.rank, term.p_is_nr ? term.rank : N,
                 term.p.ld);
    check_dropout(function, term.dropout.p, M, N);
    flops += M * N * (2 * term.rank + (term.dropout.active() ? kDropoutFlops : 0)) + N * term.rank * kParameterFlops;
  }
  if (M == 0 || N == 0 || count == 0) return;
  const LoraKernels& kernel = kernels();
  const int threads = threads_for(flops, kFlopsPerThread);
  const int64_t columns = 8 * kTile, column_items = ceil_div(N, columns);
  const int64_t row_cuts = std::min(ceil_div(4 * threads, column_items), ceil_div(M, 64));
  const int64_t rows = round_up(ceil_div(M, row_cuts), 8), items = column_items * ceil_div(M, rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t n0 = item % column_items * columns, m0 = item / column_items * rows;
    kernel.expand_add(out, dtype, ldo, m0, std::min(M, m0 + rows), n0, std::min(N, n0 + columns), terms, count);
  }
}

void philox_mask(uint64_t seed, int64_t M, int64_t K, double p, float* out) {
  check_matrix("philox_mask", "out", out, DType::F32, M, K, K);
  check_dropout("philox_mask", p, M, K);
  const int threads = threads_for(M * K * kDropoutFlops, kFlopsPerThread);
  const LoraKernels& kernel = kernels();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t m = 0; m < M; ++m) kernel.dropout_rows(seed, m, m + 1, K, p, out);
}

}  // namespace peft_kernels

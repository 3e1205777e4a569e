#include "cpu/bottleneck.h"

#include <algorithm>

#include "cpu/bottleneck_kernels.h"
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

constexpr int64_t kFlopsPerThread = 4'000'000;  // about 25 us of a Zen 4 core

const BottleneckKernels& kernels(const Adapter& adapter, DType x) {
#if defined(__x86_64__)
  const bool bf16 = x == DType::BF16 && adapter.down.dtype == DType::BF16 && adapter.up.dtype == DType::BF16;
  switch (isa()) {
    case Isa::Avx512Bf16:
      return bf16 ? kBottleneckBf16Pairs : kBottleneckAvx512;
    case Isa::Avx512:
      return kBottleneckAvx512;
    case Isa::Avx2:
      return kBottleneckAvx2;
    case Isa::Scalar:
      break;
  }
#endif
  return kBottleneckScalar;
}

void check_adapter(const char* function, const Adapter& adapter, int64_t M) {
  require(adapter.r > 0 && adapter.K > 0 && adapter.N > 0, function, "the adapter has a size below 1");
  check_matrix(function, "down", adapter.down.data, adapter.down.dtype, adapter.r, adapter.K, adapter.down.ld);
  check_matrix(function, "up", adapter.up.data, adapter.up.dtype, adapter.N, adapter.r, adapter.up.ld);
  check_dropout(function, adapter.dropout.p, M, adapter.N);
  require(adapter.activation >= Activation::Identity && adapter.activation < Activation::Count, function,
          "unknown activation code " + std::to_string(int(adapter.activation)));
  require(!adapter.add_x || adapter.K == adapter.N, function, "x as residual needs as many outputs as inputs");
  require(adapter.ln_weight.data || !adapter.ln_bias.data, function, "ln_bias is given without ln_weight");
}

// Hands out pieces of one block of memory: first counted, then given.
struct Arena {
  char* memory;
  size_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* piece = memory ? (T*)(memory + used) : nullptr;
    used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

const float* widened(const BottleneckKernels& kernel, const Vector& vector, int64_t count, Arena& arena) {
  if (!vector.data || vector.dtype == DType::F32) return (const float*)vector.data;
  float* to = arena.take<float>(count);
  if (to) kernel.widen(vector, count, to);
  return to ? to : (const float*)vector.data;
}

template <typename Layout>
void lay_out(BottleneckJob& job, const BottleneckKernels& kernel, Layout layout) {
  const auto all = [&](Arena arena) {
    const Adapter& from = job.adapter;
    job.down_bias = widened(kernel, from.down_bias, from.r, arena);
    job.up_bias = widened(kernel, from.up_bias, from.N, arena);
    job.ln_weight = widened(kernel, from.ln_weight, from.K, arena);
    job.ln_bias = widened(kernel, from.ln_bias, from.K, arena);
    job.channel = widened(kernel, from.channel, from.N, arena);
    job.gate = widened(kernel, from.gate, job.M, arena);
    layout(job, arena);
    return arena.used;
  };
  all({(char*)bottleneck_scratch(0, all({nullptr}))});
}

// With pairs of bfloat16 the steps multiply x as it is: see folds_norm.
void use_statistics(BottleneckJob& job, const BottleneckKernels& kernel, const float* stats) {
  if (!job.adapter.ln_weight.data) return;
  job.mean = stats, job.inverse_std = stats + job.M;
  if (kernel.elements == 1) job.x.subtract = job.mean, job.x.row_scale = job.inverse_std;
}

int threads_of(const BottleneckJob& job, int64_t products) {
  const Adapter& adapter = job.adapter;
  return threads_for(2 * products * (job.M + 8) * adapter.r * (adapter.K + adapter.N), kFlopsPerThread);
}

// Blocks of rows that end at whole tiles and keep every thread equally long busy.
struct RowSplit {
  int64_t M, tiles, items;
  RowSplit(int64_t M, int threads) : M(M), tiles(ceil_div(M, kTileRows)) {
    items = std::min(tiles, threads * ceil_div(tiles, threads * (kBlockRows / kTileRows)));
  }
  int64_t begin(int64_t item) const { return std::min(M, tiles * item / items * kTileRows); }
};

}  // namespace

void* bottleneck_scratch(int slot, size_t bytes) {
  static thread_local AlignedBuffer buffers[3];
  return buffers[slot].reserve(bytes);
}

void bottleneck_forward(const Adapter& adapter, const Matrix& x, int64_t M, float ln_eps, const Matrix& residual,
                        void* y, DType y_dtype, void* z, DType z_dtype, float* stats) {
  const char* function = "bottleneck_forward";
  check_adapter(function, adapter, M);
  check_matrix(function, "x", x.data, x.dtype, M, adapter.K, x.ld);
  check_matrix(function, "y", y, y_dtype, M, adapter.N, adapter.N);
  if (z) check_matrix(function, "z", z, z_dtype, M, adapter.r, adapter.r);
  if (residual.data) check_matrix(function, "residual", residual.data, residual.dtype, M, adapter.N, residual.ld);
  require(stats || !adapter.ln_weight.data, function, "stats is null");
  if (M == 0) return;
  const BottleneckKernels& kernel = kernels(adapter, x.dtype);
  BottleneckJob job{};
  job.adapter = adapter, job.M = M, job.rank_lanes = round_up(adapter.r, 16);
  job.ln_eps = ln_eps, job.residual = residual, job.stats = stats;
  job.y = y, job.y_dtype = y_dtype, job.z = z, job.z_dtype = z_dtype;
  job.x = {x, nullptr, nullptr, nullptr, {}};
  use_statistics(job, kernel, stats);
  lay_out(job, kernel, [&](BottleneckJob& to, Arena& arena) {
    const int64_t lanes = round_up(adapter.N, kPanelLanes);
    to.reduce = arena.take<uint32_t>(ceil_div(adapter.K, kernel.elements) * job.rank_lanes);
    to.expand = arena.take<uint32_t>(lanes * ceil_div(adapter.r, kernel.elements));
    to.hidden_bias = arena.take<float>(job.rank_lanes);
    to.hidden_sum = arena.take<float>(job.rank_lanes);
    to.column_scale = arena.take<float>(lanes);
    to.column_bias = arena.take<float>(lanes);
  });
  const int threads = threads_of(job, 1);
  const int64_t packs = kernel.pack_items(job.rank_lanes, adapter.K, adapter.N);
  const RowSplit split(M, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < packs; ++item) kernel.pack_forward(job, item);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < split.items; ++item)
      kernel.forward_rows(job, split.begin(item), split.begin(item + 1));
  }
}

void bottleneck_backward(const Adapter& adapter, const Matrix& x, int64_t M, const Matrix& dy, const Matrix& z,
                         const float* stats, const AdapterGradients& gradients) {
  const char* function = "bottleneck_backward";
  check_adapter(function, adapter, M);
  const bool need_up = gradients.up_weight || gradients.up_bias || gradients.channel;
  const bool need_down = gradients.down_weight || gradients.ln_weight || gradients.ln_bias;
  const bool need_dz = need_down || gradients.down_bias, need_x = need_down || (gradients.dx && adapter.ln_weight.data);
  if (need_x) check_matrix(function, "x", x.data, x.dtype, M, adapter.K, x.ld);
  if (gradients.dx) check_matrix(function, "dx", gradients.dx, gradients.dx_dtype, M, adapter.K, adapter.K);
  check_matrix(function, "dy", dy.data, dy.dtype, M, adapter.N, dy.ld);
  check_matrix(function, "z", z.data, z.dtype, M, adapter.r, z.ld);
  require(stats || !adapter.ln_weight.data, function, "stats is null");
  if (M == 0) return;
  const BottleneckKernels& kernel = kernels(adapter, gradients.dx_dtype);
  BottleneckJob job{};
  job.adapter = adapter, job.M = M, job.rank_lanes = round_up(adapter.r, 16);
  job.inverse_keep = adapter.dropout.p < 1 ? float(1 / (1 - adapter.dropout.p)) : 0.0f;
  job.gradients = gradients, job.saved_z = z;
  job.x = {x, nullptr, nullptr, nullptr, {}};
  use_statistics(job, kernel, stats);
  job.dy = {dy, nullptr, nullptr, nullptr, adapter.dropout};
  job.ld_columns = round_up(ceil_div(M, kernel.elements), 16) + 16;  // no power of two
  const int threads = threads_of(job, 2);
  lay_out(job, kernel, [&](BottleneckJob& to, Arena& arena) {
    Arena same = arena;
    to.weight_scratch = same.take<float>(threads * weight_scratch_floats(adapter.r));
    to.reduce = arena.take<uint32_t>(ceil_div(adapter.N, kernel.elements) * job.rank_lanes);
    to.expand = arena.take<uint32_t>(round_up(adapter.K, kPanelLanes) * ceil_div(adapter.r, kernel.elements));
    arena.used = std::max(arena.used, same.used);
    to.hidden_bias = arena.take<float>(job.rank_lanes);
    to.hidden_sum = arena.take<float>(job.rank_lanes);
    to.dz_sum = arena.take<float>(adapter.r);
    to.dz_mean = arena.take<float>(adapter.r);
    if (gradients.gate && adapter.up_bias.data) to.gate_bias = arena.take<float>(adapter.N);
  });
  if (need_up || need_dz) {
    job.columns = (uint32_t*)bottleneck_scratch(2, size_t((adapter.r + 1) * job.ld_columns) * 4);
    const int64_t last = ceil_div(M, kernel.elements) - 1;  // the unit that an odd last row fills in half
    for (int64_t j = 0; j <= adapter.r; ++j) job.columns[j * job.ld_columns + last] = 0;
  }
  const bool need_rows = need_dz || gradients.dx || gradients.gate;
  const int64_t packs = need_rows ? kernel.pack_items(job.rank_lanes, adapter.N, adapter.K) : 0;
  const int64_t up_tiles = need_up ? ceil_div(adapter.N, kPanelLanes) : 0;
  const int64_t down_tiles = need_down ? ceil_div(adapter.K, kPanelLanes) : 0;
  const RowSplit split(M, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < (need_up ? split.items : 0); ++item)
      kernel.hidden_columns(job, split.begin(item), split.begin(item + 1));
#pragma omp for schedule(static)
    for (int64_t part = 0; part < threads; ++part)
      kernel.up_gradients(job, part, up_tiles * part / threads, up_tiles * (part + 1) / threads);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < packs; ++item) kernel.pack_backward(job, item);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < (need_rows ? split.items : 0); ++item)
      kernel.backward_rows(job, split.begin(item), split.begin(item + 1));
#pragma omp for schedule(static)
    for (int64_t rank = 0; rank < (need_dz ? adapter.r : 0); ++rank) kernel.sum_dz(job, rank);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < threads; ++part)
      kernel.down_gradients(job, part, down_tiles * part / threads, down_tiles * (part + 1) / threads);
  }
}

}  // namespace peft_kernels

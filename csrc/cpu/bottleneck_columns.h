// The passes over columns: weight gradients, each column's sum over all rows in one order.
#pragma once

#include "cpu/bottleneck_pack.h"
#include "cpu/bottleneck_tiles.h"

namespace peft_kernels {
namespace {

// A tile of a gradient that is written after the next product: too short a run for the hardware prefetcher.
inline void prefetch_tile(const void* data, DType dtype, int64_t ld, int64_t row, int64_t rows, int64_t column) {
  const int64_t size = dtype_size(dtype);
  const char* from = (const char*)data + (row * ld + column) * size;
  for (int64_t i = 0; data && i < rows; ++i, from += ld * size)
    for (int64_t b = 0; b < kPanelLanes * size; b += 64) __builtin_prefetch(from + b);
}

template <class U>
void sum_dz(const BottleneckJob& job, int64_t rank) {
  Vec sum = vec_zero(), mean_sum = vec_zero();
  for (int64_t m = 0; m < job.M; m += kVec) {
    Vec dz = vec_load(job.columns, U::kDtype, rank * job.ld_columns * U::kElements + m, job.M - m);
    if (folds_norm<U>(job)) {
      mean_sum = multiply_add(dz, vec_load(job.mean, DType::F32, m, job.M - m), mean_sum);
      Vec inverse_std = vec_load(job.inverse_std, DType::F32, m, job.M - m);
      if (m + kVec > job.M) inverse_std = inverse_std + (vec_set(1.0f) - vec_first(vec_set(1.0f), job.M - m));
      dz = dz / inverse_std;
    }
    sum = sum + dz;
  }
  job.dz_sum[rank] = vec_sum(sum);
  job.dz_mean[rank] = vec_sum(mean_sum);
  if (job.gradients.down_bias) store_f32(job.gradients.down_bias, rank, job.adapter.down_bias.dtype, job.dz_sum[rank]);
}

// Rows [row, row + rows) of columns [column, column + lanes) of x or dy, which a panel of units holds.
struct ColumnPanel {
  int64_t row, rows, column, lanes;
};

// The panels of x or dy that tiles [begin, end) of a weight gradient multiply, in order: down each tile in chunks, tile
// after tile. Two buffers: while the one is multiplied, the other is filled piece by piece. Rows of a power of two
// bytes share a few sets of the cache, so that no more than a piece is brought closer at a time.
template <class U>
struct PanelStream {
  static constexpr int64_t kRows = kChunkUnits * U::kElements;
  const Source& from;
  int64_t M, width, end;
  int64_t tile, row = 0;  // of the panel that is filled next
  uint32_t *panel, *next;
  ColumnPanel filling;
  int64_t filled = 0;

  PanelStream(const BottleneckJob& job, const Source& from, int64_t width, int64_t begin, int64_t end,
              uint32_t* buffers)
      : from(from), M(job.M), width(width), end(end), tile(begin) {
    panel = buffers, next = buffers + kChunkUnits * kPanelLanes;
    filling = at_next();
  }

  ColumnPanel at_next() const {
    if (tile >= end) return {0, 0, 0, 0};
    const int64_t column = tile * kPanelLanes;
    return {row, min64(kRows, M - row), column, min64(kPanelLanes, width - column)};
  }

  ColumnsAhead ahead(int64_t to) const {
    if (to <= filled || filled >= filling.rows) return {nullptr, 0, 0, 0};
    const Matrix& m = from.matrix;
    const int64_t size = dtype_size(m.dtype), first = (filling.row + filled) * m.ld + filling.column;
    return {(const char*)m.data + first * size, m.ld * size, min64(to, filling.rows) - filled, filling.lanes * size};
  }

  void fill(int64_t to) {
    to = min64(to, filling.rows);
    if (to > filled)
      pack_lanes_from_columns<U>(from, filling.row + filled, to - filled, filling.column, filling.lanes, kPanelLanes,
                                 next + filled / U::kElements * kPanelLanes);
    filled = to > filled ? to : filled;
  }

  // The panel whose turn it is.
  const uint32_t* take() {
    fill(filling.rows);
    uint32_t* ready = next;
    next = panel, panel = ready;
    row += kRows, filled = 0;
    if (row >= M) row = 0, ++tile;
    filling = at_next();
    return ready;
  }
};

// sums[r][64] = the r rows [M] of job.columns times the stream's next panels. One more row is for the sum of the
// columns alone. Chains of additions are short, as eager's sums over rows err less than products do.
template <class U>
void column_sums(const BottleneckJob& job, PanelStream<U>& stream, bool one_more, float* sums) {
  constexpr int64_t kChain = U::kElements == 1 ? 64 : kChunkUnits, kSumChain = 32;
  const int64_t r = job.adapter.r, ld = job.ld_columns, units = units_of<U>(job.M);
  const int64_t tiles = (r + kTileRows - 1) / kTileRows;
  const int64_t piece = ((PanelStream<U>::kRows + tiles - 1) / tiles + 1) / 2 * 2;
  for (int64_t u = 0; u < units; u += kChunkUnits) {
    const int64_t n = min64(kChunkUnits, units - u);
    const uint32_t* panel = stream.take();
    const auto add = [&](int64_t row, int64_t height, int64_t chain, ColumnsAhead ahead) {
      const auto multiply = multiply_of<U, kPanelLanes / kVec, ColumnsAhead>(height);
      for (int64_t v = 0; v < n; v += chain, ahead = ahead.after(chain))
        multiply((const char*)(job.columns + row * ld + u + v), ld * 4, panel + v * kPanelLanes, min64(chain, n - v),
                 sums + row * kPanelLanes, kPanelLanes, u + v > 0, ahead);
    };
    for (int64_t t = 0; t < tiles; ++t) {
      add(t * kTileRows, min64(kTileRows, r - t * kTileRows), kChain, stream.ahead((t + 1) * piece));
      stream.fill((t + 1) * piece);
    }
    if (one_more) add(r, 1, kSumChain, {nullptr, 0, 0, 0});
  }
}

template <class U>
void up_gradient(const BottleneckJob& job, PanelStream<U>& stream, int64_t n0, float* sums) {
  const Adapter& adapter = job.adapter;
  const AdapterGradients& gradients = job.gradients;
  const int64_t r = adapter.r, lanes = min64(kPanelLanes, adapter.N - n0);
  prefetch_tile(gradients.up_weight, adapter.up.dtype, r, n0, lanes, 0);
  column_sums<U>(job, stream, gradients.up_bias || gradients.channel, sums);
  const float factor = adapter.scaling * job.inverse_keep, *bias = sums + r * kPanelLanes;
  alignas(64) float dots[kPanelLanes] = {};
  for (int64_t g = 0; g < lanes; g += kVec) {
    for (int64_t j = 0; j < r; j += kVec) {
      Vec v[kVec];
      for (int64_t i = 0; i < kVec; ++i) v[i] = j + i < r ? vec_load(sums + (j + i) * kPanelLanes + g) : vec_zero();
      vec_transpose(v);
      for (int64_t i = 0; i < min64(kVec, lanes - g); ++i) {
        const int64_t n = n0 + g + i;
        if (gradients.channel)
          dots[g + i] += vec_sum(v[i] * vec_load(adapter.up.data, adapter.up.dtype, n * adapter.up.ld + j, r - j));
        const float scale = factor * (job.channel ? job.channel[n] : 1.0f);
        if (gradients.up_weight)
          vec_store(gradients.up_weight, adapter.up.dtype, n * r + j, v[i] * vec_set(scale), r - j);
      }
    }
  }
  for (int64_t g = 0; g < lanes; g += kVec) {
    const int64_t n = n0 + g, count = lanes - g;
    const Vec sum = vec_load(bias + g), scale = vec_set(factor);
    if (gradients.up_bias) {
      const Vec v = job.channel ? sum * vec_load(job.channel, DType::F32, n, count) : sum;
      vec_store(gradients.up_bias, adapter.up_bias.dtype, n, v * scale, count);
    }
    if (gradients.channel) {
      Vec v = vec_load(dots + g);
      if (job.up_bias) v = multiply_add(sum, vec_load(job.up_bias, DType::F32, n, count), v);
      vec_store(gradients.channel, adapter.channel.dtype, n, v * scale, count);
    }
  }
}

// Eager sums the layer norm's gradients over rows, where rounding errors average out; ours are sums over ranks, kept as
// exact by short runs.
constexpr int64_t kSumRun = 8;

template <class U>
void down_gradient(const BottleneckJob& job, PanelStream<U>& stream, int64_t k0, float* sums) {
  const Adapter& adapter = job.adapter;
  const AdapterGradients& gradients = job.gradients;
  const int64_t lanes = min64(kPanelLanes, adapter.K - k0);
  prefetch_tile(gradients.down_weight, adapter.down.dtype, adapter.K, 0, adapter.r, k0);
  column_sums<U>(job, stream, false, sums);
  for (int64_t g = 0; g < lanes; g += kVec) {
    const int64_t k = k0 + g, count = lanes - g;
    Vec weight = vec_set(1.0f), bias = vec_zero(), weight_total = vec_zero(), bias_total = vec_zero();
    if (job.ln_weight) weight = vec_load(job.ln_weight, DType::F32, k, count);
    if (job.ln_bias) bias = vec_load(job.ln_bias, DType::F32, k, count);
    for (int64_t j0 = 0; j0 < adapter.r; j0 += kSumRun) {
      Vec dweight = vec_zero(), dbias = vec_zero();
      for (int64_t j = j0; j < min64(adapter.r, j0 + kSumRun); ++j) {
        const Vec sum = vec_load(sums + j * kPanelLanes + g) - vec_set(job.dz_mean[j]), dz = vec_set(job.dz_sum[j]);
        if (gradients.down_weight)
          vec_store(gradients.down_weight, adapter.down.dtype, j * adapter.K + k, multiply_add(sum, weight, dz * bias),
                    count);
        if (!gradients.ln_weight && !gradients.ln_bias) continue;
        const Vec w = vec_load(adapter.down.data, adapter.down.dtype, j * adapter.down.ld + k, count);
        dweight = multiply_add(w, sum, dweight);
        dbias = multiply_add(w, dz, dbias);
      }
      weight_total = weight_total + dweight;
      bias_total = bias_total + dbias;
    }
    if (gradients.ln_weight) vec_store(gradients.ln_weight, adapter.ln_weight.dtype, k, weight_total, count);
    if (gradients.ln_bias) vec_store(gradients.ln_bias, adapter.ln_bias.dtype, k, bias_total, count);
  }
}

// gradient(job, stream, first column, sums) for tiles [begin, end) of a weight gradient that multiplies `from`.
template <class U, class Gradient>
void gradient_tiles(const BottleneckJob& job, const Source& from, int64_t width, int64_t part, int64_t begin,
                    int64_t end, const Gradient& gradient) {
  float* sums = job.weight_scratch + part * weight_scratch_floats(job.adapter.r);
  uint32_t* panels = (uint32_t*)sums + (job.adapter.r + 1) * kPanelLanes;
  PanelStream<U> stream(job, from, width, begin, end, panels);
  for (int64_t tile = begin; tile < end; ++tile) gradient(job, stream, tile * kPanelLanes, sums);
}

template <class U>
void up_gradients(const BottleneckJob& job, int64_t part, int64_t begin, int64_t end) {
  gradient_tiles<U>(job, job.dy, job.adapter.N, part, begin, end, up_gradient<U>);
}

template <class U>
void down_gradients(const BottleneckJob& job, int64_t part, int64_t begin, int64_t end) {
  gradient_tiles<U>(job, job.x, job.adapter.K, part, begin, end, down_gradient<U>);
}

}  // namespace
}  // namespace peft_kernels

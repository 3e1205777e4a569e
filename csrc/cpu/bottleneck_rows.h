// The passes over rows: a block of them goes down, through the activation and up again while its hidden stays in cache.
#pragma once

#include "cpu/bottleneck_tiles.h"

namespace peft_kernels {
namespace {

constexpr int64_t kPackedLd = kChunkUnits + 16;  // a power of two would put the rows of a tile in one set of L1

// A thread's memory for one block of rows.
template <class U>
struct RowBlock {
  int64_t m0, rows, lanes, ld_hidden;
  uint32_t *packed, *hidden;  // [rows][kPackedLd], [rows][ld_hidden] units
  float *sums, *value, *slope, *z;  // [rows][lanes], [lanes] each
  float c1[kBlockRows], c2[kBlockRows];  // of the layer norm's backward pass

  RowBlock(const BottleneckJob& job, int64_t from, int64_t to) : m0(from), rows(to - from), lanes(job.rank_lanes) {
    ld_hidden = lanes / U::kElements + 16;
    char* memory = (char*)bottleneck_scratch(1, size_t(kBlockRows * (kPackedLd + ld_hidden + lanes) + 3 * lanes) * 4);
    packed = (uint32_t*)memory;
    hidden = packed + kBlockRows * kPackedLd;
    sums = (float*)(hidden + kBlockRows * ld_hidden);
    value = sums + kBlockRows * lanes;
    slope = value + lanes;
    z = slope + lanes;
  }
};

// block.sums = rows of `from` times the panels that job.reduce holds.
template <class U>
void reduce(const BottleneckJob& job, const Source& from, int64_t length, RowBlock<U>& block) {
  const int64_t units = units_of<U>(length), size = dtype_size(from.matrix.dtype);
  const bool direct = plain(from) && from.matrix.dtype == U::kDtype && length % U::kElements == 0;
  for (int64_t u = 0; u < units; u += kChunkUnits) {
    const int64_t count = min64(kChunkUnits, units - u), k = u * U::kElements;
    const char* rows = (const char*)block.packed;
    if (direct)
      rows = (const char*)from.matrix.data + (block.m0 * from.matrix.ld + k) * size;
    else
      pack_rows<U>(from, block.m0, block.rows, k, min64(count * U::kElements, length - k), block.packed, kPackedLd);
    for (int64_t lane = 0; lane < block.lanes; lane += kPanelLanes) {
      const int64_t W = min64(kPanelLanes, block.lanes - lane);
      multiply_rows<U>(rows, direct ? from.matrix.ld * size : kPackedLd * 4, block.rows,
                       job.reduce + lane * units + u * W, count, W, block.sums + lane, block.lanes, u > 0);
    }
  }
}

// The block's hidden times job.expand, a tile of sums at a time, each handed to finish(sums, row, count, column).
template <class U, class Finish>
void expand(const BottleneckJob& job, int64_t width, const RowBlock<U>& block, Finish finish) {
  const int64_t units = units_of<U>(job.adapter.r);
  alignas(64) float sums[kTileRows * kPanelLanes];
  for (int64_t n = 0; n < width; n += kPanelLanes) {
    const uint32_t* panel = job.expand + n * units;
    for (int64_t i = 0; i < block.rows; i += kTileRows) {
      const int64_t count = min64(kTileRows, block.rows - i);
      for (int64_t u = 0; u < units; u += kChunkUnits)
        multiply_rows<U>((const char*)(block.hidden + i * block.ld_hidden + u), block.ld_hidden * 4, count,
                         panel + u * kPanelLanes, min64(kChunkUnits, units - u), kPanelLanes, sums, kPanelLanes, u > 0);
      finish(sums, i, count, n);
    }
  }
}

template <class U>
void store_hidden(RowBlock<U>& block, int64_t i, const float* values) {
  for (int64_t j = 0; j < block.lanes; j += kVec)
    vec_store(block.hidden + i * block.ld_hidden, U::kDtype, j, vec_load(values + j));
}

inline void row_statistics(const BottleneckJob& job, int64_t m) {
  const Matrix& x = job.x.matrix;
  const int64_t K = job.adapter.K;
  Vec sum = vec_zero();
  for (int64_t k = 0; k < K; k += kVec) sum = sum + vec_load(x.data, x.dtype, m * x.ld + k, K - k);
  const float mean = vec_sum(sum) / float(K);
  sum = vec_zero();
  for (int64_t k = 0; k < K; k += kVec) {
    const Vec d = vec_first(vec_load(x.data, x.dtype, m * x.ld + k, K - k) - vec_set(mean), K - k);
    sum = multiply_add(d, d, sum);
  }
  job.stats[m] = mean;
  job.stats[job.M + m] = 1.0f / __builtin_sqrtf(vec_sum(sum) / float(K) + job.ln_eps);
}

// y = residual + mask * gate * (s c (sum + bu)), for a tile of sums.
inline void finish_forward(const BottleneckJob& job, const float* sums, int64_t m, int64_t rows, int64_t n0) {
  const Adapter& adapter = job.adapter;
  const Matrix& added = adapter.add_x ? job.x.matrix : job.residual;
  alignas(64) float mask[kPanelLanes];
  for (int64_t i = 0; i < rows; ++i, ++m, sums += kPanelLanes) {
    if (adapter.dropout.active()) dropout_scale_row(adapter.dropout.seed, m, n0, kPanelLanes, adapter.dropout.p, mask);
    for (int64_t g = 0; g < kPanelLanes && n0 + g < adapter.N; g += kVec) {
      const int64_t n = n0 + g, count = adapter.N - n;
      Vec v = multiply_add(vec_load(sums + g), vec_load(job.column_scale + n), vec_load(job.column_bias + n));
      if (adapter.gate) v = v * vec_set(adapter.gate[m]);
      if (adapter.dropout.active()) v = v * vec_load(mask + g);
      if (added.data) v = v + vec_load(added.data, added.dtype, m * added.ld + n, count);
      vec_store(job.y, job.y_dtype, m * adapter.N + n, v, count);
    }
  }
}

template <class U>
void forward_rows(const BottleneckJob& job, int64_t m0, int64_t m1) {
  const Adapter& adapter = job.adapter;
  RowBlock<U> block(job, m0, m1);
  for (int64_t m = m0; adapter.ln_weight && m < m1; ++m) row_statistics(job, m);
  reduce<U>(job, job.x, adapter.K, block);
  for (int64_t i = 0; i < block.rows; ++i) {
    float* z = block.sums + i * block.lanes;
    for (int64_t j = 0; j < block.lanes; j += kVec) {
      const Vec v = vec_load(z + j) + vec_load(job.hidden_bias + j);
      vec_store(z + j, v);
      if (job.z) vec_store(job.z, job.z_dtype, (m0 + i) * adapter.r + j, v, adapter.r - j);
    }
    activate(adapter.activation, z, adapter.r, block.value, nullptr);
    for (int64_t j = adapter.r; j < block.lanes; ++j) block.value[j] = 0;
    store_hidden<U>(block, i, block.value);
  }
  expand<U>(job, adapter.N, block, [&](const float* sums, int64_t i, int64_t count, int64_t n) {
    finish_forward(job, sums, m0 + i, count, n);
  });
}

// Row m of dZ = s mask act'(Z) (dY Wu) from block.sums, its copy for the weight gradients, and what else it yields.
template <class U>
void hidden_gradient(const BottleneckJob& job, RowBlock<U>& block, int64_t i) {
  const Adapter& adapter = job.adapter;
  const int64_t r = adapter.r, m = block.m0 + i;
  const float factor = adapter.scaling * job.inverse_keep, gate = adapter.gate ? adapter.gate[m] : 1.0f;
  float* d = block.sums + i * block.lanes;
  for (int64_t j = 0; j < block.lanes; j += kVec)
    vec_store(block.z + j, vec_load(job.saved_z.data, job.saved_z.dtype, m * job.saved_z.ld + j, r - j));
  activate(adapter.activation, block.z, r, block.value, block.slope);
  for (int64_t j = r; j < block.lanes; ++j) block.value[j] = block.slope[j] = 0;
  Vec dot = vec_zero(), c1 = vec_zero(), c2 = vec_zero();
  for (int64_t j = 0; j < block.lanes; j += kVec) {
    const Vec value = vec_load(block.value + j), upstream = vec_load(d + j);
    dot = multiply_add(value, upstream, dot);
    const Vec dz = upstream * vec_load(block.slope + j) * vec_set(factor * gate);
    vec_store(d + j, dz);
    vec_store(block.value + j, value * vec_set(gate));
    if (!adapter.ln_weight) continue;
    c1 = multiply_add(dz, vec_load(job.hidden_sum + j), c1);
    c2 = multiply_add(dz, vec_load(block.z + j) - vec_load(job.hidden_bias + j), c2);
  }
  block.c1[i] = vec_sum(c1) / float(adapter.K);
  block.c2[i] = vec_sum(c2) / float(adapter.K);
  if (job.gradients.gate) {
    alignas(64) float mask[kPanelLanes];
    for (int64_t n = 0; job.gate_bias && n < adapter.N; n += kPanelLanes) {
      const float* keep = keep_row(job.dy, m, n, kPanelLanes, mask);
      for (int64_t g = 0; g < kPanelLanes && n + g < adapter.N; g += kVec)
        dot = multiply_add(read({job.dy.matrix, nullptr, nullptr, job.gate_bias, {}}, m, n + g, adapter.N - n - g,
                                keep ? keep + g : nullptr),
                           vec_set(1.0f), dot);
    }
    job.gradients.gate[m] = factor * vec_sum(dot);
  }
  store_hidden<U>(block, i, d);
  const int64_t ld = job.ld_columns * U::kElements;
  for (int64_t j = 0; job.a_columns && j < r; ++j) store_f32(job.a_columns, j * ld + m, U::kDtype, block.value[j]);
  if (job.a_columns) store_f32(job.a_columns, r * ld + m, U::kDtype, gate);
  for (int64_t j = 0; job.dz_columns && j < r; ++j) store_f32(job.dz_columns, j * ld + m, U::kDtype, d[j]);
}

// dx = [layer norm's backward of] the sums, plus dy where the residual is x.
template <class U>
void finish_backward(const BottleneckJob& job, const RowBlock<U>& block, const float* sums, int64_t i, int64_t rows,
                     int64_t k0) {
  const Adapter& adapter = job.adapter;
  const Matrix &x = job.x.matrix, &dy = job.dy.matrix;
  for (const int64_t end = i + rows; i < end; ++i, sums += kPanelLanes) {
    const int64_t m = block.m0 + i;
    for (int64_t g = 0; g < kPanelLanes && k0 + g < adapter.K; g += kVec) {
      const int64_t k = k0 + g, count = adapter.K - k;
      Vec v = vec_load(sums + g);
      if (adapter.ln_weight) {
        const Vec scale = vec_set(job.x.row_scale[m]);
        const Vec normal = (vec_load(x.data, x.dtype, m * x.ld + k, count) - vec_set(job.x.subtract[m])) * scale;
        v = (v - vec_set(block.c1[i]) - normal * vec_set(block.c2[i])) * scale;
      }
      if (adapter.add_x) v = v + vec_load(dy.data, dy.dtype, m * dy.ld + k, count);
      vec_store(job.gradients.dx, job.gradients.dx_dtype, m * adapter.K + k, v, count);
    }
  }
}

template <class U>
void backward_rows(const BottleneckJob& job, int64_t m0, int64_t m1) {
  RowBlock<U> block(job, m0, m1);
  reduce<U>(job, job.dy, job.adapter.N, block);
  for (int64_t i = 0; i < block.rows; ++i) hidden_gradient<U>(job, block, i);
  if (!job.gradients.dx) return;
  expand<U>(job, job.adapter.K, block, [&](const float* sums, int64_t i, int64_t count, int64_t k) {
    finish_backward<U>(job, block, sums, i, count, k);
  });
}

}  // namespace
}  // namespace peft_kernels

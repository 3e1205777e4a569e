// Backward over a block of rows: dY goes up's way back, through the activation's derivative and down's way back.
#pragma once

#include "cpu/bottleneck_rows.h"

namespace peft_kernels {
namespace {

// Columns [m0, m0 + rows) of the weight gradients' left operand, which `from` [rows][ld] holds row by row.
template <class U>
void store_columns(const BottleneckJob& job, int64_t m0, int64_t rows, const float* from, int64_t ld) {
  const int64_t r = job.adapter.r;
  for (int64_t i = 0; i < rows; i += kVec)
    for (int64_t j = 0; j < r; j += kVec) {
      Vec v[kVec];
      for (int64_t n = 0; n < kVec; ++n) v[n] = i + n < rows ? vec_load(from + (i + n) * ld + j) : vec_zero();
      vec_transpose(v);
      for (int64_t n = 0; n < min64(kVec, r - j); ++n)
        vec_store(job.columns, U::kDtype, (j + n) * job.ld_columns * U::kElements + m0 + i, v[n], rows - i);
    }
}

inline void load_hidden(const BottleneckJob& job, int64_t m, int64_t lanes, float* z) {
  for (int64_t j = 0; j < lanes; j += kVec)
    vec_store(z + j, vec_load(job.saved_z.data, job.saved_z.dtype, m * job.saved_z.ld + j, job.adapter.r - j));
}

// Columns [m0, m1) of g act(Z) and of g itself.
template <class U>
void hidden_columns(const BottleneckJob& job, int64_t m0, int64_t m1) {
  RowBlock<U> block(job, m0, m1);
  for (int64_t i = 0; i < block.rows; ++i) {
    float* value = block.sums + i * block.lanes;
    load_hidden(job, m0 + i, block.lanes, block.z);
    activate(job.adapter.activation, block.z, job.adapter.r, value, nullptr);
    const float gate = job.gate ? job.gate[m0 + i] : 1.0f;
    for (int64_t j = 0; job.gate && j < block.lanes; j += kVec)
      vec_store(value + j, vec_load(value + j) * vec_set(gate));
    store_f32(job.columns, job.adapter.r * job.ld_columns * U::kElements + m0 + i, U::kDtype, gate);
  }
  store_columns<U>(job, m0, block.rows, block.sums, block.lanes);
}

// Row m of dZ = s mask act'(Z) (dY Wu) from block.sums, and what else it yields.
template <class U>
void hidden_gradient(const BottleneckJob& job, RowBlock<U>& block, int64_t i) {
  const Adapter& adapter = job.adapter;
  const int64_t r = adapter.r, m = block.m0 + i;
  const float factor = adapter.scaling * job.inverse_keep, gate = job.gate ? job.gate[m] : 1.0f;
  float* d = block.sums + i * block.lanes;
  load_hidden(job, m, block.lanes, block.z);
  activate(adapter.activation, block.z, r, block.value, block.slope);
  for (int64_t j = r; j < block.lanes; ++j) block.value[j] = block.slope[j] = 0;
  Vec dot = vec_zero(), c1 = vec_zero(), c2 = vec_zero();
  for (int64_t j = 0; j < block.lanes; j += kVec) {
    const Vec value = vec_load(block.value + j), upstream = vec_load(d + j);
    dot = multiply_add(value, upstream, dot);
    const Vec dz = upstream * vec_load(block.slope + j) * vec_set(factor * gate);
    vec_store(d + j, dz);
    if (!job.ln_weight) continue;
    c1 = multiply_add(dz, vec_load(job.hidden_sum + j), c1);
    c2 = multiply_add(dz, vec_load(block.z + j) - vec_load(job.hidden_bias + j), c2);
  }
  const float inverse_std = job.ln_weight ? job.inverse_std[m] : 1.0f;
  block.c1[i] = -vec_sum(c1) / float(adapter.K) * inverse_std;
  block.c2[i] = -vec_sum(c2) / float(adapter.K) * inverse_std * inverse_std;
  if (job.gradients.gate) {
    alignas(64) float mask[kPanelLanes];
    for (int64_t n = 0; job.gate_bias && n < adapter.N; n += kPanelLanes) {
      const float* keep = keep_row(job.dy, m, n, kPanelLanes, mask);
      for (int64_t g = 0; g < kPanelLanes && n + g < adapter.N; g += kVec)
        dot = multiply_add(read({job.dy.matrix, nullptr, nullptr, job.gate_bias, {}}, m, n + g, adapter.N - n - g,
                                keep ? keep + g : nullptr),
                           vec_set(1.0f), dot);
    }
    store_f32(job.gradients.gate, m, adapter.gate.dtype, factor * vec_sum(dot));
  }
  store_hidden<U>(block, i, d);
  if (!folds_norm<U>(job)) return;
  for (int64_t j = 0; j < block.lanes; j += kVec) vec_store(d + j, vec_load(d + j) * vec_set(inverse_std));
}

// dx = [layer norm's backward of] the sums, plus dy where the residual is x.
template <class U>
struct FinishBackward {
  const BottleneckJob& job;
  const RowBlock<U>& block;

  bool direct() const {
    const Matrix &x = job.x.matrix, &dy = job.dy.matrix;
    return job.gradients.dx_dtype == U::kDtype && (!job.ln_weight || x.dtype == U::kDtype) &&
           (!job.adapter.add_x || dy.dtype == U::kDtype);
  }

  TileAhead ahead(int64_t i, int64_t k) const {
    const Matrix &x = job.x.matrix, &dy = job.dy.matrix;
    TileAhead tile{};
    if (job.ln_weight) tile.add(0, x.data, x.dtype, x.ld, block.m0 + i, k);
    if (job.adapter.add_x) tile.add(1, dy.data, dy.dtype, dy.ld, block.m0 + i, k);
    tile.add(2, job.gradients.dx, job.gradients.dx_dtype, job.adapter.K, block.m0 + i, k);
    return tile;
  }

  PK_INLINE Vec finish(Vec v, int64_t i, int64_t k, DType x_dtype, DType dy_dtype, int64_t count) const {
    const Matrix &x = job.x.matrix, &dy = job.dy.matrix;
    const int64_t m = block.m0 + i;
    if (job.ln_weight) {
      const Vec centred = vec_load(x.data, x_dtype, m * x.ld + k, count) - vec_set(job.mean[m]);
      v = multiply_add(v, vec_set(job.inverse_std[m]), vec_set(block.c1[i]));
      v = multiply_add(centred, vec_set(block.c2[i]), v);
    }
    return job.adapter.add_x ? v + vec_load(dy.data, dy_dtype, m * dy.ld + k, count) : v;
  }

  PK_INLINE void whole(Vec (&acc)[kTileRows][4], int64_t i0, int64_t k0) const {
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int g = 0; g < 4; g += 2) {
        const int64_t k = k0 + g * kVec;
        const Vec first = finish(acc[i][g], i0 + i, k, U::kDtype, U::kDtype, kVec);
        const Vec second = finish(acc[i][g + 1], i0 + i, k + kVec, U::kDtype, U::kDtype, kVec);
        store_pair<U>(job.gradients.dx, (block.m0 + i0 + i) * job.adapter.K + k, first, second);
      }
  }

  void part(const float* sums, int64_t i, int64_t rows, int64_t k0) const {
    for (const int64_t end = i + rows; i < end; ++i, sums += kPanelLanes)
      for (int64_t g = 0; g < kPanelLanes && k0 + g < job.adapter.K; g += kVec) {
        const int64_t k = k0 + g, count = job.adapter.K - k;
        const Vec v = finish(vec_load(sums + g), i, k, job.x.matrix.dtype, job.dy.matrix.dtype, count);
        vec_store(job.gradients.dx, job.gradients.dx_dtype, (block.m0 + i) * job.adapter.K + k, v, count);
      }
  }
};

template <class U>
void backward_rows(const BottleneckJob& job, int64_t m0, int64_t m1) {
  RowBlock<U> block(job, m0, m1);
  reduce<U>(job, job.dy, job.adapter.N, block);
  for (int64_t i = 0; i < block.rows; ++i) hidden_gradient<U>(job, block, i);
  if (job.columns) store_columns<U>(job, m0, block.rows, block.sums, block.lanes);
  if (!job.gradients.dx) return;
  const FinishBackward<U> finish{job, block};
  expand<U>(job, job.adapter.K, block, finish.direct(), finish);
}

}  // namespace
}  // namespace peft_kernels

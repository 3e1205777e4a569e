// Forward over a block of rows: it goes down, through the activation and up again.
#pragma once

#include "cpu/bottleneck_rows.h"

namespace peft_kernels {
namespace {

// The sum over row m of x of what add(values, sum, how many of them) adds, with four additions under way at a time.
template <class U, class Add>
PK_INLINE float sum_row(const Matrix& x, int64_t m, int64_t K, const Add& add) {
  Vec sums[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
  int64_t k = 0;
  if constexpr (U::kElements == 2) {
    const uint16_t* row = (const uint16_t*)x.data + m * x.ld;
    for (; k + 4 * kVec <= K; k += 4 * kVec)
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2) {
        Vec even, odd;
        U::split(row + k + i * kVec, even, odd);
        sums[i] = add(even, sums[i], kVec);
        sums[i + 1] = add(odd, sums[i + 1], kVec);
      }
  }
  for (; k < K; k += 4 * kVec)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t count = K - k - i * kVec;
      sums[i] = add(vec_load(x.data, x.dtype, m * x.ld + k + i * kVec, count), sums[i], count);
    }
  return vec_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class U>
void row_statistics(const BottleneckJob& job, int64_t m) {
  const Matrix& x = job.x.matrix;
  const int64_t K = job.adapter.K;
  const float mean = sum_row<U>(x, m, K, [](Vec v, Vec sum, int64_t) { return sum + v; }) / float(K);
  const float squares = sum_row<U>(x, m, K, [mean](Vec v, Vec sum, int64_t count) {
    Vec d = v - vec_set(mean);
    if (count < kVec) d = vec_first(d, count);
    return multiply_add(d, d, sum);
  });
  job.stats[m] = mean;
  job.stats[job.M + m] = 1.0f / __builtin_sqrtf(squares / float(K) + job.ln_eps);
}

// y = residual + mask * gate * (s c (sum + bu)).
template <class U>
struct FinishForward {
  const BottleneckJob& job;
  int64_t m0;
  Matrix added;

  FinishForward(const BottleneckJob& job, int64_t m0)
      : job(job), m0(m0), added(job.adapter.add_x ? job.x.matrix : job.residual) {}

  bool direct() const {
    return !job.adapter.dropout.active() && job.y_dtype == U::kDtype && (!added.data || added.dtype == U::kDtype);
  }

  TileAhead ahead(int64_t i, int64_t n) const {
    TileAhead tile{};
    if (added.data) tile.add(0, added.data, added.dtype, added.ld, m0 + i, n);
    tile.add(1, job.y, job.y_dtype, job.adapter.N, m0 + i, n);
    return tile;
  }

  PK_INLINE void whole(Vec (&acc)[kTileRows][4], int64_t i0, int64_t n0) const {
    const float* gate = job.gate;
#pragma GCC unroll 2
    for (int g = 0; g < 4; g += 2) {
      const int64_t n = n0 + g * kVec;
      const Vec scale[2] = {vec_load(job.column_scale + n), vec_load(job.column_scale + n + kVec)};
      const Vec bias[2] = {vec_load(job.column_bias + n), vec_load(job.column_bias + n + kVec)};
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
        const int64_t m = m0 + i0 + i;
        Vec v[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          v[h] = multiply_add(acc[i][g + h], scale[h], bias[h]);
          if (gate) v[h] = v[h] * vec_set(gate[m]);
          if (added.data) v[h] = v[h] + vec_load(added.data, U::kDtype, m * added.ld + n + h * kVec);
        }
        store_pair<U>(job.y, m * job.adapter.N + n, v[0], v[1]);
      }
    }
  }

  void part(const float* sums, int64_t i0, int64_t rows, int64_t n0) const {
    const Adapter& adapter = job.adapter;
    alignas(64) float mask[kPanelLanes];
    for (int64_t m = m0 + i0; rows > 0; --rows, ++m, sums += kPanelLanes) {
      if (adapter.dropout.active())
        dropout_scale_row(adapter.dropout.seed, m, n0, kPanelLanes, adapter.dropout.p, mask);
      for (int64_t g = 0; g < kPanelLanes && n0 + g < adapter.N; g += kVec) {
        const int64_t n = n0 + g, count = adapter.N - n;
        Vec v = multiply_add(vec_load(sums + g), vec_load(job.column_scale + n), vec_load(job.column_bias + n));
        if (job.gate) v = v * vec_set(job.gate[m]);
        if (adapter.dropout.active()) v = v * vec_load(mask + g);
        if (added.data) v = v + vec_load(added.data, added.dtype, m * added.ld + n, count);
        vec_store(job.y, job.y_dtype, m * adapter.N + n, v, count);
      }
    }
  }
};

template <class U>
void forward_rows(const BottleneckJob& job, int64_t m0, int64_t m1) {
  const Adapter& adapter = job.adapter;
  RowBlock<U> block(job, m0, m1);
  for (int64_t m = m0; job.ln_weight && m < m1; ++m) row_statistics<U>(job, m);
  reduce<U>(job, job.x, adapter.K, block);
  for (int64_t i = 0; i < block.rows; ++i) {
    float* z = block.sums + i * block.lanes;
    const bool fold = folds_norm<U>(job);
    const Vec mean = vec_set(fold ? job.mean[m0 + i] : 0.0f), scale = vec_set(fold ? job.inverse_std[m0 + i] : 1.0f);
    for (int64_t j = 0; j < block.lanes; j += kVec) {
      Vec v = vec_load(z + j);
      if (fold) v = (v - mean * vec_load(job.hidden_sum + j)) * scale;
      v = v + vec_load(job.hidden_bias + j);
      vec_store(z + j, v);
      if (job.z) vec_store(job.z, job.z_dtype, (m0 + i) * adapter.r + j, v, adapter.r - j);
    }
    activate(adapter.activation, z, adapter.r, block.value, nullptr);
    for (int64_t j = adapter.r; j < block.lanes; ++j) block.value[j] = 0;
    store_hidden<U>(block, i, block.value);
  }
  const FinishForward<U> finish(job, m0);
  expand<U>(job, adapter.N, block, finish.direct(), finish);
}

}  // namespace
}  // namespace peft_kernels

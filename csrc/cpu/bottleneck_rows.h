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
  uint32_t *packed, *hidden;             // [rows][kPackedLd], [rows][ld_hidden] units
  float *sums, *value, *slope, *z;       // [rows][lanes], [lanes] each
  float c1[kBlockRows], c2[kBlockRows];  // of the layer norm's backward pass: dx = v / std + c1 + (x - mean) c2

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

// The block's hidden times job.expand, tile by tile: for a whole tile that `direct` says finish can take from
// registers, finish.whole(registers, row, column) after a product with finish.ahead(row, column), else
// finish.part(sums, row, rows, column).
template <class U, class Finish>
void expand(const BottleneckJob& job, int64_t width, const RowBlock<U>& block, bool direct, const Finish& finish) {
  const int64_t units = units_of<U>(job.adapter.r);
  alignas(64) float sums[kTileRows * kPanelLanes];
  direct = direct && kVecRegisters == 32 && units <= kChunkUnits;
  for (int64_t i = 0; i < block.rows; i += kTileRows) {
    const int64_t count = min64(kTileRows, block.rows - i);
    const char* hidden = (const char*)(block.hidden + i * block.ld_hidden);
    for (int64_t n = 0; n < width; n += kPanelLanes) {
      const uint32_t* panel = job.expand + n * units;
      if (direct && count == kTileRows && n + kPanelLanes <= width) {
        multiply_tile<U, kTileRows, 4, kPanelLanes>(
            hidden, block.ld_hidden * 4, panel, units, [&](Vec(&acc)[kTileRows][4]) { finish.whole(acc, i, n); },
            finish.ahead(i, n));
        continue;
      }
      for (int64_t u = 0; u < units; u += kChunkUnits)
        multiply_rows<U>(hidden + u * 4, block.ld_hidden * 4, count, panel + u * kPanelLanes,
                         min64(kChunkUnits, units - u), kPanelLanes, sums, kPanelLanes, u > 0);
      finish.part(sums, i, count, n);
    }
  }
}

template <class U>
void store_hidden(RowBlock<U>& block, int64_t i, const float* values) {
  for (int64_t j = 0; j < block.lanes; j += kVec)
    vec_store(block.hidden + i * block.ld_hidden, U::kDtype, j, vec_load(values + j));
}

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

// Row m of dZ = s mask act'(Z) (dY Wu) from block.sums, its copy for the weight gradients, and what else it yields.
template <class U>
void hidden_gradient(const BottleneckJob& job, RowBlock<U>& block, int64_t i) {
  const Adapter& adapter = job.adapter;
  const int64_t r = adapter.r, m = block.m0 + i;
  const float factor = adapter.scaling * job.inverse_keep, gate = job.gate ? job.gate[m] : 1.0f;
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
  const int64_t ld = job.ld_columns * U::kElements;
  for (int64_t j = 0; job.a_columns && j < r; ++j) store_f32(job.a_columns, j * ld + m, U::kDtype, block.value[j]);
  if (job.a_columns) store_f32(job.a_columns, r * ld + m, U::kDtype, gate);
  const float column_scale = folds_norm<U>(job) ? inverse_std : 1.0f;
  for (int64_t j = 0; job.dz_columns && j < r; ++j)
    store_f32(job.dz_columns, j * ld + m, U::kDtype, d[j] * column_scale);
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
  if (!job.gradients.dx) return;
  const FinishBackward<U> finish{job, block};
  expand<U>(job, job.adapter.K, block, finish.direct(), finish);
}

}  // namespace
}  // namespace peft_kernels
